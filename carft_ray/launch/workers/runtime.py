"""What every training of a search shares, wherever it runs: recipe, folder, capacity, and the functions to call.

What ``resources`` leaves open is decided here, for one search: cores and GPUs by the nodes, ``targets`` by the
trainings. Those with equal values of ``VIEW_FIELDS`` have the same targets of the frozen model: then storing them pays.
What a device decides (``precision``, ``compile``, ``data.pack``) is decided where a training runs.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from carft_ray.data.duplicates.shared_images import read_shared, without_shared
from carft_ray.launch.cluster.capacity import Capacity, Node, capacity_of
from carft_ray.launch.workers.file_transfer import StudyFiles
from carft_ray.launch.workers.mailbox import Box, Mailbox
from carft_ray.recipe.loading import apply
from carft_ray.recipe.schema.recipe import Recipe, with_keys
from carft_ray.recipe.schema.train import FEATURE_TERMS
from carft_ray.recipe.space import num_trials, num_values
from carft_ray.training.run_context import RunContext

Say = Callable[[str], None]
Fill = Callable[[Recipe, Path, Say], None]
Prepare = Callable[[Recipe, Path, Say, Mapping[str, Any]], dict[str, Any]]
Train = Callable[[Recipe, Path, Path, RunContext, int], dict[str, Any]]
MakeSoup = Callable[[Mapping[str, Any], Recipe, Path, Path, RunContext, int], dict[str, Any]]
STOP_CHECK_S = 0.5
VIEW_FIELDS = ("seed", "crop_scale", "context_scale", "precision")


@dataclass(frozen=True)
class Runner:
    """What is run; functions that Ray moves by name.

    Attributes:
        prepare: Does once what all trainings share; writes nothing if something is not as the study was made of.
        train: One training.
        fill: Builds what the cache of its node lacks, for trainings that read sets; None: they read none.
        soup: Makes one soup; None: there are none.
    """

    prepare: Prepare
    train: Train
    fill: Fill | None = None
    soup: MakeSoup | None = None


@dataclass(frozen=True)
class Runtime:
    """What every training of a search shares; travels to the workers.

    Attributes:
        recipe: With ``cpus_per_worker`` and ``gpus_per_worker`` resolved.
        study_dir: The study directory; nodes that do not see it have ``launch.workers.node_files``.
        capacity: Trainings at a time, workers of each and what they get.
        runner: Preparation and training.
        in_process: Run all in the driver's own process, without Ray.
        attached: The Ray is not ours: its nodes come and go.
        may_grow: An autoscaler may add nodes to it.
        mailbox: By which the driver and its trainings talk; the first one has no driver, and says ``go``.
        files: The files of the study, for nodes that do not see it; None: all see it.
        commit: Number and digest of a commit of this search, by which a node knows the study's folder.
        first_commit: Digest of the first one, which tells studies apart.
        bucket: Address of a study in a bucket that nodes may use themselves; empty: all go through ``files``.
        made_of: What the study was made of (``data.same_as_study``), for its preparation; empty for a new study.
    """

    recipe: Recipe
    study_dir: Path
    capacity: Capacity
    runner: Runner
    in_process: bool = False
    attached: bool = False
    may_grow: bool = False
    mailbox: Box = field(default_factory=Mailbox)
    files: StudyFiles | None = None
    commit: tuple[int, str] = (0, "")
    first_commit: str = ""
    bucket: str = ""
    made_of: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nested(self) -> bool:
        """Whether trainings run as a Ray Train group."""
        executor = self.recipe.resources.executor
        return executor == "ray-train" or (executor == "auto" and self.recipe.resources.num_workers > 1)


def make_runtime(
    recipe: Recipe, study_dir: Path, nodes: tuple[Node, ...], runner: Runner, may_grow: bool = False
) -> Runtime:
    """Returns the runtime of a search (or of one training) on these nodes; its sets are without what the list of shared
    images leaves out.

    Raises:
        ClusterError: A training does not fit, and the cluster does not grow.
    """
    capacity = capacity_of(recipe, nodes, may_grow)
    resolved = {name: getattr(capacity, name) for name in ("cpus_per_worker", "gpus_per_worker")}
    resources = recipe.resources.model_copy(update=resolved)
    recipe = without_shared(recipe, read_shared(study_dir))
    return Runtime(recipe.model_copy(update={"resources": resources}), study_dir, capacity, runner, may_grow=may_grow)


def decide_targets(recipe: Recipe, trainings: Iterable[Mapping[str, Any]] | None = None) -> tuple[Recipe, str]:
    """Resolves ``resources.targets``: ``auto`` is ``stored`` where trainings share targets, else ``online``.

    Where no training could store any (``TrainConfig.shares_targets``), ``stored`` becomes ``online``, too.

    Args:
        recipe: The recipe of a study.
        trainings: Values over ``train`` of all trainings; None: the trials and baselines of a search. Of trials two are
            expected to share where there are twice as many as combinations of values.

    Returns:
        The recipe, and a line that says what was decided; no line where it was given, or nothing needs a target.
    """
    asked, space = recipe.resources.targets, recipe.search.space
    if asked == "online":
        return recipe, ""
    given = recipe.search.baselines.values() if trainings is None else trainings
    known = [apply(recipe, values).train for values in given]
    views = [tuple(getattr(train, name) for name in VIEW_FIELDS) for train in known if train.shares_targets]
    more = recipe.train.feature_terms or any(f"{name}_weight" in space for name in FEATURE_TERMS)
    moves = trainings is None and (recipe.train.teacher == "average" or "teacher" in space)
    trials_have_kl = trainings is None and (recipe.train.kl_weight > 0 or "kl_weight" in space)
    trials_share = trials_have_kl and not more and not moves
    if not views and not trials_share:
        if not any(train.compares_models for train in known) and not (trainings is None and (trials_have_kl or more)):
            return recipe, ""
        mode, why = "online", "since the penalties run the frozen model on each batch"
        if moves or any(train.moves_teacher for train in known):
            why = "since the targets of a moving teacher are never stored"
    elif asked == "stored":
        return recipe, ""
    elif len({*views}) < len(views) or (trials_share and num_trials(recipe) >= 2 * num_views(recipe)):
        mode, why = "stored", "the first training that needs them keeps them for later ones"
    else:
        mode, why = "online", f"since no two trainings have the same {', '.join(VIEW_FIELDS)}"
    return with_keys(recipe, resources={"targets": mode}), f"resources.targets: {mode}, {why}"


def num_views(recipe: Recipe) -> float:
    """Returns how many combinations of ``VIEW_FIELDS`` trials can have; infinity where one has no step."""
    searched = [recipe.search.space[name] for name in VIEW_FIELDS if name in recipe.search.space]
    return math.prod(num_values(parameter) or math.inf for parameter in searched)


def num_stored_visits(recipe: Recipe) -> int:
    """Returns how many visits of the training set the trials of a search store."""
    if decide_targets(recipe)[0].resources.targets != "stored":
        return 0
    epochs = int(getattr(recipe.search.space.get("epochs"), "high", recipe.train.epochs))
    return epochs * int(min(num_views(recipe), num_trials(recipe)))
