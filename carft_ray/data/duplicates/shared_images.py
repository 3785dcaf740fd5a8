"""Images that stand in two roles: what ``data.shared_images`` does with them, and the list that a study keeps.

With ``drop`` an image stays in the role nearest to the test (``NEAREST_FIRST``) and leaves the others. Images of test
sets never leave. Pairs that share an image belong together: of A ~ B ~ C in three roles the one nearest to the test
stays. The list is made once, after parts and shots, before anything is trained: ``shared_images.csv`` in the folder of
the study, a row per pair. Every later command reads it (``without_shared``). For people, ``write_pairs`` writes the
pairs as a CSV table, or as a page with the pictures side by side.
"""

import base64
import csv
import io
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import scipy  # its modules load when they are first used

from carft_ray import files
from carft_ray.data.decode_images import small_jpeg
from carft_ray.data.duplicates.find_duplicates import LEAVES, LIMIT, STAYS, SharedRow, Sources, shared_pairs
from carft_ray.data.listing import StoredSource
from carft_ray.data.role_checks import check_roles, may_share
from carft_ray.data.sets import excluded_ids, plain_place
from carft_ray.errors import HoldOutError, Problem, StorageError, UsageError
from carft_ray.layout import SHARED_IMAGES
from carft_ray.recipe.rules import named_sets
from carft_ray.recipe.schema.data import TEST_ROLES, CorruptedSet
from carft_ray.recipe.schema.recipe import Recipe, with_keys
from carft_ray.untrusted import csv_cell, html, of_csv_cell
from carft_ray.words import counted

NEAREST_FIRST = ("ood_test", "id_test", "ood_val", "id_val", "train")
MOST_SHOWN = 1000  # pairs of a page, about 20 kB each
SIDE, QUALITY = 240, 85  # of a shown picture: pixels, and of JPEG
NUM_EXAMPLES = 2
STEP = (
    "Write data.shared_images: drop, which keeps them only in the role nearest to the test, or remove them from one of "
    "the two sets. List all of them: carft-ray doctor RECIPE --pairs pairs.html"
)
LIMIT_STEP = (
    "The roles are likely wrong. Give each role images of its own, or write data.shared_images: keep, or a larger "
    "data.shared_limit. Inspect the pairs first: carft-ray doctor RECIPE --pairs pairs.html"
)

_Key = tuple[str, int]  # key path of a set, sample id of an image there
COLUMNS = [field.name for field in fields(SharedRow)]
PAIR_COLUMNS = [name for name in COLUMNS if not name.endswith("done")]


def shared_of_study(
    recipe: Recipe, cache_dir: Path, study_dir: Path, say: Callable[[str], None] = lambda text: None
) -> list[SharedRow]:
    """Returns the list of a study, or finds the shared images of a new one; ``write_shared`` keeps them.

    Where a study has its list, nothing is compared again.

    Args:
        recipe: The recipe; its sets have passed ``check_sets``.
        cache_dir: Folder of the decoded sets; made when missing.
        study_dir: Folder of the study or training.
        say: Called with what is being done where that takes time, and with what was done.

    Raises:
        HoldOutError: Roles share images, and the recipe refuses that; or so many that the roles are likely wrong.
        DataError: An image of training or validation cannot be read.
        StorageError: The cache cannot be written, or the list is damaged.
    """
    if files.exists(study_dir / SHARED_IMAGES):
        return read_shared(study_dir)
    rows = find_shared(recipe, cache_dir, say)
    for line in shared_lines(rows):
        say(line)
    return rows


def find_shared(recipe: Recipe, cache_dir: Path, say: Callable[[str], None] = lambda text: None) -> list[SharedRow]:
    """Returns the shared images of a recipe and what is done with each; arguments and errors as above."""
    if problems := check_roles(recipe):
        raise HoldOutError(problems)
    return decide(recipe, *shared_pairs(recipe, cache_dir, say))


def decide(recipe: Recipe, rows: Sequence[SharedRow], sources: Sources) -> list[SharedRow]:
    """Returns the rows with what is done with their images.

    Args:
        recipe: The recipe.
        rows: Images that two roles share (``find.shared_pairs``).
        sources: Their sets.

    Raises:
        HoldOutError: The policy is ``fail``; or ``drop`` would leave out more than ``data.shared_limit`` of a set, a
            whole class, or an image that the sandbox draws.
    """
    if recipe.data.shared_images == "fail" and rows:
        raise HoldOutError(_role_problems(rows, sources))
    if recipe.data.shared_images != "drop":
        return list(rows)
    specs = {plain_place(path, spec): (str(path[1]), spec) for path, spec in named_sets(recipe).items()}
    names: dict[_Key, str] = {image[:2]: image[4] for row in rows for image in row.images}
    leaving: dict[_Key, str] = {}
    connected = scipy.cluster.hierarchy.DisjointSet(names)
    for row in rows:
        connected.merge(*(image[:2] for image in row.images))
    for component in connected.subsets():
        stays: list[_Key] = []
        for key in sorted(component, key=lambda key: (NEAREST_FIRST.index(specs[key[0]][0]), key)):
            role = specs[key[0]][0]
            if role in TEST_ROLES or all(may_share(specs[key[0]], specs[other[0]]) for other in stays):
                stays.append(key)
            else:
                leaving[key] = names[key]
    if problems := _limit_problems(recipe, leaving, sources):
        raise HoldOutError(problems)
    done = [[LEAVES if image[:2] in leaving else STAYS for image in row.images] for row in rows]
    return [replace(row, done=one, other_done=other) for row, (one, other) in zip(rows, done, strict=True)]


def read_shared(study_dir: Path) -> list[SharedRow]:
    """Returns the list of a study; empty where it has none.

    Raises:
        StorageError: It is damaged.
    """
    path = study_dir / SHARED_IMAGES
    if not files.exists(path):
        return []
    numbers: dict[str, Callable[[str], Any]] = {"sample_id": int, "other_sample_id": int, "distance": float}
    try:
        reader = csv.DictReader(io.StringIO(files.read_whole(study_dir, SHARED_IMAGES).decode("utf-8-sig")))
        if reader.fieldnames != COLUMNS:
            raise ValueError(f"its columns are {reader.fieldnames}")
        return [SharedRow(**{name: numbers.get(name, of_csv_cell)(row[name]) for name in COLUMNS}) for row in reader]
    except (OSError, TypeError, ValueError, csv.Error) as error:
        raise StorageError(Problem(str(path), "must be the list of shared images of a study", str(error))) from error


def write_shared(study_dir: Path, rows: Iterable[SharedRow]) -> None:
    """Writes the list of a study.

    Raises:
        StorageError: It cannot be written.
    """
    files.write_text(study_dir / SHARED_IMAGES, csv_of(rows, COLUMNS))


def csv_of(rows: Iterable[SharedRow], columns: Sequence[str]) -> str:
    """Returns columns of rows as CSV."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        values = [getattr(row, name) for name in columns]
        writer.writerow([csv_cell(value) if isinstance(value, str) else value for value in values])
    return buffer.getvalue()


def without_shared(recipe: Recipe, rows: Iterable[SharedRow]) -> Recipe:
    """Returns the recipe whose sets leave out what the list of a study leaves out.

    Args:
        recipe: The recipe.
        rows: The list (``read_shared``).
    """
    leaving: dict[str, set[int]] = {}
    for row in rows:
        for place, sample_id, done, *_ in row.images:
            if done == LEAVES:
                leaving.setdefault(place, set()).add(sample_id)

    def smaller(place: str, spec: Any) -> Any:
        if isinstance(spec, CorruptedSet):
            return spec.model_copy(update={"of": smaller(f"{place}.of", spec.of)})
        if place not in leaving:
            return spec
        before = [] if spec.exclude is None else excluded_ids(spec.exclude, place).tolist()
        return spec.model_copy(update={"exclude": tuple(sorted({*before, *leaving[place]}))})

    data = recipe.data
    roles: dict[str, Any] = {role: smaller(f"data.{role}", getattr(data, role)) for role in ("train", "id_val")}
    roles["ood_val"] = {name: smaller(f"data.ood_val.{name}", spec) for name, spec in data.ood_val.items()}
    return with_keys(recipe, data=roles) if leaving else recipe


def shared_counts(rows: Iterable[SharedRow]) -> dict[str, dict[str, int]]:
    """Returns how many images of each set leave and how many stay in two roles, by key path."""
    images = {image[:3] for row in rows for image in row.images if image[2] == LEAVES or row.done == row.other_done}
    found: dict[str, Counter[str]] = {}
    for place, _, done in sorted(images):
        found.setdefault(place, Counter())[done] += 1
    return {place: dict(counts) for place, counts in found.items()}


def shared_lines(rows: Sequence[SharedRow]) -> list[str]:
    """Returns what was done as lines of text, one per set; none where no images are shared."""
    lines = []
    for place, counts in shared_counts(rows).items():
        for done, count in counts.items():
            others = {image[3] for row in rows for image in row.images if image[0] == place and image[2] == done}
            also = f"also in {' and '.join(sorted(others))}"
            lines.append(f"{place}: {counted(count, 'image')} {'left out' if done == LEAVES else 'kept'}, {also}")
    return lines


def check_pairs_path(path: Path) -> None:
    """Raises a ``UsageError`` for a file that is neither a table nor a page."""
    if path.suffix.lower() not in (".csv", ".html"):
        raise UsageError(Problem("--pairs", "the name must end in .csv or .html", repr(str(path))))


def write_pairs(path: Path, rows: Sequence[SharedRow], sources: Sources) -> None:
    """Writes pairs, those most alike first, as the ending of the name says; a page shows ``MOST_SHOWN`` of them.

    Args:
        path: The file.
        rows: The pairs (``find.shared_pairs``).
        sources: Their sets.

    Raises:
        DataError: A picture of a page cannot be read.
        StorageError: The file cannot be written.
    """
    ordered = sorted(rows, key=lambda row: (row.set, row.other_set, row.distance))
    is_page = path.suffix.lower() == ".html"
    files.write_text(path, _page(ordered, sources) if is_page else csv_of(ordered, PAIR_COLUMNS))


def _page(rows: Sequence[SharedRow], sources: Sources) -> str:
    template = Template(Path(__file__).with_name("pairs.html").read_text(encoding="utf-8"))
    title = f"Images in two roles: {counted(len(rows), 'pair')}"
    shown = "\n".join(_article(row, sources) for row in rows[:MOST_SHOWN])
    rest = f"The first {MOST_SHOWN:,} are shown; a .csv file has all." if len(rows) > MOST_SHOWN else ""
    return template.substitute(title=title, limit=f"{LIMIT:g}", rest=rest, pairs=shown)


def _article(row: SharedRow, sources: Sources) -> str:
    """Returns both pictures, and of each its set, its name, and its size in pixels."""
    pictures, words = "", f"<b>{row.found_by}, distance {row.distance:.3f}</b>"
    for place, sample_id, _, _, name in row.images:
        [index] = np.flatnonzero(sources[place].sample_ids == sample_id)[:1]
        pixels = sources[place].pixels(int(index))
        encoded = base64.b64encode(small_jpeg(pixels, SIDE, QUALITY)).decode()
        pictures += f'<img alt="" src="data:image/jpeg;base64,{encoded}">'
        words += f"<p>{html(place)}<br>{html(name)}<br>{pixels.shape[1]} x {pixels.shape[0]} pixels</p>"
    return f"<article>{pictures}<div>{words}</div></article>"


def _role_problems(rows: Sequence[SharedRow], sources: Sources) -> list[Problem]:
    """Returns a problem for each two sets that share images."""
    problems = []
    by_sets: dict[tuple[str, str], list[SharedRow]] = {}
    for row in rows:
        by_sets.setdefault((row.set, row.other_set), []).append(row)
    for (first, second), shared in by_sets.items():
        how = " and ".join(sorted({row.found_by for row in shared}))
        examples = "; ".join(f"{row.image} and {row.other_image}" for row in shared[:NUM_EXAMPLES])
        rule = f"a set has one role and must not share images with {first}"
        num_shared, num_images = len({row.other_sample_id for row in shared}), len(sources[second])
        value = f"{num_shared} of {num_images} images in both ({how}): {examples}"
        problems.append(Problem(second, rule, value, next_step=STEP))
    return problems


def _limit_problems(recipe: Recipe, leaving: Mapping[_Key, str], sources: Sources) -> list[Problem]:
    """Returns a problem for every set that would lose so much that its role is likely wrong."""
    problems = []
    limit = recipe.data.shared_limit
    by_set: dict[str, dict[int, str]] = {}
    for (place, sample_id), name in leaving.items():
        by_set.setdefault(place, {})[sample_id] = name
    for place, images in by_set.items():
        source, count = sources[place], len(images)
        value = f"{count} of {len(source)} images, such as {', '.join([*images.values()][:NUM_EXAMPLES])}"
        if not isinstance(source, StoredSource):
            rule = "its images are also in another role and cannot be left out, because the sandbox draws them"
        elif count > limit * len(source):
            rule = f"at most {100 * limit:g} % of its images may also be in another role (data.shared_limit)"
        elif gone := _classes_gone(source, images):
            rule = f"every class must have an image that is in no other role; none in {', '.join(map(repr, gone))}"
        else:
            continue
        problems.append(Problem(place, rule, value, next_step=LIMIT_STEP))
    return problems


def _classes_gone(source: StoredSource, leaving: Iterable[int]) -> list[str]:
    """Returns the classes of which all images would leave."""
    leaves = np.isin(source.sample_ids, np.array([*leaving], np.uint64))
    before, after = (
        Counter(source.listing.classes[row] for row in rows.tolist()) for rows in (source.rows, source.rows[leaves])
    )
    return sorted(name for name, count in after.items() if count == before[name])
