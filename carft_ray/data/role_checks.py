"""Whether the sets of a recipe are there and hold what their roles need, and whether two roles would share images."""

from pathlib import PurePath

from carft_ray.data import sandbox
from carft_ray.data.class_names import class_list, word_problems
from carft_ray.data.listing import Listing, and_more
from carft_ray.data.selection import class_problems, empty_problem, name_problems, selected_rows
from carft_ray.data.sets import list_set, plain_place, reader_of
from carft_ray.errors import DataError, Problem
from carft_ray.recipe.rules import named_sets
from carft_ray.recipe.schedule import can_cut, possible_values
from carft_ray.recipe.schema.data import TEST_ROLES, CorruptedSet, PlainSet, SandboxSet, SetSpec, plain
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.written import dotted

_Held = tuple[dict[str, list[str]], set[str]]


PARTS = "disjoint parts of one folder share none: [0, 0.8] and [0.8, 1]"


def check_sets(recipe: Recipe, lists_tests: bool = False) -> list[Problem]:
    """Returns everything wrong with the sets of a recipe, without decoding an image.

    Folders and sandbox domains exist; every set of training and validation has exactly the classes of the class list,
    each with images, and images in its part; the words for the classes go with the list; no batch is larger than the
    training set. Of a test role only the existence is checked. An empty list means that the sets of training and
    validation can be opened; otherwise raise it as a ``DataError``.

    Args:
        recipe: The recipe.
        lists_tests: Check test roles in the same way as the others.
    """
    problems: list[Problem] = []
    listings: dict[str, Listing] = {}
    sets = {path: (plain_place(path, spec), plain(spec)) for path, spec in named_sets(recipe).items()}
    for path, (place, spec) in sets.items():
        if isinstance(spec, SandboxSet):
            problems += sandbox.domain_problems(spec.domain, place)
        elif path[1] in TEST_ROLES and not lists_tests:
            problems += reader_of(spec).problems(spec, place)
        else:
            try:
                listings[place] = list_set(spec, place)
            except DataError as error:
                problems += error.problems
    train_place, train_spec = sets["data", "train"]
    train = listings.get(train_place)
    if recipe.data.classes is None and train is None and not isinstance(train_spec, SandboxSet):
        return problems  # without the classes of train there is nothing to compare with
    classes = class_list(recipe, train)
    for place, spec in sets.values():
        if isinstance(spec, SandboxSet):
            problems += sandbox.class_problems(classes, place)
        elif place in listings:
            found = class_problems(listings[place], spec, classes, place) or name_problems(listings[place], place)
            if not found and not len(selected_rows(listings[place], spec)):
                found = [empty_problem(listings[place], place)]
            problems += found
    return problems + _count_problems(recipe, classes, train)


def check_roles(recipe: Recipe) -> list[Problem]:
    """Returns a problem for every two sets that share images and must not; raise them as a ``HoldOutError``.

    Two sets share images when they hold the same folder or file (links resolved), one inside the other's, unless their
    parts of it are disjoint; or the same domain and split of the sandbox. Two sets of one role may, and so may those of
    ``may_share``. No image is read: ``data.duplicates.find_duplicates`` does that.

    Args:
        recipe: The recipe.
    """
    problems = []
    seen: list[tuple[SetSpec, str, str, _Held]] = []  # set, role, place in the recipe, what it holds
    for path, spec in named_sets(recipe).items():
        place, role, here = dotted(path), str(path[1]), _held(plain(spec))
        for other, its, there, holds in seen:
            if may_share((role, spec), (its, other)) or _disjoint(plain(spec), plain(other)):
                continue
            if shared := _shared(here, holds):
                rule = f"a set has one role and must not share images with {there}"
                step = f"Give {place} images of its own; {PARTS}."
                problems.append(Problem(place, rule, shared[0] + and_more(shared), next_step=step))
        seen.append((spec, role, place, here))
    return problems


def may_share(one: tuple[str, SetSpec], other: tuple[str, SetSpec]) -> bool:
    """Returns whether two sets, each with its role, may hold the same images.

    Sets of one role may. So may an ID and an OOD set for validation, or for test, when one of them is corrupted: the
    images are the same and the shift is another.
    """
    roles = {one[0], other[0]}
    corrupted = isinstance(one[1], CorruptedSet) or isinstance(other[1], CorruptedSet)
    return len(roles) == 1 or (corrupted and roles in ({"id_val", "ood_val"}, {"id_test", "ood_test"}))


def name_space(spec: PlainSet) -> tuple[object, ...]:
    """Returns what the names of a set's images are names in: in two sets of one, an image has one sample id."""
    if isinstance(spec, SandboxSet):
        return spec.source, spec.domain, spec.split
    return spec.source, spec.path, reader_of(spec).naming(spec)


def _held(spec: PlainSet) -> _Held:
    """Returns the places of a set's images, each with the folders around it, and all of these folders."""
    if isinstance(spec, SandboxSet):
        return {f"sandbox domain {spec.domain}, split {spec.split}": []}, set()
    around = {place: [str(folder) for folder in PurePath(place).parents] for place in reader_of(spec).places(spec)}
    return around, {folder for folders in around.values() for folder in folders}


def _shared(here: _Held, there: _Held) -> list[str]:
    """Returns the places of one set that another holds, too: the very place, one inside of it, or one around it."""
    places, outer = there
    return [
        place for place, around in here[0].items() if place in outer or any(map(places.__contains__, (place, *around)))
    ]


def _disjoint(one: PlainSet, other: PlainSet) -> bool:
    """Returns whether two sets of one place share no image all the same."""
    if isinstance(one, SandboxSet) or isinstance(other, SandboxSet) or type(one) is not type(other):
        return False
    reader = reader_of(one)
    if reader.disjoint(one, other):
        return True
    # a part is of the hash of the name, so one image must have one name in both
    if one.part is None or other.part is None or name_space(one) != name_space(other):
        return False
    return one.part[1] <= other.part[0] or other.part[1] <= one.part[0]


def _count_problems(recipe: Recipe, classes: tuple[str, ...], train: Listing | None) -> list[Problem]:
    problems = word_problems(recipe, classes)
    if len(classes) < 2:
        step = "Classes are the folders below the domains: check whether data.train.path is one level too deep."
        problems.append(Problem("data.train", "there must be at least two classes", str(len(classes)), next_step=step))
    spec = plain(recipe.data.train)
    if isinstance(spec, SandboxSet):
        size = spec.num_per_class * len(classes)
    elif train is None or not (size := len(selected_rows(train, spec))):
        return problems
    set_alone = [values.get("batch_size") for values in recipe.search.baselines.values()]
    batch_sizes = [recipe.train.batch_size, *possible_values(recipe, "batch_size"), *set_alone]
    if (largest := max(each for each in batch_sizes if isinstance(each, int))) > size:
        rule = f"must be at most the size of the training set, {size} images, in train, search.space and baselines"
        problems.append(Problem("batch_size", rule, str(largest)))
    if not problems and recipe.search.pruner.name != "none" and can_cut(recipe) and not can_cut(recipe, size):
        pruner = recipe.search.pruner.name
        rule = f"must end early enough for the pruner {pruner}: no intermediate value comes before the end"
        step = "Shorten the warm-up, train longer, or use a smaller batch."
        problems.append(Problem("train.warmup_steps", rule, str(recipe.train.warmup_steps), next_step=step))
    return problems
