"""What is a mean of the weights of many trainings worth (a soup)? ``python -m benchmarks.soups``

    python -m benchmarks.soups --from model-soups
    python -m benchmarks.soups examples/pacs/art_painting.yaml --trainings benchmarks/results/seeds/art

FOLDER is a copy of the public results of "Model soups" (arXiv 2203.05482; github.com/mlfoundations/model-soups, MIT
licence): 72 CLIP ViT-B/32, fine-tuned on ImageNet, on held-out images of ImageNet's training set (2 %), on ImageNet and
on five shifts. Nothing is trained or downloaded. The second command asks the same of the trainings of searches
(``benchmarks.soup_searches``). Each shift in turn is the one that a choice may see:

    chosen by   (held-out images + validation shift) / 2
    measured    (ImageNet + mean of the four other shifts) / 2

    training chosen         the model with the highest "chosen by"
    best training by test   the model with the highest "measured": more than any choice of one model can reach
    uniform soup            mean of the weights of all 72
    greedy soup             of those that were added one by one as the accuracy on held-out images rose: it has seen no
                            shift
    mean of all trainings   mean of "measured" over the 72

Two of the 72 lines have the same numbers. Both count: the uniform soup has 72 members, too.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import fsum
from pathlib import Path

from carft_ray.errors import CarftError, Problem, UsageError
from carft_ray.recipe.loading import load_recipe
from carft_ray.ui import console
from carft_ray.untrusted import parse_json, read_text

HELD_OUT, ID_TEST = "ImageNet2p", "ImageNet"  # columns of the files
SHIFTS = {  # column: name in the table
    "ImageNetV2": "ImageNetV2",
    "ImageNetSketch": "ImageNet-Sketch",
    "ImageNetR": "ImageNet-R",
    "ObjectNet": "ObjectNet",
    "ImageNetA": "ImageNet-A",
}
COLUMNS = (HELD_OUT, ID_TEST, *SHIFTS)
MODELS_FILE, UNIFORM_FILE, GREEDY_FILE = (
    f"{name}_results.jsonl" for name in ("individual_model", "uniform_soup", "greedy_soup")
)
SOURCE = "github.com/mlfoundations/model-soups"

Accuracies = Mapping[str, float]  # by column, fractions


@dataclass(frozen=True)
class Published:
    """The accuracies of public models and of their soups."""

    models: tuple[Accuracies, ...]
    uniform: Accuracies
    greedy: Accuracies


def read_published(folder: Path) -> Published:
    """Returns what the three files of a folder hold.

    Raises:
        UsageError: One is missing or damaged.
    """
    models = _lines_of(folder / MODELS_FILE)
    return Published(models, _only_line(folder / UNIFORM_FILE), _only_line(folder / GREEDY_FILE))


def _only_line(path: Path) -> Accuracies:
    found = _lines_of(path)
    if len(found) != 1:
        raise _damaged(path, "must have one line", str(len(found)))
    return found[0]


def _lines_of(path: Path) -> tuple[Accuracies, ...]:
    """Returns the accuracies of each line of a file, at least one."""
    try:
        lines = read_text(path, error=UsageError).splitlines()
    except OSError as error:
        raise _damaged(path, "must be a readable file", error.strerror or str(error)) from error
    except UsageError as error:
        raise UsageError([replace(problem, next_step=_step(path)) for problem in error.problems]) from error
    found = [_accuracies(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise _damaged(path, "must have a line for each model", "none")
    return tuple(found)


def _accuracies(path: Path, number: int, line: str) -> Accuracies:
    try:
        content = parse_json(line)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise _damaged(path, "must be a JSON object", line[:40], number)
    for name in COLUMNS:
        value = content.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise _damaged(path, f"{name} must be an accuracy from 0 to 1", str(content.get(name, "none"))[:40], number)
    return {name: float(content[name]) for name in COLUMNS}


def _damaged(path: Path, rule: str, value: str, line: int | None = None) -> UsageError:
    return UsageError(Problem(f"{path}:{line}" if line else str(path), rule, value, next_step=_step(path)))


def _step(path: Path) -> str:
    return f"Copy {path.name} from {SOURCE}, and name its folder with --from."


def chosen_by(model: Accuracies, shift: str) -> float:
    """Returns what a choice sees of a model, if it may see this shift."""
    return (model[HELD_OUT] + model[shift]) / 2


def measured(model: Accuracies, shift: str) -> float:
    """Returns what a model is worth where a choice has not looked, if it has seen this shift."""
    others = [model[name] for name in SHIFTS if name != shift]
    return (model[ID_TEST] + fsum(others) / len(others)) / 2


def worth(published: Published, shift: str) -> dict[str, float]:
    """Returns the measured accuracy of each way to one model, if the choice may see this shift."""
    models = published.models
    each = [measured(model, shift) for model in models]
    return {
        "training chosen": measured(max(models, key=lambda model: chosen_by(model, shift)), shift),
        "best training by test": max(each),
        "uniform soup": measured(published.uniform, shift),
        "greedy soup": measured(published.greedy, shift),
        "mean of all trainings": fsum(each) / len(each),
    }


def table_of(published: Published) -> Iterator[str]:
    """Yields the lines of a Markdown table: a column for each validation shift, in percent."""
    columns = [worth(published, shift) for shift in SHIFTS]
    num_different = len({tuple(model.values()) for model in published.models})
    yield f"{len(published.models)} models, {num_different} different; accuracy in %, by the shift that chooses\n"
    yield f"| | {' | '.join(SHIFTS.values())} |"
    yield f"|{'---|' * (1 + len(SHIFTS))}"
    for name in columns[0]:
        yield f"| {name} | {' | '.join(f'{100 * column[name]:.1f}' for column in columns)} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soups", description="What soups are worth.")
    words = f"with {MODELS_FILE}, {UNIFORM_FILE} and {GREEDY_FILE} of {SOURCE}"
    parser.add_argument("--from", dest="published", type=Path, metavar="FOLDER", help=words)
    parser.add_argument("recipe", type=Path, nargs="?", help="a recipe with a table of benchmarks.seed_table")
    parser.add_argument("--trainings", type=Path, metavar="FOLDER", help="that benchmarks.seed_table got with --out")
    parser.add_argument("--length", type=int, default=16, help="trainings of a search (%(default)s)")
    parser.add_argument("--searches", type=int, default=20, help="how many (%(default)s)")
    words = "of so many searches, read what they deliver on the test sets, once (%(default)s)"
    parser.add_argument("--tests", type=int, default=0, help=words)
    parser.add_argument("--processes", type=int, default=2, help="soups at a time (%(default)s)")
    given = parser.parse_args(argv)
    if (given.published is None) == (given.trainings is None or given.recipe is None):
        parser.error("either --from, or a recipe and --trainings")
    try:
        if given.published:
            lines = table_of(read_published(given.published))
        else:
            from benchmarks.soup_searches import run  # which loads torch

            out = given.trainings.resolve()
            lines = run(load_recipe(given.recipe), out, given.length, given.searches, given.processes, given.tests)
        print("\n".join(lines))
    except CarftError as error:
        console.show_error(error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
