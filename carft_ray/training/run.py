"""One training from recipe to ``result.json``: what `train`, a trial and a baseline all run.

    out_dir/attempt-N/{step-00000024/, fine_tuned.safetensors,
                       predictions/{validation.parquet, thumbnails.parquet}, result.json}

``result.json`` is written last: a training is finished when this file exists. An attempt continues from what those
before it have left, and writes below its own folder alone. Only ``train``, ``id_val`` and
``ood_val`` are opened; the test roles are not even built.
"""

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from carft_ray import files, layout
from carft_ray.data.same_as_study import differences_of, require_same
from carft_ray.data.source import ImageSet
from carft_ray.data.views import VIEW_VERSION
from carft_ray.errors import MachineError, RecipeError
from carft_ray.evaluation.alpha_curve import (
    At,
    alphas_at_chance,
    choose_point,
    curve_points,
    is_at_chance,
    limits,
    measure_curve,
    point_at,
)
from carft_ray.evaluation.objective import Metrics, metrics_at, objective_spec
from carft_ray.evaluation.predictions import FORMAT_VERSION as PREDICTIONS_VERSION
from carft_ray.evaluation.predictions import concat, read_predictions, select, write_predictions
from carft_ray.model.classifier import build_classifier
from carft_ray.model.device import device_of, gpu_names, precision_words, set_up
from carft_ray.model.heads import cached_heads
from carft_ray.model.tower import compiles, recipe_problems
from carft_ray.recipe.schedule import has_intermediate_value
from carft_ray.recipe.schema.recipe import Recipe, without_tests
from carft_ray.store.attempt_files import left, write_result
from carft_ray.training.checkpoint import load_tensors, save_tensors
from carft_ray.training.evaluate import Mixtures, predict_all, subset
from carft_ray.training.loop import fine_tune
from carft_ray.training.origin import shared_origin, start_of, training_environment
from carft_ray.training.out_of_memory import explained_shortage, free_device, micro_batch_of
from carft_ray.training.own_function import OwnFunction, on_node, source_of
from carft_ray.training.own_training import own_fine_tune
from carft_ray.training.ranks import from_rank_0, on_all_ranks
from carft_ray.training.run_context import RunContext
from carft_ray.training.shared_inputs import SharedInputs, load_shared_inputs, shared_inputs_of_worker, target_store
from carft_ray.training.thumbnails import write_thumbnails

# The intermediate value of a training is the best of these: alpha 1 alone said nothing of the end (measured: rank
# correlation -.2 with the final objective over alpha), and alpha 0 is the same for all.
_LIVE_ALPHAS = (0.25, 0.5, 0.75, 1.0)

logger = logging.getLogger(__name__)


def live_alphas(recipe: Recipe) -> tuple[float, ...]:
    """Returns the alphas at which a training is measured while it runs: of those that it may choose, at least one."""
    if recipe.train.alpha is not None:
        return (recipe.train.alpha,)
    return tuple(alpha for alpha in _LIVE_ALPHAS if alpha >= recipe.search.alpha.lowest)


def prepare(
    recipe: Recipe,
    folder: Path,
    on_progress: Callable[[str], None] | None = None,
    made_of: Mapping[str, Any] = MappingProxyType({}),
    opened: SharedInputs | None = None,
) -> dict[str, Any]:
    """Does once what all trainings of a study share: decoded sets, heads, zero-shot predictions.

    Args:
        recipe: The study's recipe.
        folder: Where it is kept; when it is there and belongs to the same model, data and prompts, it is used.
        on_progress: Called with what is being done.
        made_of: What the study was made of (``data.same_as_study``); empty for a new one.
        opened: Model and sets to use instead of the recipe's whole ones; their ``provenance`` is left out.

    Returns:
        Zero-shot metrics (``id_accuracy``, ``ood_accuracy``, ``accuracy/<set>``, ``objective``), ``at_chance`` of the
        answers to the ID images, ``num_images`` per set, ``logit_scale``, ``num_contexts``, and ``provenance`` for the
        log (``training.origin``).

    Raises:
        RecipeError: The image tower cannot do what the recipe asks of it.
        DataError: Something is not as the study was made of; nothing is written.
        CarftError: As its message says.
    """
    say = on_progress or logger.info
    set_up(recipe)
    say("opening model and sets")
    inputs = opened or load_shared_inputs(recipe, prepared_dir=folder)
    if problems := recipe_problems(inputs.clip.model.visual, recipe):  # type: ignore[arg-type]  # open_clip is untyped
        raise RecipeError(problems)
    # those of an older version are made anew
    key = f"predictions {PREDICTIONS_VERSION}, views {VIEW_VERSION}: {inputs.key}"
    content: dict[str, Any] = {}
    with contextlib.suppress(OSError):
        content = files.read_object(folder, layout.PREPARATION) or {}
    is_kept, clip, device = content.get("key") == key, inputs.clip, device_of(recipe)
    # decided once for a study
    compiled = content["compile"] if "compile" in content else compiles(recipe.train, len(inputs.train), device)
    if is_kept:
        origin = content["provenance"]
    else:
        origin = shared_origin(recipe, inputs, device, compiled) if opened is None else {}
    require_same(made_of, origin)
    if not is_kept:
        heads = cached_heads(recipe, clip, inputs.class_names, inputs.templates, device, say)
        with files.new_file(folder / layout.HEADS) as temporary:
            save_tensors(temporary, heads)
        if words := precision_words(recipe.train, device):
            logger.warning("train.precision: %s", words)
        say("evaluating zero-shot")
        classifier = build_classifier(clip, heads["class_head"], recipe.train, device)
        table = predict_all(classifier, inputs.validation, 0.0, recipe.evaluate.batch_size, RunContext())
        write_predictions(folder / layout.ZERO_SHOT_TABLE, table)
        content = {
            "key": key,
            "metrics": metrics_at(table, objective_spec(recipe), 0.0),
            "at_chance": is_at_chance(select(table, objective_spec(recipe).id_set, 0.0)),
            "num_images": inputs.num_images,
            "logit_scale": clip.logit_scale,
            "num_contexts": len(inputs.templates),
            "compile": compiled,
            "provenance": origin,
        }
        files.write_json(folder / layout.PREPARATION, content)
    provenance = {**origin, "hardware": {"gpus": gpu_names()}}
    others = {k: v for k, v in content.items() if k not in ("key", "metrics", "compile")}
    return {**content["metrics"], **others, "provenance": provenance}


def run_training(
    recipe: Recipe,
    out_dir: Path,
    prepared_dir: Path,
    context: RunContext,
    attempt: int = 1,
    opened: SharedInputs | None = None,
    function: OwnFunction | None = None,
) -> dict[str, Any]:
    """Fine-tunes, makes the alpha curve on the validation sets, and returns the content of ``result.json``.

    Called on every worker. Continues from the weights of an earlier attempt, or from the newest valid checkpoint.

    Args:
        recipe: ``recipe.train`` holds the values of this training.
        out_dir: Folder of this training, shared by its workers.
        prepared_dir: What ``prepare`` made.
        context: Rank, reports and stop flag.
        attempt: Number of this attempt, which no other one of this training has.
        opened: Model and sets to use instead of the recipe's whole ones.
        function: What ``train.function`` names; None: it is imported.

    Raises:
        StoppedRun: Stopped on request, after a checkpoint; before the first step, without one.
        DivergedError: The loss is not finite, or the ID accuracy is at most chance at every alpha above 0.
        OutOfMemoryError: The device has no memory for the micro-batch; in an evaluation, for a single image or for the
            weights that are mixed.
        MachineError: A rank does not see the files from which rank 0 resumes; or this machine has other weights,
            classes or prompts than the preparation.
        CarftError: As its message says.
    """
    trained = from_rank_0(context, lambda: [str(path.relative_to(out_dir)) for path in left(out_dir, layout.WEIGHTS)])
    started = time.perf_counter()
    training = open_training(recipe, out_dir, prepared_dir, context, attempt, opened)
    store = target_store(recipe, training.inputs, training.heads["context_head"], device_of(recipe))
    if recipe.train.function is not None:
        function = function or on_node(recipe.train.function, recipe.train.function_dir)
        recipe = without_tests(recipe)
    training = replace(training, recipe=recipe, store=store, function=function)
    # by an earlier attempt: only the curve is left
    fine_tuned = (
        on_all_ranks(context, lambda: load_tensors(out_dir / trained[-1])) if trained else _train(training, attempt)
    )
    return finish(training, fine_tuned, prepared_dir, started)


def open_training(
    recipe: Recipe,
    out_dir: Path,
    prepared_dir: Path,
    context: RunContext,
    attempt: int,
    opened: SharedInputs | None = None,
) -> "Training":
    """Opens what a training needs, but for targets and a function of the user's; arguments and errors as above."""
    set_up(recipe)
    inputs = opened or shared_inputs_of_worker(recipe, context, prepared_dir)
    if opened is None:
        _require_prepared(recipe, inputs, prepared_dir)
    heads = load_tensors(prepared_dir / layout.HEADS)
    mixtures = Mixtures(inputs.clip, heads["class_head"], recipe.train, device_of(recipe))
    place, compiled = out_dir / f"{layout.ATTEMPT}{attempt}", is_compiled(recipe, prepared_dir)
    return Training(recipe, inputs, heads, out_dir, place, context, mixtures, compiled)


def finish(
    training: "Training", fine_tuned: dict[str, Tensor], prepared_dir: Path, started: float, **more: Any
) -> dict[str, Any]:
    """Writes the weights, measures the alpha curve, and writes the result, which it returns.

    Args:
        training: The training.
        fine_tuned: Its state at alpha 1.
        prepared_dir: What ``prepare`` made.
        started: Of ``time.perf_counter``.
        more: Further parts of the result.
    """
    recipe, context, place = training.recipe, training.context, training.place
    if context.rank == 0:
        with files.new_file(place / layout.WEIGHTS) as temporary:
            save_tensors(temporary, fine_tuned)
    result = _evaluate(training, fine_tuned, prepared_dir)
    result |= {
        "elapsed_s": round(time.perf_counter() - started, 3),
        "environment": training_environment(device_of(recipe), context.world_size, training.is_compiled),
        **more,
    }
    if training.function is not None:
        result["environment"]["function_source"] = source_of(training.function)
    if context.rank == 0:
        result = write_result(place, result)
    return result


def _require_prepared(recipe: Recipe, inputs: SharedInputs, prepared_dir: Path) -> None:
    """Raises a ``MachineError`` if this machine has loaded another model, classes or prompts than were prepared."""
    kept = (files.read_object(prepared_dir, layout.PREPARATION) or {}).get("provenance", {})
    found = start_of(recipe, inputs, inputs.train.class_names)
    if problems := differences_of(kept, found):
        raise MachineError(problems)


def is_compiled(recipe: Recipe, prepared_dir: Path) -> bool:
    """Returns whether trainings compile their image tower; with ``compile: auto``, what the preparation has decided."""
    if recipe.train.compile != "auto":
        return recipe.train.compile
    return bool(files.read_json(prepared_dir, layout.PREPARATION).get("compile", False))


@dataclass(frozen=True, eq=False)
class Training:
    """What the parts of one training share in one of its workers."""

    recipe: Recipe
    inputs: SharedInputs
    heads: dict[str, Tensor]
    out_dir: Path
    place: Path
    context: RunContext
    mixtures: Mixtures
    is_compiled: bool
    store: Path | None = None
    function: OwnFunction | None = None

    @contextlib.contextmanager
    def looks(self, state: Callable[[], dict[str, Tensor]], sets: Sequence[ImageSet]) -> Iterator[At]:
        """Gives what makes the predictions for ``sets`` at an alpha, between zero-shot and the state."""
        batch_size = self.recipe.evaluate.batch_size
        with self.mixtures.between(state) as mixed:
            yield lambda alpha: predict_all(mixed(alpha), sets, alpha, batch_size, self.context)


def _evaluate(training: Training, fine_tuned: dict[str, Tensor], prepared_dir: Path) -> dict[str, Any]:
    """Makes the alpha curve and writes its predictions; returns the part of the result that they give."""
    recipe, inputs, spec = training.recipe, training.inputs, objective_spec(training.recipe)
    references, start = training.context.references, prepared_dir / layout.ZERO_SHOT_TABLE
    bounds = limits(recipe.search.constraints, references)
    free_device()  # of what the training held
    with training.looks(lambda: fine_tuned, inputs.validation) as at:
        tables = measure_curve(recipe, read_predictions(start), at)
    table, curve = concat(list(tables.values())), curve_points(tables, spec, bounds)
    at_chance = alphas_at_chance(tables, spec.id_set)
    fixed = None if recipe.train.alpha is None else point_at(curve, recipe.train.alpha)
    metrics = dict(fixed or choose_point(curve, recipe.search.alpha.lowest))
    alpha = metrics.pop("alpha")
    if training.context.rank == 0:
        write_predictions(training.place / layout.PREDICTIONS, table)
        pictures = training.place / layout.THUMBNAILS
        write_thumbnails(pictures, table, alpha, inputs.validation, recipe.evaluate.thumbnails)
    return {
        "objective": metrics["objective"],
        "alpha": alpha,
        "metrics": metrics,
        "curve": curve,
        "at_chance": 1.0 in at_chance,
        "train": recipe.train.model_dump(mode="json"),
        "num_images": inputs.num_images,
        **({"references": dict(references)} if bounds else {}),
    }


def _train(training: Training, attempt: int) -> dict[str, Tensor]:
    """Trains from the newest checkpoint; returns the fine-tuned state."""
    recipe, inputs, heads, context = training.recipe, training.inputs, training.heads, training.context
    small = [subset(image_set, recipe.evaluate.subset) for image_set in inputs.validation]
    spec, every, pruner = objective_spec(recipe), recipe.evaluate.every_epochs, recipe.search.pruner
    alphas = live_alphas(recipe)

    def on_epoch(state: Callable[[], dict[str, Tensor]], epoch: int) -> Metrics:
        if not has_intermediate_value(every, pruner, epoch, recipe.train.epochs):
            return {}
        with training.looks(state, small) as at:
            found = [{"alpha": alpha, **metrics_at(at(alpha), spec, alpha)} for alpha in alphas]
        best = max(found, key=lambda metrics: metrics["objective"])
        return {f"subset/{name}": value for name, value in best.items() if "/" not in name}

    device = device_of(recipe)
    train = recipe.train.model_copy(update={"compile": training.is_compiled})  # resolved
    if training.function is not None:
        kept = training.place / layout.OWN
        is_first = context.rank == 0 or context.keeps_files
        on_all_ranks(context, lambda: _take_over(training.out_dir, kept) if is_first else None)
        return own_fine_tune(training.function, train, inputs, heads["class_head"], context, device, kept, on_epoch)
    micro_batch = micro_batch_of(recipe.train, context.world_size)
    with explained_shortage("training", micro_batch, inputs.clip.image_size, device, micro_batch):
        return fine_tune(
            inputs.clip,
            heads["class_head"],
            heads["context_head"],
            inputs.train,
            train,
            context,
            device=device,
            checkpoint_dir=training.out_dir,
            attempt=attempt,
            target_store=training.store,
            on_epoch=on_epoch,
            num_threads=recipe.resources.threads_per_worker,
        )


def _take_over(out_dir: Path, own: Path) -> None:
    """Copies what the attempt before has kept of a fine-tuning of the user's own; that of older ones goes."""
    before = left(out_dir, layout.OWN)

    def copy(source: str, target: str) -> None:
        with files.writing(Path(target)):  # else ``copytree`` makes an error without a number of it
            shutil.copy2(source, target)
            files.fsync_file(Path(target))

    if before and before[-1] != own:
        with files.new_folder(own) as temporary:
            shutil.copytree(before[-1], temporary, symlinks=True, dirs_exist_ok=True, copy_function=copy)
    for older in before[:-1]:
        shutil.rmtree(older, ignore_errors=True)
