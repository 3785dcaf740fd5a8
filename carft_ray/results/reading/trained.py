"""A finished training, opened again: from the folder of `train`, or the best trial of a study."""

import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from carft_ray import files
from carft_ray.data.shared.shared_images import read_shared, shared_lines, without_shared
from carft_ray.errors import NoSuccessfulTrialError, Problem, StorageError, UsageError, nearest
from carft_ray.evaluation.evaluate import metrics_at, predict_all
from carft_ray.evaluation.metrics import answers, set_metrics
from carft_ray.evaluation.objective import objective_spec
from carft_ray.evaluation.predictions import select
from carft_ray.evaluation.shared_inputs import SharedInputs, load_shared_inputs
from carft_ray.evaluation.training import device_of
from carft_ray.layout import HEADS, JOURNAL, MANIFEST, PREPARED, RESOLVED, RESULT, WEIGHTS
from carft_ray.learning.checkpoint import load_tensors
from carft_ray.learning.classifier import ImageClassifier, build_classifier
from carft_ray.learning.context import RunContext
from carft_ray.learning.mixing import clean_views, load_mixture
from carft_ray.recipe.schema import Recipe
from carft_ray.recipe.spaces.space import apply
from carft_ray.results.pareto import placed
from carft_ray.results.reading.overview import find_row
from carft_ray.study.rows import baselines, best_row, require_finished, trials
from carft_ray.words import counted

HEAD_NAME = "class_head.safetensors"  # of an export


@dataclass(frozen=True, eq=False)
class Trained:
    """A finished training.

    Attributes:
        name: Folder of the training, or study and trial.
        recipe: With the values of this training in ``train``; all paths absolute.
        result: Content of its ``result.json``; a trial of a Pareto search stands at its point of the front.
        inputs: Model, prompts and sets.
        class_head_CD: Zero-shot head, unit rows [C, D].
        fine_tuned: State at alpha 1.
        shared: What was done with images that stand in two roles (``shared_images.shared_lines``).
    """

    name: str
    recipe: Recipe
    result: dict[str, Any]
    inputs: SharedInputs
    class_head_CD: Tensor
    fine_tuned: dict[str, Tensor]
    shared: tuple[str, ...] = ()

    def classifier(self, alpha: float) -> ImageClassifier:
        """Returns the model mixed at ``alpha``, in eval mode, on the device of the recipe.

        With ``recalibrate_batches`` it has the statistics that its training found for it.
        """
        recipe, device = self.recipe, device_of(self.recipe)
        torch.set_num_threads(recipe.resources.threads_per_worker)
        classifier = build_classifier(self.inputs.clip, self.class_head_CD, recipe.train, device)
        views_NHWC = clean_views(self.inputs.clip, self.inputs.train, recipe.train.recalibrate_batches)
        load_mixture(classifier, classifier.state(), self.fine_tuned, alpha, views_NHWC)
        return classifier.eval()


def open_trained(folder: Path, trial: str | None = None) -> Trained:
    """Opens the folder of a `train` or a study.

    Args:
        folder: What `train --out` or `search --study` was given.
        trial: Number or name of a trial of the study, or name of a baseline; None: the best one.

    Raises:
        UsageError: The folder is neither, or the trial does not exist.
        NoSuccessfulTrialError: The study has no finished trial, or the training is not finished.
        StorageError: Something in it is damaged.
    """
    folder = folder.resolve()
    if not (folder / MANIFEST).is_file():
        rule = "must be a folder that `train --out` or `search --study` has made"
        value = "one without manifest.json" if folder.is_dir() else "a file" if folder.exists() else "no such folder"
        step = ""
        if (folder / HEAD_NAME).is_file():
            step = "An export is read by other libraries (its README.md); give the study or training that it is of."
        raise UsageError(Problem(str(folder), rule, value, next_step=step))
    try:
        recipe = Recipe.model_validate(files.read_json(folder / MANIFEST)["recipe"])
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(Problem(str(folder / MANIFEST), "must be a manifest", str(error))) from error
    run_dir, name, row = folder, folder.name, None
    if (folder / JOURNAL).exists():
        rows = trials(folder)
        row = find_row([*rows, *baselines(folder)], trial, "--trial") if trial else best_row(rows)
        name = require_finished(folder, row).name
        run_dir = _trial_dir(folder, name)
        row = next((each for each in rows if each.name == name), None)
    elif trial is not None:
        step = "Leave --trial out, or give the folder of a study."
        raise UsageError(Problem("--trial", "needs a study", f"the folder of one training, {folder}", next_step=step))
    if not (run_dir / RESULT).is_file():
        step = "Finish it first: the same `carft-ray train` command again, with --resume."
        if run_dir != folder:
            step = f"Go on with the search: carft-ray resume {shlex.quote(str(folder))}"
        raise NoSuccessfulTrialError(
            Problem(str(run_dir), "must be a finished training", "an unfinished or failed one", next_step=step)
        )
    trained = open_run(folder, run_dir, recipe, name if run_dir == folder else f"{folder.name}/{name}")
    return replace(trained, result=placed(trained.result, row))


def open_run(folder: Path, run_dir: Path, recipe: Recipe, name: str) -> Trained:
    """Opens one finished training of a study, or that of `train` (``run_dir`` is then ``folder``).

    Args:
        folder: The study directory, or the folder of the training; absolute.
        run_dir: Folder of the training, with its result.
        recipe: The recipe; its paths absolute.
        name: For people.

    Raises:
        StorageError: Its weights are gone, or something in it is damaged.
    """
    result = files.read_json(run_dir / RESULT)
    if run_dir != folder:
        require_weights(folder, run_dir, recipe)
    recipe = apply(recipe, result["train"])
    heads = load_tensors(folder / PREPARED / HEADS)
    shared = read_shared(folder)
    return Trained(
        name,
        recipe,
        result,
        load_shared_inputs(without_shared(recipe, shared)),
        heads["class_head"],
        load_tensors(run_dir / WEIGHTS),
        tuple(shared_lines(shared)),
    )


def require_weights(study_dir: Path, run_dir: Path, recipe: Recipe) -> None:
    """Raises a ``StorageError``, with the command to train it again, when a training has lost its weights."""
    if not (run_dir / WEIGHTS).exists():
        raise StorageError(_weights_gone(study_dir, run_dir, recipe, files.read_json(run_dir / RESULT)["train"]))


def _weights_gone(study_dir: Path, run_dir: Path, recipe: Recipe, values: dict[str, Any]) -> Problem:
    """Returns the message for a trial of which the search has kept the results only, with the command to repeat it."""
    base = recipe.train.model_dump(mode="json")
    settings = [f"train.{key}={json.dumps(value)}" for key, value in values.items() if base.get(key) != value]
    command = ["carft-ray", "train", str(study_dir / RESOLVED)]
    command += [word for setting in settings for word in ("--set", setting)]
    command += ["--out", str(study_dir.with_name(f"{study_dir.name}-{run_dir.name}"))]
    rule = f"its weights are gone: a study keeps those of its best {counted(recipe.search.keep_checkpoints, 'trial')}"
    step = f"Train it again: {shlex.join(command)}"
    return Problem(str(run_dir), rule, next_step=f"{step}\n    A larger search.keep_checkpoints keeps more next time.")


def _trial_dir(study_dir: Path, name: str) -> Path:
    """Returns the folder of a trial or baseline."""
    found = {path.name: path for kind in ("baselines", "trials") for path in sorted((study_dir / kind).glob("*/"))}
    if name not in found:
        allowed = tuple(found)
        raise UsageError(Problem("--trial", f"must be a trial of {study_dir}", name, allowed, nearest(name, allowed)))
    return found[name]


def evaluate_trained(trained: Trained, alpha: float, zero_shot_head: bool = False) -> dict[str, float]:
    """Returns the metrics on the validation sets at ``alpha``.

    Args:
        trained: The training.
        alpha: Mixing coefficient.
        zero_shot_head: Score with the class head of the prompts instead of the mixed one.
    """
    return metrics_at(_predict(trained, alpha, zero_shot_head), objective_spec(trained.recipe), alpha)


def evaluate_by_set(
    trained: Trained, alpha: float, zero_shot_head: bool = False
) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    """Returns what ``evaluate_trained`` does, and per set ``set_metrics`` with the name of the worst class."""
    table, by_set = _predict(trained, alpha, zero_shot_head), {}
    for image_set in trained.inputs.validation:
        found = set_metrics(answers(select(table, image_set.name, alpha)))
        name = trained.inputs.class_names[found["worst_class"]["index"]]
        by_set[image_set.name] = {**found, "worst_class": {"name": name, **found["worst_class"]}}
    return metrics_at(table, objective_spec(trained.recipe), alpha), by_set


def _predict(trained: Trained, alpha: float, zero_shot_head: bool) -> pa.Table:
    recipe, sets = trained.recipe, trained.inputs.validation
    classifier = trained.classifier(alpha)
    if zero_shot_head:
        start = build_classifier(trained.inputs.clip, trained.class_head_CD, recipe.train, torch.device("cpu"))
        classifier.class_head.data.copy_(start.class_head.data)
        if classifier.class_bias is not None:
            classifier.class_bias.data.zero_()
    return predict_all(classifier, sets, alpha, recipe.evaluate.batch_size, RunContext())
