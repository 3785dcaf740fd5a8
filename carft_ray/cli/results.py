"""Trusting the numbers of a study: fresh seeds, test sets, other objectives, comparisons."""

import contextlib
import shlex
import tempfile
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from carft_ray import files
from carft_ray.cli import common
from carft_ray.cli.program import command
from carft_ray.errors import Problem, UsageError
from carft_ray.ui import console
from carft_ray.words import counted

WINNER = "search: the best of the search. confirmed: the best on fresh seeds, measured on other seeds."


@command("confirm studies/quickstart --top 3 --seeds 5", common.TRUST, shared=common.RunOptions)
def confirm(
    study: common.StudyArgument,
    top: Annotated[int, Option(min=1, help="Number of best trials.")] = 3,
    seeds: Annotated[
        int, Option(min=2, help="Fresh seeds per trial; 5 for a publication. A later call can add seeds.")
    ] = 3,
    winner: Annotated[str, Option(metavar="search|confirmed", help=WINNER)] = "search",
    against: Annotated[
        list[str] | None, Option(help="Study whose winner becomes another baseline; repeatable.")
    ] = None,
    no_ablation: Annotated[bool, Option("--no-ablation", help="Do not train the winner without penalties.")] = False,
    notify_url: common.NotifyUrlOption = None,
    json_: common.JsonOption = False,
    **shared: Any,
) -> None:
    """Train the best trials and the baselines again with fresh seeds, to see what the winner is worth.

    After an interruption, the same command continues.
    """
    given: dict[str, Any] = {"top": top, "seeds": seeds, "winner": winner, "against": against or []}
    again, chosen_anew = (
        common.command_line("confirm", study, **{**given, "winner": one}, no_ablation=no_ablation, **shared)
        for one in (winner, "confirmed")
    )
    shared["overrides"] = common.overrides_of(None, shared)
    from carft_ray.api import actions

    shared |= {"ablation": not no_ablation, "notify_url": notify_url, "resume_command": again}
    found = actions.confirm(study, **given, **shared, progress=not json_)
    summary = found.numbers
    if console.print_json(summary, json_):
        return
    console.show(found.tables[0])
    console.say("\n" + "\n".join(found.lines))
    if summary["measured_higher"] and winner == "search":
        console.next_step(chosen_anew)
    else:
        common.suggest(study, "confirm", changed=True, address=shared["address"])


@command("test studies/quickstart", common.TRUST)
def evaluate_test_sets(
    study: common.StudyArgument,
    again: Annotated[
        str | None, Option(metavar="REASON", help="Read them again; ledger and reports show the reason.")
    ] = None,
    trust_paths: common.TrustPathsOption = False,
    json_: common.JsonOption = False,
) -> None:
    """Read the test sets once: measure winner and baselines on id_test and ood_test. The ledger records every read."""
    from carft_ray.data.duplicates.shared_images import read_shared, shared_lines
    from carft_ray.results.sealed_read import read_sealed
    from carft_ray.results.test_summary import read_lines
    from carft_ray.store.copy import MODELS
    from carft_ray.study.ledger import read_folder
    from carft_ray.study.place import named, own_folder

    step = f"Resume with: {common.command_line('test', study, trust_paths=trust_paths)}"
    with common.interrupted_as("stopped; the results so far are kept", step):
        folder = own_folder(study, MODELS)
        summary = read_sealed(folder, again, console.sayer(not json_), trust_paths)
    if console.print_json({"study": named(folder.resolve()), **summary}, json_):
        return
    ood_sets = [name for name in summary["sets"] if name != "id_test"]
    console.show(console.estimate_table(summary["rows"], ood_sets, "test sets, %"))
    console.say("\n" + "\n".join([*shared_lines(read_shared(folder)), *read_lines(summary)]))
    console.say(f"Results: {folder / read_folder(summary['read'])}")
    common.suggest(study, "test", changed=True)


@command("report studies/quickstart", common.TRUST, reads=True)
def report(
    study: common.StudyArgument,
    html: Annotated[bool, Option("--html", help="Write one HTML page: figures, tables, all trials.")] = False,
    card: Annotated[str | None, Option(metavar="text|latex", help="Print only the verdict: five lines.")] = None,
    tables: Annotated[Path | None, Option(metavar="DIR", help="Write only the tables, as CSV.")] = None,
    out: Annotated[
        Path | None, Option(metavar="FILE", help="File of --html (default: in the study) or of --card.")
    ] = None,
    json_: common.JsonOption = False,
) -> None:
    """Show what the best trial is worth: corrected for selection bias, and against the baselines. Reads no test set."""
    from carft_ray.api import answers
    from carft_ray.files import is_address

    first, *others = [name for name, given in (("--html", html), ("--card", card), ("--tables", tables)) if given] or [
        ""
    ]
    if others:
        raise UsageError(Problem(others[0], f"cannot be used with {first}"))
    if json_ and card:
        raise UsageError(Problem("--json", "cannot be used with --card, which prints text"))
    if out and not (html or card):
        raise UsageError(Problem("--out", "needs --html or --card"))
    if html and out is None and is_address(study):
        raise UsageError(Problem("--html", "needs --out if the study is in a bucket"))
    found = answers.report(study)
    if card is not None:
        text = found.card(card, "--card")
        if out is None:
            console.show(text.rstrip("\n"))
        else:
            files.write_text(out, text)
            console.say(f"Card: {out}")
        return
    if tables is not None:
        paths = [str(path) for path in found.save_tables(tables)]
        if not console.print_json({"tables": paths}, json_):
            console.show("\n".join(paths))
        return
    if html:
        path = found.save(out)
        size = path.stat().st_size
        if not console.print_json({"page": str(path), "num_bytes": size, "document": found.document}, json_):
            console.show(f"Page: {path} ({console.size_text(size)}); open it in a browser.")
            common.suggest(study, "report")
        return
    if not console.print_json(found.numbers, json_):
        console.show("\n".join(found.numbers["lines"]))
        common.suggest(study, "report")


@command("rescore studies/quickstart --objective worst_domain", common.TRUST, reads=True)
def rescore(
    study: common.StudyArgument,
    objective: Annotated[str | None, Option(metavar="KIND", help="weighted_mean, harmonic or worst_domain.")] = None,
    id_weight: Annotated[float | None, Option(min=0, max=1, help="Weight of the ID accuracy in weighted_mean.")] = None,
    sets: Annotated[str | None, Option(metavar="A,B", help="OOD validation sets that count; default: all.")] = None,
    json_: common.JsonOption = False,
) -> None:
    """Rank the trials by another objective, from stored predictions. The recipe's constraints apply. Writes nothing."""
    from carft_ray.layout import WEIGHTS
    from carft_ray.results import rescore as rescoring
    from carft_ray.results.reading import study_view

    view = study_view.read_study(study)
    spec = rescoring.asked_objective(view.recipe, objective, id_weight, sets)
    if id_weight is not None and spec.kind != "weighted_mean":
        console.warn(f"--id-weight has no effect: {spec.kind} has no weight")
    answer = rescoring.rescore(view, spec)
    if console.print_json(answer, json_):
        return
    weight = f", ID weight {spec.id_weight:g}" if spec.kind == "weighted_mean" else ""
    sets_text = ", ".join(spec.ood_sets)
    ood = f"OOD: mean over {sets_text}." if spec.ood_sets else "No OOD set: only ID counts."
    if spec.kind == "worst_domain" and spec.ood_sets:
        ood = f"The lowest accuracy of {sets_text} counts; the column OOD is their mean, and ID does not count."
    own = " (the study's own objective)" if answer["objective"] == answer["own_objective"] else ""
    console.show(f"Objective: {spec.kind}{weight}{own}. {ood}\n")
    rows = [*answer["baselines"], *answer["trials"]]
    console.show(console.rescored_table(rows))
    if answer["constraints"]:
        console.say("The study's constraints also hold here; trials that violate them come last.")
    if answer["unfinished"]:
        console.say(f"Without a result: {counted(answer['unfinished'], 'more trial')}.")
    console.say(f"\n{answer['note']}")
    first, folder = answer["trials"][0], shlex.quote(study)
    steps = [f"carft-ray ls {folder}"]
    row = next(row for row in view.trials if row.name == first["name"])
    if (row.place(view.study_dir) / WEIGHTS).exists():  # a study keeps those of its best
        steps.insert(0, f"carft-ray evaluate {folder} --trial {first['name']} --alpha {first['alpha']!r}")
    console.next_step(*steps)


TRIAL = "Trial (7, t0007), name of a baseline, confirm/NAME or soups/NAME; default: the best."


@command("reproduce studies/quickstart t0003", common.TRUST)
def reproduce(
    folder: common.TrainedArgument,
    trial: Annotated[str | None, Argument(help=TRIAL, show_default=False)] = None,
    out: Annotated[
        Path | None, Option(help="New or empty folder for the new training; default: it is removed.")
    ] = None,
    trust: common.TrustOption = False,
    trust_paths: common.TrustPathsOption = False,
    json_: common.JsonOption = False,
) -> None:
    """Repeat a training as its study records it, and check that all numbers are the same."""
    from carft_ray.results.reading.finished import open_finished
    from carft_ray.study.trust import require_written
    from carft_ray.ui.progress import training_shown

    finished = open_finished(folder, trial)
    if not trust_paths:
        require_written(finished.folder, finished.base, "reproduce {}")
    if not finished.is_zero_shot:
        from carft_ray.training.own_function import require_trusted

        require_trusted(finished.recipe, trust, baselines=False)
    from carft_ray.results.reproduce import change_lines, difference_error, reproduce, sentence

    say = console.sayer(not json_)
    with contextlib.ExitStack() as stack:
        out_dir = out
        if out_dir is None:
            out_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="carft-ray-"))) / "again"
        say(f"reproducing {finished.title}")
        found = reproduce(finished, out_dir, say, stack.enter_context(training_shown(not json_)))
    console.print_json({**found, "folder": None if out is None else str(out)}, json_)
    if not found["same"]:
        raise difference_error(found)
    if json_:
        return
    console.show(sentence(found))
    if lines := change_lines(found):
        console.say("The numbers are the same, although the code or the machine has changed:")
        console.say("\n".join(f"  {line}" for line in lines))
    if finished.is_zero_shot:
        console.next_step(common.command_line("ls", folder))
        return
    again = out if finished.row.soup is None else None  # a soup made again is no study
    compare = common.command_line("compare", f"{folder}:{finished.name}", again or f"{folder}:zero_shot")
    console.next_step(compare, *([common.command_line("ls", folder)] if out is None else []))


TARGET = "DIR (best trial of a study, or the training of `train`) or DIR:TRIAL; DIR may be an address."


@command("compare studies/quickstart:t0003 studies/quickstart:7", common.TRUST, reads=True)
def compare(
    a: Annotated[str, Argument(metavar="A", help=TARGET, show_default=False)],
    b: Annotated[str, Argument(metavar="B", help="Like A.", show_default=False)],
    json_: common.JsonOption = False,
) -> None:
    """Explain how two trainings differ: recipes, data, code, versions, and numbers with paired intervals."""
    from carft_ray.recipe.loading import trust_word
    from carft_ray.results.compare_trainings import compare
    from carft_ray.results.reading.finished import open_finished, split_target

    found = compare(a, b)
    if console.print_json(found, json_):
        return
    for key, title, none in (
        ("recipe", "Recipes differ in", "The recipes are the same."),
        ("origin", "Data, code and machines differ in", "Data, code, versions and machines are the same."),
    ):
        console.show(console.differing_table(title, found[key]) if found[key] else none)
        console.show()
    console.show(console.comparison_table(found))
    console.say(
        "\n" + (f"Difference A - B in points; paired 95 % interval {found['words']}." if found["words"] else "")
    )
    for what, reason in found["reasons"].items():
        console.say(f"{what} cannot be compared: {reason}.")
    console.say("These validation sets were used for selection: a best trial looks better on them than it is.")
    trust = trust_word(open_finished(*split_target(a)).recipe)
    console.next_step(f"carft-ray reproduce {shlex.quote(found['a']['folder'])} {found['a']['trial']}{trust}")
