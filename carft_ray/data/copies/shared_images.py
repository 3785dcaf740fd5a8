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
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from string import Template
from typing import Any, Literal

import scipy  # its modules load when they are first used

from carft_ray import files
from carft_ray.data.copies.find import LIMIT, NUM_EXAMPLES, SharedImage, SharedPair, shared_pairs, shared_problems
from carft_ray.data.images import small_jpeg
from carft_ray.data.listing import StoredSource
from carft_ray.data.role_checks import check_roles, may_share
from carft_ray.data.sets import excluded_ids, plain_place
from carft_ray.errors import HoldOutError, Problem, StorageError, UsageError
from carft_ray.layout import SHARED_IMAGES
from carft_ray.recipe.rules import named_sets
from carft_ray.recipe.schema.data import TEST_ROLES, CorruptedSet
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.untrusted import csv_cell, html, of_csv_cell
from carft_ray.words import counted

NEAREST_FIRST = ("ood_test", "id_test", "ood_val", "id_val", "train")
LEAVES: Literal["leaves"] = "leaves"
STAYS: Literal["stays"] = "stays"
MOST_SHOWN = 1000  # pairs of a page, about 20 kB each
SIDE, QUALITY = 240, 85  # of a shown picture: pixels, and of JPEG
LIMIT_STEP = (
    "The roles are likely wrong. Give each role images of its own, or write data.shared_images: keep, or a larger "
    "data.shared_limit. Inspect the pairs first: carft-ray doctor RECIPE --pairs pairs.html"
)

_Key = tuple[str, int]  # key path of a set, index of an image there


@dataclass(frozen=True)
class SharedRow:
    """Two images in two roles that are the same, and what is done with each.

    Attributes:
        set: Key path of the set of the first.
        image: Its name: the path of its file.
        sample_id: Its sample id.
        done: Whether it ``leaves`` its set or ``stays``.
        other_set: Key path of the set of the second.
        other_image: Its name.
        other_sample_id: Its sample id.
        other_done: As ``done``.
        found_by: ``same bytes`` or ``same picture``.
        distance: Of the two pictures (``find.distances``); 0 for the same bytes or pixels.
    """

    set: str
    image: str
    sample_id: int
    done: Literal["leaves", "stays"]
    other_set: str
    other_image: str
    other_sample_id: int
    other_done: Literal["leaves", "stays"]
    found_by: str
    distance: float

    @property
    def images(self) -> tuple[tuple[str, int, str, str], tuple[str, int, str, str]]:
        """Both images: key path of the set, sample id, what is done, key path of the other set."""
        first = (self.set, self.sample_id, self.done, self.other_set)
        return first, (self.other_set, self.other_sample_id, self.other_done, self.set)


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
    return decide(recipe, shared_pairs(recipe, cache_dir, say))


def decide(recipe: Recipe, pairs: Sequence[SharedPair]) -> list[SharedRow]:
    """Returns a row per pair with what is done with its images.

    Args:
        recipe: The recipe.
        pairs: Images that two roles share.

    Raises:
        HoldOutError: The policy is ``fail``; or ``drop`` would leave out more than ``data.shared_limit`` of a set, a
            whole class, or an image that the sandbox draws.
    """
    if recipe.data.shared_images == "fail" and pairs:
        raise HoldOutError(shared_problems(pairs))
    leaving: dict[_Key, SharedImage] = {}
    if recipe.data.shared_images == "drop":
        specs = {plain_place(path, spec): (str(path[1]), spec) for path, spec in named_sets(recipe).items()}
        images = {_key(image): image for pair in pairs for image in (pair.first, pair.second)}
        connected = scipy.cluster.hierarchy.DisjointSet(images)
        for pair in pairs:
            connected.merge(_key(pair.first), _key(pair.second))
        for component in connected.subsets():
            stays: list[_Key] = []
            for key in sorted(component, key=lambda key: (NEAREST_FIRST.index(specs[key[0]][0]), key)):
                role = specs[key[0]][0]
                if role in TEST_ROLES or all(may_share(specs[key[0]], specs[other[0]]) for other in stays):
                    stays.append(key)
                else:
                    leaving[key] = images[key]
        if problems := _limit_problems(recipe, list(leaving.values())):
            raise HoldOutError(problems)

    return rows_of(pairs, leaving)


def rows_of(pairs: Iterable[SharedPair], leaving: Container[_Key] = ()) -> list[SharedRow]:
    """Returns a row per pair, of which these images leave."""

    def with_done(image: SharedImage) -> tuple[str, str, int, Literal["leaves", "stays"]]:
        return image.place, image.name, image.sample_id, LEAVES if _key(image) in leaving else STAYS

    return [
        SharedRow(*with_done(pair.first), *with_done(pair.second), pair.how, round(float(pair.distance), 4))
        for pair in pairs
    ]


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
        for place, sample_id, done, _ in row.images:
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
    return recipe.model_copy(update={"data": data.model_copy(update=roles)}) if leaving else recipe


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


def write_pairs(path: Path, pairs: Sequence[SharedPair]) -> None:
    """Writes pairs, those most alike first, as the ending of the name says; a page shows ``MOST_SHOWN`` of them.

    Raises:
        DataError: A picture of a page cannot be read.
        StorageError: The file cannot be written.
    """
    ordered = sorted(pairs, key=lambda pair: (pair.first.place, pair.second.place, pair.distance))
    is_page = path.suffix.lower() == ".html"
    files.write_text(path, _page(ordered) if is_page else csv_of(rows_of(ordered), PAIR_COLUMNS))


def _page(pairs: Sequence[SharedPair]) -> str:
    template = Template(Path(__file__).with_name("pairs.html").read_text(encoding="utf-8"))
    title = f"Images in two roles: {counted(len(pairs), 'pair')}"
    shown = "\n".join(map(_article, pairs[:MOST_SHOWN]))
    rest = f"The first {MOST_SHOWN:,} are shown; a .csv file has all." if len(pairs) > MOST_SHOWN else ""
    return template.substitute(title=title, limit=f"{LIMIT:g}", rest=rest, pairs=shown)


def _article(pair: SharedPair) -> str:
    pictures, words = zip(*map(_shown, (pair.first, pair.second)), strict=True)
    heading = f"<b>{pair.how}, distance {pair.distance:.3f}</b>"
    return f"<article>{''.join(pictures)}<div>{heading}{''.join(words)}</div></article>"


def _shown(image: SharedImage) -> tuple[str, str]:
    """Returns the picture of an image, and its set, its name, and its size in pixels."""
    pixels = image.source.pixels(image.index)
    encoded = base64.b64encode(small_jpeg(pixels, SIDE, QUALITY)).decode()
    words = f"<p>{html(image.place)}<br>{html(image.name)}<br>{pixels.shape[1]} x {pixels.shape[0]} pixels</p>"
    return f'<img alt="" src="data:image/jpeg;base64,{encoded}">', words


def _key(image: SharedImage) -> _Key:
    return image.place, image.index


def _limit_problems(recipe: Recipe, leaving: Sequence[SharedImage]) -> list[Problem]:
    """Returns a problem for every set that would lose so much that its role is likely wrong."""
    problems = []
    limit = recipe.data.shared_limit
    by_set: dict[str, list[SharedImage]] = {}
    for image in leaving:
        by_set.setdefault(image.place, []).append(image)
    for place, images in by_set.items():
        source, count = images[0].source, len(images)
        value = f"{count} of {len(source)} images, such as {', '.join(image.name for image in images[:NUM_EXAMPLES])}"
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


def _classes_gone(source: StoredSource, leaving: Sequence[SharedImage]) -> list[str]:
    """Returns the classes of which all images would leave."""
    classes = source.listing.classes
    before = Counter(classes[row] for row in source.rows.tolist())
    after = Counter(classes[int(source.rows[image.index])] for image in leaving)
    return sorted(name for name, count in after.items() if count == before[name])
