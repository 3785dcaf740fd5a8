"""What a read of the test sets compares and finds, as data and text; notes of what other studies have read of them.

The rows come from a finished confirm (several fresh seeds) where there is one, else from the search itself (one
training each). No torch is loaded.

The ledger belongs to one study, so a new study of the same images begins with an empty one. Each read is therefore
noted once more beside the cache, with a digest of every set: ``test_reads/<name>.json``, a file per read, written whole
under a name of its own, so that any number of processes may write at once. Notes are told and refuse nothing; where one
cannot be written or read, a line says so. Not known here are reads with another cache, or of a set of which one image
was added or left out. Of a corrupted set the images without corruptions count.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from carft_ray import files
from carft_ray.data.cache import cache_dir, listed, made_folder
from carft_ray.data.duplicates.find_duplicates import SharedRow
from carft_ray.data.duplicates.shared_images import shared_counts
from carft_ray.errors import CarftError, NoSuccessfulTrialError, Problem
from carft_ray.evaluation.objective import ObjectiveSpec, objective_spec
from carft_ray.evaluation.predictions import BoolArray, correct_matrix, sample_ids
from carft_ray.layout import CONFIRM
from carft_ray.recipe.loading import trust_word
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.results.confirm_plan import Stage, options_to_go_on, read_plan, whole_rows
from carft_ray.results.delivered import models_of_confirm, models_of_search
from carft_ray.results.evidence import Subject, compare, comparison_lines, lacking, row_lines
from carft_ray.results.statistics.images import with_images
from carft_ray.results.stored import read_compared
from carft_ray.study.ledger import WENT_ON, Entry
from carft_ray.study.place import named
from carft_ray.study.rows import ZERO_SHOT
from carft_ray.study.snapshot import Snapshot
from carft_ray.untrusted import is_name, read_text, visible
from carft_ray.words import counted, times

ID_TEST = "id_test"
NOTES = "test_reads"
NOTE_NAME = "note"  # in the details of a read's line in the ledger: of its file
_MOST_BYTES, _MOST_SHOWN = 2**20, 3
# a read by another study: ``study`` (its folder, when it read), ``time`` (ISO 8601), ``user``, and ``sets``: those of
# this study that have the very images which were read there
OtherRead = dict[str, Any]


def compared_rows(study: Snapshot) -> dict[str, Any]:
    """Returns the rows of a study, of its confirm or else of its search, as the ledger has them.

    Returns:
        ``confirmed``: whether they were trained on fresh seeds after the search; ``seeds`` of data order and views, the
        same for all rows; ``rows``, the winner first: ``name``, ``role`` (``winner``, ``candidate`` or ``baseline``),
        ``alpha``, which is never chosen again, ``objective`` in the search, and ``runs``, folders of its trainings in
        the order of the seeds; none for zero-shot. ``models``: as of ``delivered``; empty without a confirm: then the
        rows themselves are models. ``missing``: baselines without a result, or without one of the fresh seeds.

    Raises:
        NoSuccessfulTrialError: The search has no finished trial, or a confirm was begun and is not finished.
        StorageError: The study or the plan of its confirm is damaged.
    """
    recipe, stages = study.recipe, read_plan(study.study_dir)
    if stages is not None:
        return _of_confirm(study, *stages)
    rows = models_of_search(study)
    missing = lacking(recipe.search.baselines, [row["name"] for row in rows])
    return {"confirmed": False, "seeds": [recipe.train.seed], "rows": rows, "models": [], "missing": missing}


def _of_confirm(study: Snapshot, first: Stage, second: Stage | None) -> dict[str, Any]:
    """Returns the rows that have a mean over all seeds, as the summary of the confirm has them."""
    stage, trained = second or first, study.confirmations
    study_dir, recipe = study.study_dir, study.recipe
    confirmed = read_compared(study_dir, CONFIRM) or {}
    failed = {line.split(":")[0] for line in confirmed.get("failed", ())}
    whole = [row for row, _ in whole_rows(stage, trained)]
    unfinished = [row.name for row in stage.rows if row not in whole and not failed & {*stage.names(row)}]
    winner = next((row.name for row in whole if row.role == "winner"), None)
    is_summed_up = (confirmed.get("winner"), confirmed.get("seeds")) == (winner, list(stage.seeds))
    if unfinished or winner is None or not is_summed_up:
        options = options_to_go_on(first, second, recipe, trained, first.winner)
        command = f"carft-ray confirm {shlex.quote(named(study_dir))} {options}{trust_word(recipe)}"
        step = f"Finish it: {command}\n    Or move" if options else "Each of its trials has failed with a seed. Move"
        step += f" {study_dir / CONFIRM} away, and one training of each is compared."
        value = f"one without all seeds of {'; '.join(unfinished)}" if unfinished else "one without its summary"
        rule = "a started confirm must be finished"
        raise NoSuccessfulTrialError(Problem(str(study_dir / CONFIRM), rule, value, next_step=step))
    rows = []
    for row in sorted(whole, key=lambda row: row.role != "winner"):
        runs = [f"{CONFIRM}/{name}" for name in stage.names(row)]  # none of the zero-shot model
        rows.append({"name": row.name, "role": row.role, "alpha": row.alpha, "objective": row.objective, "runs": runs})
    models = models_of_confirm(study, first, second)
    missing = lacking(stage.baselines(recipe), [row.name for row in whole])
    return {"confirmed": True, "seeds": list(stage.seeds), "rows": rows, "models": models, "missing": missing}


def read_record(
    entry: Entry, before: Sequence[Entry], number: int, elsewhere: Sequence[OtherRead] = ()
) -> dict[str, Any]:
    """Returns which read of the test sets it was, as its summary has it.

    Args:
        entry: The line of this read in the ledger.
        before: The lines that the ledger held when it began.
        number: Which read it is, from 1.
        elsewhere: Reads of the same images by other studies, as far as they are noted (``notes``).
    """
    return {
        "read": number,
        "reason": entry.reason,
        "time": entry.time,
        "user": entry.user,
        "ledger_line": entry.number,
        "searches_after_a_read": sum(one.purpose == WENT_ON and one.number < entry.number for one in before),
        "elsewhere": list(elsewhere),
    }


def objective_on_test(recipe: Recipe) -> ObjectiveSpec:
    """Returns the objective of a recipe over its test sets."""
    return replace(objective_spec(recipe), id_set=ID_TEST, ood_sets=tuple(recipe.data.ood_test))


def summarise(
    recipe: Recipe,
    compared: Mapping[str, Any],
    shared: Sequence[SharedRow],
    tables: Mapping[str, pa.Table],
    record: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the content of ``summary.json``.

    Args:
        recipe: Of the study.
        compared: The rows that were read (``compared_rows``).
        shared: The study's list of images in two roles: where it has test images, the numbers are given without
            these, too.
        tables: Predictions on the test sets by the folder of the training, zero-shot by its name.
        record: Of this read (``read_record``).
    """
    spec, models = objective_on_test(recipe), compared.get("models")  # an earlier carft-ray has fixed none
    rows = [*compared["rows"], *(models or ())]
    first = rows[0]
    table = tables[(first["runs"] or [ZERO_SHOT])[0]]
    ids = {name: sample_ids(table, name, first["alpha"]) for name in spec.sets}
    whole = dict.fromkeys(ids, slice(None))
    alone = {name: ~np.isin(own, _shared_ids(shared, name)) for name, own in ids.items()}
    some_shared = not all(mask.all() for mask in alone.values()) and all(mask.any() for mask in alone.values())

    def measured(rows: Sequence[Mapping[str, Any]], subject: Subject) -> dict[str, Any]:
        correct = {}
        for row in rows:
            found = [(tables[run], row["alpha"]) for run in row["runs"]] or [(tables[ZERO_SHOT], 0.0)]
            correct[row["name"]] = {name: correct_matrix(found, name) for name in spec.sets}
        facts = [{**row, "seeds": len(row["runs"]), "validation_objective": row["objective"]} for row in rows]
        margin, seeds, lacks = recipe.search.objective.id_margin, compared["seeds"], compared.get("missing", ())

        def on_images(kept: Mapping[str, BoolArray | slice], label: str = "") -> dict[str, Any]:
            images = with_images(spec, recipe, {name: own[kept[name]] for name, own in ids.items()})
            fewer = {row: {name: x[:, kept[name]] for name, x in sets.items()} for row, sets in correct.items()}
            return compare("test", subject, images, facts, fewer, margin, seeds, label=label, baselines=lacks)

        without = None
        if some_shared:
            without = on_images(alone, "test sets without images that are in other roles")
            without["sets"] = {name: int(mask.sum()) for name, mask in alone.items()}
        return {**on_images(whole), "without_shared_images": without}

    return {
        **record,
        "confirmed": compared["confirmed"],
        "sets": {name: len(mask) for name, mask in alone.items()},
        "objective": {"kind": spec.kind, "id_weight": spec.id_weight},
        **measured(compared["rows"], "values" if compared["confirmed"] else "model"),
        "model": measured(models, "model") if models else None,
        "shared_images": shared_counts(shared),
    }


def read_lines(content: Mapping[str, Any]) -> list[str]:
    """Returns the content of a ``summary.json`` as lines of text, without its rows."""
    reason = f"; reason: {content['reason']}" if content["reason"] else ""
    again = content["searches_after_a_read"]
    sets = f"ID: {ID_TEST} ({counted(content['sets'][ID_TEST], 'image')})."
    if ood := [f"{name} ({count})" for name, count in content["sets"].items() if name != ID_TEST]:
        sets += f" OOD mean: over {', '.join(ood)}."
    seeds = f"{len(content['seeds'])} fresh seeds" if content["confirmed"] else "one training each"
    model = content.get("model")
    parts = [model, content] if model else [content]
    compared = [each for part in parts for each in (part["without_shared_images"], part) if each]
    return [
        f"Test read {content['read']}, {content['time']} by {content['user']}{reason}.",
        *([f"The search was continued {times(again)} after a test read."] if again else []),
        *changed_lines(content.get("changed_sets", [])),
        *lines_of_other_reads(content["elsewhere"]),
        sets,
        f"{seeds}; alphas were chosen on the validation sets.",
        *(row_lines(model) if model else []),
        *(line for each in compared for line in comparison_lines(each)),
    ]


def changed_lines(names: Sequence[str]) -> list[str]:
    """Returns a line that names the test sets whose images have changed since the search began, if there are any."""
    return [f"The images of {', '.join(names)} have changed since the search began."] if names else []


def _shared_ids(shared: Sequence[SharedRow], name: str) -> list[int]:
    """Returns the sample ids of a test set's images that are in other roles, too."""
    places = {f"data.{role}" for role in (name, f"{name}.of", f"ood_test.{name}", f"ood_test.{name}.of")}
    return [image[1] for row in shared for image in row.images if image[0] in places and row.done == row.other_done]


def note_read(
    study_dir: Path, recipe: Recipe, entries: Sequence[Entry], digests: Mapping[str, str]
) -> tuple[list[OtherRead], list[str]]:
    """Notes the last read of a ledger and returns those that other studies have noted of the same images.

    Never raises for what is wrong with the notes.

    Args:
        study_dir: The study directory.
        recipe: Its recipe.
        entries: All lines of its ledger, that of this read last.
        digests: Of the test sets (``digests_of_tests``).

    Returns:
        The reads, oldest first; what could not be noted or read, a line each.
    """
    cache, entry = cache_dir(recipe), entries[-1]
    own, found, problems = {str(line.details.get(NOTE_NAME)) for line in entries}, list[OtherRead](), list[str]()
    name, content = str(entry.details.get(NOTE_NAME)), {"study": str(study_dir), "time": entry.time, "user": entry.user}
    try:
        folder = made_folder(cache, NOTES)
        if is_name(name):
            files.write_json(folder / f"{name}.json", {**content, "sets": digests})
    except (CarftError, OSError) as error:
        problems.append(f"this read is not noted for other studies of these images: {error}")
    for path in (cache / NOTES / name for name in listed(cache, NOTES)):
        if path.suffix != ".json" or path.stem in own:
            continue
        try:
            other = json.loads(read_text(path, _MOST_BYTES))
            shared = [name for name, digest in digests.items() if digest in other["sets"].values()]
            if shared:
                found.append({**{key: visible(str(other[key])) for key in ("study", "time", "user")}, "sets": shared})
        except (CarftError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            problems.append(f"a note of a read of test sets cannot be read and is ignored: {path} ({error!r})")
    return sorted(found, key=lambda one: one["time"]), problems


def lines_of_other_reads(reads: Sequence[OtherRead]) -> list[str]:
    """Returns them as a line of text; none where there are none."""
    if not reads:
        return []
    shown = [f"{one['study']} ({one['time']}: {', '.join(one['sets'])})" for one in reads[-_MOST_SHOWN:]]
    more = f", and {len(reads) - len(shown)} more" if len(reads) > len(shown) else ""
    return [f"Other studies have also read these images {times(len(reads))}: {', '.join(shown)}{more}."]
