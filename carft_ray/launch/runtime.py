"""What every training of a search shares, wherever it runs: recipe, folder, capacity, and the functions to call."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from carft_ray.data.copies.shared_images import read_shared, without_shared
from carft_ray.launch.capacity import Capacity, Node, capacity_of
from carft_ray.launch.file_transfer import StudyFiles
from carft_ray.launch.mailbox import Box, Mailbox
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.training.run_context import RunContext

Say = Callable[[str], None]
Fill = Callable[[Recipe, Path, Say], None]
Prepare = Callable[[Recipe, Path, Say], dict[str, Any]]
Train = Callable[[Recipe, Path, Path, RunContext, int], dict[str, Any]]
STOP_CHECK_S = 0.5


@dataclass(frozen=True)
class Runner:
    """What is run; functions that Ray moves by name.

    Attributes:
        prepare: Does once what all trainings share.
        train: One training.
        fill: Builds what the cache of its node lacks, for trainings that read sets; None: they read none.
    """

    prepare: Prepare
    train: Train
    fill: Fill | None = None


@dataclass(frozen=True)
class Runtime:
    """What every training of a search shares; travels to the workers.

    Attributes:
        recipe: With ``cpus_per_worker`` and ``gpus_per_worker`` resolved.
        study_dir: The study directory; nodes that do not see it have ``launch.node_files``.
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
