"""Everything that can be wrong with a recipe, its data and its model, checked before a GPU is taken.

Sets are read image by image (test sets are counted and hashed only), the model is loaded, prompts are tokenized, and
the zero-shot model is measured on ``id_val`` and on each OOD validation set, side by side: that shows whether a set is
a shift at all, and whether class words and preprocessing are right.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from carft_ray import environment
from carft_ray.data.cache import cache_dir
from carft_ray.data.class_names import class_folders, class_names
from carft_ray.data.duplicates.find_duplicates import SharedRow, Sources, shared_pairs
from carft_ray.data.duplicates.shared_images import decide, shared_lines, without_shared
from carft_ray.data.listing import StoredSource
from carft_ray.data.records import IMBALANCE, NUM_EXAMPLES, class_counts, image_facts, records, same_words
from carft_ray.data.role_checks import check_roles, check_sets
from carft_ray.data.selection import stored_source
from carft_ray.data.sets import list_set, open_source, plain_place, reader_of
from carft_ray.data.source import Source
from carft_ray.errors import CarftError, Problem
from carft_ray.evaluation.metrics import chance, is_above_chance, wilson
from carft_ray.evaluation.predictions import accuracy
from carft_ray.model.catalog import check_model, model_warnings
from carft_ray.model.classifier import build_classifier
from carft_ray.model.clip import Clip, load_clip
from carft_ray.model.device import device_of, precision_words, set_up
from carft_ray.model.heads import Say, cached_heads, templates
from carft_ray.model.tower import num_trained, recipe_problems, training_bytes
from carft_ray.recipe.rules import named_sets, warnings
from carft_ray.recipe.schema.data import TEST_ROLES, SetSpec, StoredSet
from carft_ray.recipe.schema.recipe import Recipe, with_threads
from carft_ray.recipe.written import KeyPath, dotted
from carft_ray.training.car_ft_loss import context_distribution, context_entropy
from carft_ray.training.evaluate import predict, subset, usual_batch
from carft_ray.training.memory import micro_batch_to_begin_with
from carft_ray.training.out_of_memory import in_batches
from carft_ray.training.run_context import RunContext
from carft_ray.training.shared_inputs import SharedInputs, load_shared_inputs
from carft_ray.words import time_left

Level = Literal["error", "warning", "note"]

FEW_CONTEXTS = 1.5  # exp(entropy) of the context distribution under which the KL term does next to nothing
TRY_FIRST = (
    "Try first: prompts.class_names (words that a caption would have; in the order of the labels, which is that of the "
    "class folders), prompts.templates (sentences that fit the images), and model.name (the activation of the weights)."
)
NUM_IMAGES = 200  # of each validation set, on which zero-shot is measured: within 7 points of all of them


@dataclass(frozen=True)
class Finding:
    """One thing to know.

    Attributes:
        level: ``error``: a search would fail or mean nothing; ``warning``: check it; ``note``: good to know.
        problem: Place, what, and what to do.
    """

    level: Level
    problem: Problem


@dataclass
class Diagnosis:
    """What the doctor found.

    Attributes:
        findings: In the order in which they were found.
        sets: Key path -> what was found in the set; of a set that cannot be opened there is nothing.
        zero_shot: Set -> ``accuracy`` and ``num_images`` of the zero-shot model.
        model: Size and text side of the model; empty when it cannot be loaded.
        machine: ``device``, free disk and memory, versions.
        pairs: Images that are in two roles, and their sets; None where that was not checked.
    """

    findings: list[Finding] = field(default_factory=list)
    sets: dict[str, dict[str, Any]] = field(default_factory=dict)
    zero_shot: dict[str, dict[str, float]] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    pairs: tuple[list[SharedRow], Sources] | None = None

    def add(self, level: Level, place: str, rule: str, value: str = "", next_step: str = "") -> None:
        """Adds a finding."""
        self.findings.append(Finding(level, Problem(place, rule, value, next_step=next_step)))

    def fail(self, problems: Sequence[Problem]) -> None:
        """Adds errors, each once."""
        self.findings += [Finding("error", problem) for problem in problems if problem not in self.errors]

    @property
    def errors(self) -> list[Problem]:
        """The problems of level error."""
        return [finding.problem for finding in self.findings if finding.level == "error"]


OnImage = Callable[[int, int], None]
Heads = Mapping[str, torch.Tensor]


def examine(
    recipe: Recipe,
    num_images: int = NUM_IMAGES,
    quick: bool = False,
    say: Say = lambda text: None,
    progress: Callable[[str], OnImage] = lambda what: lambda done, total: None,
    memory_gb: float | None = None,
) -> Diagnosis:
    """Checks everything, and continues as far as it can after a problem. Test sets are counted and hashed only.

    Args:
        recipe: A valid recipe.
        num_images: Images of each validation set on which the zero-shot model is measured, by a hash of the sample id.
        quick: Read no image: lists, model and prompts only.
        say: Called with what is being done.
        progress: Given what is read, returns a callback for (images done, images in all).
        memory_gb: Memory of the GPU for which a micro-batch is proposed; None: that of this machine's, if it has one.
    """
    say("checking the machine")
    found = look_around(recipe)
    found.fail(check_roles(recipe))
    has_cache = not any(problem.place == "data.cache_dir" for problem in found.errors)
    cache = cache_dir(recipe) if has_cache and not quick else None  # what the images show is kept there
    for path, spec in named_sets(recipe).items():
        say(f"{'listing' if cache is None else 'reading'} {dotted(path)}")
        _check_set(recipe, path, spec, cache, found, progress(dotted(path)))
    try:
        if cache is not None and not found.errors:
            say("comparing the images of the roles")
            found.pairs = shared_pairs(recipe, cache, say)
            rows = decide(recipe, *found.pairs)
            for line in shared_lines(rows):
                found.add("note", "", line)
            recipe = without_shared(recipe, rows)
        if found.errors:
            say("the model is not checked: correct the errors first")
            return found
        say("opening the model")
        _check_model(recipe, num_images, quick, found, say, memory_gb)
    except CarftError as error:
        found.fail(error.problems)
    return found


def look_around(recipe: Recipe) -> Diagnosis:
    """Checks what may differ between machines: the model's files, the listings of the sets, and the machine itself.

    Args:
        recipe: A valid recipe.
    """
    found = Diagnosis()
    for text in (*warnings(recipe), *model_warnings(recipe.model)):
        found.add("warning", "", text)
    found.fail([*check_model(recipe.model), *check_sets(recipe)])
    _check_machine(recipe, found)
    return found


def _check_machine(recipe: Recipe, found: Diagnosis) -> None:
    cache = cache_dir(recipe)
    there = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    found.machine = {
        "device": str(device_of(recipe)),
        "gpus": torch.cuda.device_count(),
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 1e9, 1),
        "cache_dir": str(cache),
        "cache_free_gb": round(shutil.disk_usage(there).free / 1e9, 1),
        "versions": environment.versions(),
        "source": environment.source_digest(),
    }
    try:
        cache.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache).close()  # a system may forbid what the rights of a folder allow
    except OSError as error:
        rule, step = "must be a writable folder", "Name another one in data.cache_dir."
        found.add("error", "data.cache_dir", rule, f"{cache}: {error.strerror}", step)


def _check_set(
    recipe: Recipe, path: KeyPath, spec: SetSpec, cache: Path | None, found: Diagnosis, on_image: OnImage
) -> None:
    """Checks one set; without ``cache`` its images are not read."""
    place, role, named, expected = dotted(path), str(path[1]), plain_place(path, spec), None
    try:
        classes = class_folders(recipe)
        if isinstance(spec, StoredSet):  # images that cannot be decoded are counted, not left out
            expected = reader_of(spec).num_expected(spec)
            source: Source = stored_source(list_set(spec, named), spec, classes, named)
        else:
            source = open_source(spec, named, classes, cache)
        found.sets[place] = {**class_counts(source), "num_expected": expected}
        _judge_classes(place, role, found.sets[place], len(source.class_names), found)
        if isinstance(spec, StoredSet) and isinstance(source, StoredSource) and cache is not None:
            found.sets[place] |= image_facts(source, records(source, cache, role in TEST_ROLES, on_image))
            _judge_images(place, spec.on_bad_image, found.sets[place], found)
    except CarftError as error:
        found.fail(error.problems)
        return
    if expected is not None and expected != len(source):
        step = "Images are missing or do not belong to the set: download it again, or report what you used."
        found.add("warning", place, f"must have {expected:,} images", f"{len(source):,}", step)


def _judge_classes(place: str, role: str, facts: Mapping[str, Any], num_classes: int, found: Diagnosis) -> None:
    counts = facts["images_per_class"]
    value = f"{facts['num_classes']} of {num_classes}"
    if role in ("id_val", "id_test") and facts["num_classes"] < num_classes:
        found.add("note", place, "accuracy says nothing about a class without images", value)
    if role == "train" and facts["num_classes"] < num_classes:
        found.add("warning", place, "a class without images is not learned", value)
    if role == "train" and counts["max"] >= IMBALANCE * counts["min"]:
        fewest = f"{counts['min']} to {counts['max']} images, fewest of {counts['smallest_class']!r}"
        step = "Accuracy counts images: small classes have little weight."
        found.add("warning", place, f"the sizes of the classes differ widely: {fewest}", next_step=step)


def _judge_images(place: str, on_bad_image: str, facts: Mapping[str, Any], found: Diagnosis) -> None:
    if facts["unreadable"]:
        skipped = on_bad_image == "skip"
        step = "They will be skipped." if skipped else f"Repair or remove them, or write {place}.on_bad_image: skip."
        first = "; ".join(text.splitlines()[0] for text in facts["unreadable"][:NUM_EXAMPLES])
        value = f"{facts['num_unreadable']} of {facts['num_images']} that are not, such as {first}"
        found.add("warning" if skipped else "error", place, "every image must be readable", value, step)
    if facts["contradictions"]:
        value = f"the same image under two labels: {facts['contradictions'][0]}"
        found.add("warning", place, "an image must have one label", value, "Remove the one that is wrong.")
    if facts["num_twice"]:
        value = f"{facts['num_twice']} of {facts['num_images']} images that repeat an earlier one"
        found.add("note", place, "a repeated image counts more than once", value)
    if len(facts["modes"]) > 1:
        words = ", ".join(f"{count} {mode}" for mode, count in facts["modes"].items())
        found.add("note", place, f"images of several modes are converted to RGB (docs/decoding.md): {words}")


def _check_model(
    recipe: Recipe, num_images: int, quick: bool, found: Diagnosis, say: Say, memory_gb: float | None
) -> None:
    recipe = with_threads(recipe, environment.usable_cores())
    set_up(recipe)
    inputs = None if quick else load_shared_inputs(recipe)
    clip = load_clip(recipe.model) if inputs is None else inputs.clip
    words, prompts = class_names(recipe), templates(recipe.prompts)
    _judge_words(clip, words, prompts, found)
    heads = cached_heads(recipe, clip, words, prompts, device_of(recipe), say)
    visual: torch.nn.Module = clip.model.visual  # type: ignore[assignment]  # open_clip is untyped
    weights = sum(parameter.numel() for parameter in visual.parameters())
    impossible = recipe_problems(visual, recipe)
    found.fail(impossible)
    trained = weights if impossible else num_trained(visual, recipe.train)
    needed_gb = round(training_bytes(weights, trained, recipe.train) / 1e9, 2)
    if precision := precision_words(recipe.train, device_of(recipe)):
        found.add("note", "train.precision", precision)
    found.model = {
        "name": recipe.model.name,
        "weights_hash": clip.weights_hash,
        "image_size": clip.image_size,
        "logit_scale": clip.logit_scale,
        "num_classes": len(words),
        "num_contexts": len(prompts),
        "tower_weights": weights,
        "trained_weights": trained,
        "training_memory_gb": needed_gb,
    }
    if not impossible:
        found.model |= micro_batch_to_begin_with(recipe, clip, heads["class_head"], memory_gb, say)
    medians = {place: one["short_side"]["median"] for place, one in found.sets.items() if one.get("short_side")}
    small = [f"{place} {side:g}" for place, side in medians.items() if side < clip.image_size / 2]
    if small:
        rule = f"images are enlarged to the {clip.image_size} pixels of the model: median short side {', '.join(small)}"
        found.add("note", "model", rule)
    if inputs is not None:
        _measure(recipe, inputs, heads, num_images, found, say)


def _judge_words(clip: Clip, words: Sequence[str], prompts: Sequence[str], found: Diagnosis) -> None:
    for word, labels in same_words(words).items():
        rule = f"{word!r} names {len(labels)} classes, which zero-shot cannot distinguish: labels {labels}"
        found.add("note", "prompts.class_names", rule, next_step="Give them words that differ.")
    # what is cut off makes no difference: a sentence that is whole differs from itself with a word more
    longest = sorted(words, key=len)[-3:]
    sentences = [template.replace("{}", word) for template in prompts for word in longest]
    cut = [each for each in sentences if torch.equal(*clip.tokenizer([each, f"{each} x"]).unbind(0))]
    if cut:
        length = clip.tokenizer(["x"]).shape[1]
        rule = f"sentences must be shorter than the {length} tokens that the model reads"
        step = "Shorten prompts.templates or prompts.class_names."
        found.add("warning", "prompts", rule, f"{len(cut)} that are cut off, such as {cut[0]!r}", step)


def _measure(recipe: Recipe, inputs: SharedInputs, heads: Heads, num_images: int, found: Diagnosis, say: Say) -> None:
    device = device_of(recipe)
    batch_size = recipe.evaluate.batch_size or usual_batch(device)
    classifier = build_classifier(inputs.clip, heads["class_head"], recipe.train, device).eval()
    sets = [subset(image_set, num_images) for image_set in inputs.validation]
    say(f"measuring the zero-shot model on up to {num_images:,} images of each validation set")
    on_progress, done, total = time_left(say, "measuring the zero-shot model"), 0, sum(map(len, sets))
    for few in sets:
        on_progress(done, total)
        table = predict(classifier, few, 0.0, batch_size, RunContext())
        answers = table["label"].to_numpy(), table["prediction"].to_numpy()
        luck = {"chance": chance(*answers), "at_chance": not is_above_chance(*answers)}
        found.zero_shot[few.name] = {"accuracy": accuracy(table), "num_images": len(few), **luck}
        done += len(few)
    first = subset(sets[0], batch_size).images_NHWC
    with torch.inference_mode():
        parts = in_batches(
            lambda batch: classifier.features(torch.from_numpy(first[batch]).to(device)),
            np.arange(len(first)),
            batch_size,
            inputs.clip.image_size,
            device,
        )
        features_BD = torch.cat(parts)
        scale = recipe.train.context_scale or inputs.clip.logit_scale
        log_p_BT = context_distribution(features_BD, heads["context_head"].to(features_BD), scale)
        contexts = found.model["effective_contexts"] = float(context_entropy(log_p_BT).exp())
        share, largest = (float(value) for value in log_p_BT.exp().mean(dim=0).max(dim=0))
        found.model["largest_context"] = {"template": inputs.templates[int(largest)], "share": share}
    if contexts < FEW_CONTEXTS:
        rule = f"must spread over at least {FEW_CONTEXTS} contexts (exp of the entropy), or the KL term has no effect"
        step = "Use more, and more different, templates, or a lower train.context_scale."
        found.add("warning", "prompts.templates", rule, f"{contexts:.2f}", step)
    found.findings += zero_shot_findings(found.zero_shot)


def zero_shot_findings(zero_shot: Mapping[str, Mapping[str, float]]) -> list[Finding]:
    """Judges zero-shot accuracies: at chance something is wrong, and a shift should be harder than ``id_val``.

    Args:
        zero_shot: Set -> ``accuracy``, ``num_images``, ``chance`` (of the same answers in any other order) and
            ``at_chance`` (``metrics.is_above_chance`` says no); ``id_val`` is there.
    """
    id_val, findings = zero_shot["id_val"], []
    for name, one in zero_shot.items():
        number = int(one["num_images"])
        low, high = wilson(round(one["accuracy"] * number), number)
        if one["at_chance"]:
            rule = f"zero-shot must be shown to be above chance ({100 * one['chance']:.1f} %)"
            value = f"{100 * one['accuracy']:.1f} % [{100 * low:.1f}, {100 * high:.1f}] of {number} images"
            step = TRY_FIRST if one["accuracy"] <= one["chance"] else f"More images may show it. {TRY_FIRST}"
            findings.append(Finding("warning", Problem(name, rule, value, next_step=step)))
        elif name != "id_val" and one["accuracy"] >= id_val["accuracy"]:
            numbers = f"{100 * one['accuracy']:.1f} % against {100 * id_val['accuracy']:.1f} % on id_val"
            rule = f"no harder than id_val for the zero-shot model: {numbers}"
            step = "A shift is relative to the training images; check whether this set is the shift you mean."
            findings.append(Finding("note", Problem(name, rule, next_step=step)))
    return findings


def as_plain_data(found: Diagnosis) -> dict[str, Any]:
    """Returns a diagnosis for JSON: ``healthy``, ``findings``, ``sets``, ``zero_shot``, ``model``, ``machine``."""
    parts = ("sets", "zero_shot", "model", "machine")
    return {
        "healthy": not found.errors,
        "findings": [finding_data(one) for one in found.findings],
        **{name: getattr(found, name) for name in parts},
    }


def finding_data(finding: Finding) -> dict[str, str]:
    """Returns a finding for JSON."""
    problem = finding.problem
    return {"level": finding.level, "place": problem.place, "text": str(problem), "next_step": problem.next_step}
