"""A finished training of a study with its weights."""

import contextlib
import logging
import shlex
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from carft_ray import files
from carft_ray.data.cache import cache_dir
from carft_ray.data.class_names import class_folders, class_words
from carft_ray.data.duplicates.shared_images import read_shared, shared_lines, without_shared
from carft_ray.data.listing import StoredSource
from carft_ray.data.records import records
from carft_ray.data.same_as_study import images_of, require_same
from carft_ray.data.sets import TRAIN, changed_images
from carft_ray.errors import DataError, Problem, StorageError, UsageError
from carft_ray.evaluation.metrics import answers, set_metrics
from carft_ray.evaluation.objective import metrics_at, objective_spec
from carft_ray.evaluation.predictions import select
from carft_ray.layout import HEADS, PREPARED, WEIGHTS
from carft_ray.model.classifier import ImageClassifier
from carft_ray.model.clip import load_clip
from carft_ray.model.device import device_of, set_up
from carft_ray.model.heads import templates
from carft_ray.recipe.loading import apply, trust_word
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.results.reading.finished import open_finished
from carft_ray.results.reading.status_and_ls import placed
from carft_ray.store.copy import MODELS
from carft_ray.study.place import Place, fetched, named
from carft_ray.study.recipe_identity import recipe_for_use
from carft_ray.study.training import TrialRow, file_of, result_of
from carft_ray.training.checkpoint import load_tensors
from carft_ray.training.evaluate import Mixtures, predict_all
from carft_ray.training.origin import set_contents, start_of
from carft_ray.training.run_context import RunContext
from carft_ray.training.shared_inputs import SharedInputs, Start, load_shared_inputs
from carft_ray.words import counted

HEAD_NAME = "class_head.safetensors"  # of an export
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Trained:
    """A finished training.

    Attributes:
        name: Study and trial.
        recipe: With the values of this training in ``train``; all paths absolute.
        result: Content of its ``result.json``; a trial of a Pareto search is at its point of the front.
        inputs: Model and prompts, compared with those of the study.
        class_head_CD: Zero-shot head, unit rows [C, D].
        fine_tuned: State at alpha 1.
        sets: Opens the validation sets, compared with those of the study.
        shared: What was done with images that are in two roles (``shared_images.shared_lines``).
    """

    name: str
    recipe: Recipe
    result: dict[str, Any]
    inputs: Start
    class_head_CD: Tensor
    fine_tuned: dict[str, Tensor]
    sets: Callable[[], SharedInputs]
    shared: tuple[str, ...] = ()

    @contextlib.contextmanager
    def mixtures(self) -> Iterator[Callable[[float], ImageClassifier]]:
        """Gives ``evaluate.Mixtures.between`` of the training's two models, on the device of the recipe."""
        recipe = self.recipe
        set_up(recipe)
        mixtures = Mixtures(self.inputs.clip, self.class_head_CD, recipe.train, device_of(recipe))
        with mixtures.between(lambda: self.fine_tuned) as mixed:
            yield mixed

    def classifier(self, alpha: float) -> ImageClassifier:
        """Returns a copy of the model mixed at ``alpha``, in eval mode."""
        with self.mixtures() as mixed:
            return deepcopy(mixed(alpha)).eval()


def open_trained(
    place: Place,
    trial: str | int | None = None,
    command: str = "evaluate {}",
    trust_paths: bool = False,
    with_sets: bool = True,
) -> Trained:
    """Opens a finished training of a study.

    Args:
        place: What `train --out` or `search --study` was given.
        trial: Number or name of a trial of the study, name of a baseline, or ``confirm/NAME``; None: the best one.
        command: As of ``recipe_for_use``.
        trust_paths: As of ``recipe_for_use``.
        with_sets: Whether the validation sets are opened at once.

    Raises:
        UsageError: The folder is no study, the trial does not exist, or it is the zero-shot model; or as
            ``recipe_for_use``.
        NoSuccessfulTrialError: The study has no finished trial, or the training is not finished.
        StorageError: Something in it is damaged.
        DataError: As ``start_of_study``; as ``sets_of_study`` with sets.
    """
    folder = folder_of_models(place)
    found = open_finished(folder, trial, "--trial")
    if found.is_zero_shot:
        raise UsageError(Problem("--trial", f"must be a training of {folder}", "the zero-shot model"))
    recipe = recipe_for_use(found.folder, found.base, command, trust_paths=trust_paths)
    kept = found.provenance
    inputs = sets_of_study(found.folder, recipe, kept) if with_sets else start_of_study(recipe, kept)
    return open_run(found.folder, found.row, recipe, f"{found.folder.name}/{found.name}", inputs, kept)


def folder_of_models(place: Place) -> Path:
    """Returns the folder of a study with its weights.

    Raises:
        UsageError: It is an export.
    """
    folder = fetched(place, MODELS)
    if (folder / HEAD_NAME).is_file():
        step = "Other libraries read an export (see its README.md); give the study or training that it was made from."
        rule = "must be a study or the folder of a training"
        raise UsageError(Problem(str(folder), rule, "an export", next_step=step))
    return folder


def start_of_study(recipe: Recipe, kept: Mapping[str, Any]) -> Start:
    """Opens model and prompts, and compares them with those of the study. No image is opened.

    A training set that cannot be listed has the classes that the study has noted; the log of this process says so.

    Args:
        recipe: The recipe of the study.
        kept: Its provenance.

    Raises:
        DataError: Weights, classes or prompts are not those of the study.
        RecipeError: As ``load_clip``.
    """
    try:
        classes = class_folders(recipe)
        names = class_words(recipe, classes)
    except DataError as error:
        if not kept.get("classes"):
            raise
        classes, names = tuple(kept["classes"]), tuple(kept["class_names"])
        _log.warning("The classes are those that the study has noted: %s", str(error.problems[0]).splitlines()[0])
    start = Start(load_clip(recipe.model), names, templates(recipe.prompts))
    _require_same(kept, start_of(recipe, start, classes))
    return start


def sets_of_study(study_dir: Path, recipe: Recipe, kept: Mapping[str, Any]) -> SharedInputs:
    """Opens what the trainings of a study share, and compares it with what the study was made of.

    The images of the training set are listed and not read, so their classes alone are compared.

    Args:
        study_dir: The study directory.
        recipe: The recipe of the study.
        kept: Its provenance.

    Raises:
        DataError: Weights, classes, prompts or validation images are not those of the study; names what differs.
        RecipeError: As ``load_shared_inputs``.
    """
    recipe = without_shared(recipe, read_shared(study_dir))
    inputs = load_shared_inputs(recipe)

    def changed(name: str) -> list[str]:
        images = images_of(inputs.sources[name])
        if not isinstance(images, StoredSource):
            return []
        return changed_images(study_dir / PREPARED, name, images, records(images, cache_dir(recipe)).hashes())

    found = start_of(recipe, inputs, inputs.train.class_names)
    found["data"] = set_contents(recipe, inputs, lambda name: name != TRAIN)
    _require_same(kept, found, changed)
    return inputs


def _require_same(kept: Mapping[str, Any], *found: Any) -> None:
    if not kept.get("data"):
        _log.warning("The study has not noted what it was made of: weights, classes and images are not compared")
        return
    require_same(kept, *found)


def open_run(folder: Path, row: TrialRow, recipe: Recipe, name: str, inputs: Start, kept: Mapping[str, Any]) -> Trained:
    """Opens a complete training of a study.

    Args:
        folder: The study directory, absolute.
        row: The training; of a Pareto search at its point of the front.
        recipe: The recipe; its paths absolute.
        name: For people.
        inputs: What the trainings of the study start from.
        kept: The provenance of the study.

    Raises:
        StorageError: Its weights are gone, or something in it is damaged.
    """
    require_weights(folder, row, recipe)
    result = placed(result_of(folder, row), row)
    recipe = apply(recipe, result["train"])
    head = load_tensors(files.inside(folder, f"{PREPARED}/{HEADS}"))["class_head"]
    weights, shared = load_tensors(file_of(folder, row, WEIGHTS)), tuple(shared_lines(read_shared(folder)))
    sets = partial(sets_of_study, folder, recipe, kept)
    return Trained(name, recipe, result, inputs, head, weights, sets, shared)


def require_weights(study_dir: Path, row: TrialRow, recipe: Recipe) -> None:
    """Raises a ``StorageError``, with the command to train it again, when a training has lost its weights."""
    if (row.place(study_dir) / WEIGHTS).exists():
        return
    rule = (
        f"its weights were removed: a study keeps those of its best {counted(recipe.search.keep_checkpoints, 'trial')}"
    )
    folder, trust = shlex.quote(named(study_dir)), trust_word(recipe)
    step = f"Train it again: carft-ray reproduce {folder} {row.called} --out DIR{trust}"
    step += "\n    A larger search.keep_checkpoints keeps more next time."
    raise StorageError(Problem(str(row.folder(study_dir)), rule, next_step=step))


def evaluate_trained(
    trained: Trained, alpha: float, zero_shot_head: bool = False
) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    """Returns the metrics on the validation sets, and per set ``set_metrics`` with the name of the worst class.

    Args:
        trained: The training.
        alpha: Mixing coefficient.
        zero_shot_head: Score with the class head of the prompts instead of the mixed one.

    Raises:
        DataError: As ``sets_of_study``.
    """
    inputs = trained.inputs if isinstance(trained.inputs, SharedInputs) else trained.sets()
    recipe, classifier = trained.recipe, trained.classifier(alpha)
    if zero_shot_head:
        classifier.class_head.data.copy_(inputs.clip.logit_scale * trained.class_head_CD)
        if classifier.class_bias is not None:
            classifier.class_bias.data.zero_()
    table = predict_all(classifier, inputs.validation, alpha, recipe.evaluate.batch_size, RunContext())
    by_set = {}
    for image_set in inputs.validation:
        found = set_metrics(answers(select(table, image_set.name, alpha)))
        name = inputs.class_names[found["worst_class"]["index"]]
        by_set[image_set.name] = {**found, "worst_class": {"name": name, **found["worst_class"]}}
    return metrics_at(table, objective_spec(recipe), alpha), by_set
