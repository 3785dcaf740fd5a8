"""Soups of the trainings of searches: the part of ``python -m benchmarks.soups RECIPE --trainings FOLDER``

Searches are replayed on the recipe's table of trainings (``benchmarks.seed_table``) by the product's own functions,
limited to the table's values (``benchmarks.emulators.Tabulated``). The soups of each are made of the weights in FOLDER
by ``training.soup``, and measured as trainings of the table are: a curve on the validation images, which choose, and
the accuracies on the part of each test set that is for tables, which tell what a choice is worth. Trainings whose
weights are not in FOLDER are run again.

    benchmarks/tables/NAME-soups.parquet        a row per soup: kind, members, at, used, objective, alpha, curve
    benchmarks/tables/NAME-soups-tests.jsonl    a line per model that ``--tests`` has read on the recipe's test sets

``at`` is the alpha at which tries are measured, ``used`` are the members that are in it. What is in the file is not
made again: a killed benchmark continues with the same command, and the table of a whole file needs no weights.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.emulators import EDGE, FloatArray, SeedTable, Tabulated, read_table, words_of
from benchmarks.rules import RULES, as_searched, run_search, student
from benchmarks.seed_table import TABLES, check_start, for_tables, row_of, start_of
from benchmarks.table import write_table
from benchmarks.trainings import ID_TEST, Bench, Clock, Planned, open_bench, predict_tests, run_all
from carft_ray.evaluation.objective import ID_SET, objective_spec
from carft_ray.evaluation.predictions import correct_matrix
from carft_ray.layout import RESULT, WEIGHTS
from carft_ray.recipe.loading import apply
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.results.statistics.intervals import objective_difference
from carft_ray.study.expected import expectation, stand, values_key
from carft_ray.study.rows import best_row, rank
from carft_ray.study.soups import MOST
from carft_ray.study.training import TrialRow

TODAY = "chosen by the measured objective"
WAYS = {"no repeats": "expected", "with repeats": "repeats .35"}  # names of rules
AT_ONCE = 6  # soups, after which the table is written

Member = tuple[str, int]  # configuration and seed of a training of the table


@dataclass(frozen=True)
class Asked:
    """A soup that a search asks for: its kind, its members in their order, and the alpha of tries."""

    kind: str
    members: tuple[Member, ...]
    at: float

    @property
    def key(self) -> str:
        """Tells soups apart."""
        return json.dumps([self.kind, self.members, self.at])


@dataclass(frozen=True)
class Replayed:
    """What one search may deliver: a training at an alpha, or soups of its trainings, by name."""

    training: Member
    alpha: float
    soups: Mapping[str, Asked]


def replayed(table: SeedTable, diverged: set[Member], trainings: int, search: int) -> dict[str, Replayed]:
    """Returns what searches with one seed of the sampler may deliver, by how they choose."""
    world, found = Tabulated(table), dict[str, Replayed]()
    for way, rule in ((TODAY, "today"), *WAYS.items()):
        recipe = as_searched(table.recipe, trainings, RULES[rule].repeats, search)
        trials, baselines = run_search(world, recipe, search, told=False)
        rows = stand(trials, expectation(recipe, trials, baselines)) if RULES[rule].expects else trials
        best = best_row(rows)
        assert best is not None

        def member(row: TrialRow) -> Member:
            seed = row.values.get("seed", table.recipe.train.seed) - table.recipe.train.seed
            return table.names[table.place(row.values)], int(world.order(search)[seed])

        same = [row for row in rows if values_key(row) == values_key(best)] if way != TODAY else [best]
        same = [row for row in same if member(row) not in diverged]
        winners = [member(row) for row in sorted(same, key=lambda row: -point(row, best.alpha)["objective"])]
        others = [member(row) for row in sorted(rows, key=rank) if row not in same]
        ranked = [each for each in (*winners, *others) if each not in diverged][:MOST]
        firsts = [member(row) for row in sorted(first_of_each(rows), key=rank)]
        different = [each for each in firsts if each not in diverged][:3]
        assert best.alpha is not None
        asked = {
            "all repeats": Asked("mean", tuple(winners), best.alpha),
            "best two repeats": Asked("mean", tuple(winners[:2]), best.alpha),
            "top three values": Asked("mean", tuple(different), best.alpha),
            "greedy": Asked("greedy", tuple(ranked), best.alpha),
            "uniform": Asked("mean", tuple(ranked), best.alpha),
            "Model Stock": Asked("model_stock", tuple(ranked), best.alpha),
        }
        soups = {name: each for name, each in asked.items() if len(each.members) > 1 and way != TODAY}
        found[way] = Replayed(winners[0], best.alpha, soups)
    return found


def point(row: TrialRow, alpha: float | None) -> Mapping[str, float]:
    """Returns the measures of a training at an alpha."""
    return next(each for each in row.points if each["alpha"] == alpha)


def first_of_each(rows: Sequence[TrialRow]) -> list[TrialRow]:
    """Returns the first training of each values."""
    return [*{values_key(row): row for row in reversed(rows)}.values()]


def planned(asked: Asked, table: SeedTable, bench: Bench, alphas: tuple[float, ...]) -> Planned:
    """Returns the plan of a soup, whose members are trained."""
    members = []
    for name, seed in asked.members:
        folder = bench.training_dir(of_table((name, seed), table, alphas))
        result = json.loads((_last(folder) / RESULT).read_text())
        objective = next(each["objective"] for each in result["curve"] if each["alpha"] == asked.at)
        sha256 = result["files"][WEIGHTS]["sha256"]
        place = str(_last(folder).relative_to(bench.folder))
        members.append({"name": place, "sha256": sha256, "objective": objective})
    values = table.values[table.names.index(asked.members[0][0])]
    soup = {"kind": asked.kind, "members": members, "alpha": asked.at}
    return Planned(f"{asked.kind} of {len(members)}", values, alphas, keeps_weights=True, soup=soup)


def of_table(member: Member, table: SeedTable, alphas: tuple[float, ...]) -> Planned:
    """Returns the plan of a training as ``benchmarks.seed_table`` has it."""
    name, seed = member
    values = {**table.values[table.names.index(name)], "seed": seed}
    return Planned(f"{name}, seed {seed}", values, alphas, keeps_weights=True)


def _last(folder: Path) -> Path:
    return max(path.parent for path in folder.glob(f"attempt-*/{RESULT}"))


def measure(asked: Sequence[Asked], table: SeedTable, bench: Bench, path: Path, processes: int) -> None:
    """Makes the soups that the file has not, and the trainings whose weights are gone, and writes the file often.

    Raises:
        UsageError: The file is of other trainings.
    """
    recipe, start = table.recipe, start_of(bench, table.recipe, len(table.names))
    check_start("the seed table", table.words, start)
    if path.exists():
        check_start(str(path), words_of(pq.read_table(path)), start)
    rows = read_soups(path)
    missing = [each for each in dict.fromkeys(asked) if each.key not in rows]
    alphas = alphas_of(recipe)
    trained = [of_table(each, table, alphas) for each in dict.fromkeys(m for soup in missing for m in soup.members)]
    trained = [each for each in trained if not list(bench.training_dir(each).glob(f"attempt-*/{WEIGHTS}"))]
    run_all(bench, trained, processes, Clock(sum(each.cost for each in trained)))
    sets, tests = (ID_SET, *recipe.data.ood_val), (ID_TEST, *recipe.data.ood_test)
    clock = Clock(sum(len(each.members) for each in missing))
    for begin in range(0, len(missing), AT_ONCE):
        some = missing[begin : begin + AT_ONCE]
        plans = [planned(each, table, bench, alphas) for each in some]
        for each, made in zip(some, run_all(bench, plans, processes, clock), strict=True):
            row = row_of(each.kind, made, sets, tests)
            names = [member["name"] for member in made.planned.soup["members"]]  # type: ignore[index]  # it is a soup
            used = [each.members[names.index(name)] for name in made.result["soup"]["members"]]
            rows[each.key] = {
                **{name: row[name] for name in ("objective", "alpha", "elapsed_s", "curve")},
                "kind": each.kind,
                "members": json.dumps(each.members),
                "at": each.at,
                "used": json.dumps(used),
            }
        write_table(path, [*rows.values()], {**start, "recipe": recipe.name})


def read_soups(path: Path) -> dict[str, dict[str, Any]]:
    """Returns the soups of the file by their keys; none where there is no file."""
    rows = pq.read_table(path).to_pylist() if path.exists() else []
    return {json.dumps([row["kind"], json.loads(row["members"]), row["at"]]): row for row in rows}


@dataclass(frozen=True)
class Model:
    """A training or a soup of the tables.

    Attributes:
        recipe: With the objective.
        row: Of a table, with its curve.
        sizes: Images of each set, the validation sets and those for tables.
    """

    recipe: Recipe
    row: Mapping[str, Any]
    sizes: tuple[Mapping[str, int], Mapping[str, int]]

    def at(self, alpha: float) -> Mapping[str, Any]:
        """Returns a point of the curve."""
        return next(each for each in self.row["curve"] if each["alpha"] == alpha)

    def correct(self, alpha: float) -> dict[str, FloatArray]:
        """Returns which validation images are answered right, [1, n] for each set."""
        return _by_set(self.at(alpha)["correct"], self.sizes[0])

    def worth(self, alpha: float) -> float:
        """Returns the accuracy on what no choice has seen: half ID, half the mean of the other domains."""
        found = {name: float(right.mean()) for name, right in _by_set(self.at(alpha)["tests"], self.sizes[1]).items()}
        others = [value for name, value in found.items() if name != ID_TEST]
        return (found[ID_TEST] + sum(others) / len(others)) / 2

    def toward_start(self, best: float, paired: bool) -> float:
        """Returns the alpha by the rule of one standard error, of the paired difference or of the best one alone."""
        spec, at_best = objective_spec(self.recipe), self.correct(best)
        nothing = {name: np.zeros_like(right) for name, right in at_best.items()}
        for alpha in sorted(each["alpha"] for each in self.row["curve"]):
            if self.recipe.search.alpha.lowest - EDGE <= alpha < best:
                gap = objective_difference(spec, at_best, self.correct(alpha))
                alone = objective_difference(spec, at_best, nothing)
                if gap.mean <= (gap if paired else alone).standard_error:
                    return float(alpha)
        return best


ModelOf = Callable[[Member | Asked], Model]


def _by_set(bits: bytes, sizes: Mapping[str, int]) -> dict[str, FloatArray]:
    right, found, start = np.unpackbits(np.frombuffer(bits, np.uint8)), dict[str, FloatArray](), 0
    for name, size in sizes.items():
        found[name] = right[start : start + size].astype(np.float64)[None]
        start += size
    return found


BEST = "best of these with repeats and greedy"  # what the product delivers, with these soups
CHOSEN = ("one training", "all repeats", "best two repeats", "greedy")


@dataclass(frozen=True)
class Delivered:
    """A model that a search may deliver, and the alpha at which it is."""

    what: Member | Asked
    model: Model
    alpha: float

    @property
    def key(self) -> str:
        """Tells them apart in a file."""
        return f"{self.what.key if isinstance(self.what, Asked) else json.dumps(self.what)} at {self.alpha:g}"


def delivered(search: Mapping[str, Replayed], model_of: ModelOf) -> dict[str, Delivered]:
    """Returns what one search may deliver, by name.

    Args:
        search: Of ``replayed``.
        model_of: Gives a training or a soup.
    """
    found = dict[str, Delivered]()
    for way, each in search.items():
        models = {"one training": Delivered(each.training, model_of(each.training), each.alpha)}
        for name, asked in each.soups.items():
            models[name] = Delivered(asked, model_of(asked), model_of(asked).row["alpha"])
        if each.soups:
            wanted = [models[name] for name in CHOSEN if name in models]
            models[BEST] = max(wanted, key=lambda one: one.model.at(one.alpha)["objective"])
        found |= {f"{way}: {name}": one for name, one in models.items()}
        for name in ("one training", BEST):
            if (one := models.get(name)) is not None:
                for rule, is_paired in (("one_se", True), ("the error of the best alone", False)):
                    alpha = one.model.toward_start(one.alpha, is_paired)
                    found[f"{way}: {name}, alpha by {rule}"] = replace(one, alpha=alpha)
    return found


def table_of(
    searches: Sequence[Mapping[str, Delivered]], worth: Callable[[Delivered], float], of: str
) -> Iterator[str]:
    """Yields the lines of a Markdown table: means over searches, and the difference to today's model in points.

    Args:
        searches: Of ``delivered``.
        worth: What a model is worth.
        of: Name of the images that say it.
    """
    today = f"{TODAY}: one training"
    yield f"\n{len(searches)} searches; Student's 95 % interval of the difference to the first row, paired by search\n"
    yield f"| delivered | searches | validation, % | {of}, % | difference, points |"
    yield "|---|---|---|---|---|"
    for name in dict.fromkeys(name for each in searches for name in each):
        own = [each[name] for each in searches if name in each]
        worths = 100 * np.array([worth(one) for one in own])
        seen = 100 * float(np.mean([one.model.at(one.alpha)["objective"] for one in own]))
        text = "-"
        if name != today and len(own) > 1:
            firsts = np.array([100 * worth(each[today]) for each in searches if name in each])
            text = "{:+.2f} [{:+.2f}, {:+.2f}]".format(*student(worths - firsts))
        yield f"| {name} | {len(own)} | {seen:.1f} | {np.mean(worths):.1f} | {text} |"


def read_tests(models: Mapping[str, Delivered], table: SeedTable, out: Path, path: Path) -> None:
    """Reads models on the recipe's test sets, which no table has seen, and writes their accuracies.

    Args:
        models: Those that the file has not, by their keys.
        table: Of the recipe.
        out: Folder of the trainings.
        path: File of a line per model, which grows.
    """
    bench, alphas = open_bench(for_tables(table.recipe), out), alphas_of(table.recipe)
    for key, one in models.items():
        plan = (
            planned(one.what, table, bench, alphas)
            if isinstance(one.what, Asked)
            else of_table(one.what, table, alphas)
        )
        recipe = apply(table.recipe, plan.values)
        found = predict_tests(recipe, bench, bench.training_dir(plan), (one.alpha,))
        names = (ID_TEST, *recipe.data.ood_test)
        accuracies = {name: float(correct_matrix([(found, one.alpha)], name).mean()) for name in names}
        with path.open("a") as file:
            file.write(json.dumps({"model": key, **accuracies}) + "\n")


def tested(path: Path) -> dict[str, float]:
    """Returns by their keys what the models of the file are worth on the test sets, as ``Model.worth``."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        accuracies = json.loads(line)
        key, id_test = accuracies.pop("model"), accuracies.pop(ID_TEST)
        found[key] = (id_test + sum(accuracies.values()) / len(accuracies)) / 2
    return found


def alphas_of(recipe: Recipe) -> tuple[float, ...]:
    """Returns where trainings of the table are read on the parts for tables."""
    return tuple(alpha for alpha in recipe.search.alpha.measured if alpha > 0)


def run(recipe: Recipe, out: Path, trainings: int, searches: int, processes: int, tests: int = 0) -> Iterator[str]:
    """Makes the soups that are missing, and yields the lines of the tables.

    Args:
        recipe: Of the trainings.
        out: Folder of the trainings of ``benchmarks.seed_table``.
        trainings: Of each search.
        searches: How many.
        processes: Soups at a time.
        tests: Of so many searches the delivered models are read on the test sets, once.

    Raises:
        UsageError: A table is missing or of other trainings.
    """
    source, path, tests_path = (
        TABLES / f"{recipe.name}-{name}" for name in ("seeds.parquet", "soups.parquet", "soups-tests.jsonl")
    )
    table, content = read_table(source, recipe), pq.read_table(source)
    rows = {(row["configuration"], row["seed"]): row for row in content.to_pylist()}
    diverged = {key for key, row in rows.items() if row["diverged"]}
    found = [replayed(table, diverged, trainings, search) for search in range(searches)]
    asked = {soup.key: soup for search in found for each in search.values() for soup in each.soups.values()}
    if not {*asked} <= {*read_soups(path)}:
        measure([*asked.values()], table, open_bench(for_tables(recipe), out), path, processes)
    soups, words = read_soups(path), words_of(content)
    sizes = json.loads(words["sets"]), json.loads(words["tests"])

    def model_of(what: Member | Asked) -> Model:
        return Model(recipe, soups[what.key] if isinstance(what, Asked) else rows[what], sizes)

    models = [delivered(search, model_of) for search in found]
    yield from table_of(models, lambda one: one.model.worth(one.alpha), "parts for tables")
    names = (f"{TODAY}: one training", *(f"{way}: {name}" for way in WAYS for name in ("one training", BEST)))
    some = [{name: one for name, one in each.items() if name in names} for each in models[:tests]]
    if some:
        known = tested(tests_path)
        if unread := {one.key: one for each in some for one in each.values() if one.key not in known}:
            read_tests(unread, table, out, tests_path)
        worth = tested(tests_path)
        yield from table_of(some, lambda one: worth[one.key], "test sets")
