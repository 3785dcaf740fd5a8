"""The classes of a recipe, in the order of their labels, and the words that prompts have for them."""

from carft_ray.data import sandbox
from carft_ray.data.benchmarks.reader import benchmark_words
from carft_ray.data.listing import Listing
from carft_ray.data.sets import list_set, plain_place
from carft_ray.errors import DataError, Problem, nearest
from carft_ray.recipe.schema.data import BenchmarkSet, StoredSet, plain
from carft_ray.recipe.schema.recipe import Recipe


def class_folders(recipe: Recipe) -> tuple[str, ...]:
    """Returns the class list in label order: ``data.classes``, else the classes of the training set in its order.

    Raises:
        DataError: The training set is missing.
    """
    listing, train = None, plain(recipe.data.train)
    if recipe.data.classes is None and isinstance(train, StoredSet):
        listing = list_set(train, plain_place(("data", "train"), recipe.data.train))
    return class_list(recipe, listing)


def class_names(recipe: Recipe) -> tuple[str, ...]:
    """Returns the words for the classes in label order, as ``prompts.class_names`` says.

    Without it they are those of the benchmark that is trained on, else the folders with '_' as a space.

    Raises:
        DataError: The words do not go with the class list, or the folders of the training set are missing.
    """
    return class_words(recipe, class_folders(recipe))


def class_words(recipe: Recipe, folders: tuple[str, ...]) -> tuple[str, ...]:
    """Returns ``class_names`` where the class list is known.

    Raises:
        DataError: The words do not go with the class list.
    """
    if problems := word_problems(recipe, folders):
        raise DataError(problems)
    words = recipe.prompts.class_names
    if isinstance(words, tuple):
        return words
    train = plain(recipe.data.train)
    known = benchmark_words(words or (train.name if isinstance(train, BenchmarkSet) else ""))
    return tuple(known.get(folder, folder.replace("_", " ")) for folder in folders)


def class_list(recipe: Recipe, train: Listing | None) -> tuple[str, ...]:
    """Returns the class list in label order: ``data.classes``, else that of the training set, or of the sandbox."""
    if recipe.data.classes is not None:
        return recipe.data.classes
    return sandbox.CLASSES if train is None else train.found


def word_problems(recipe: Recipe, classes: tuple[str, ...]) -> list[Problem]:
    """Returns what is wrong with ``prompts.class_names``, for a class list."""
    names = recipe.prompts.class_names
    if isinstance(names, str):
        known = benchmark_words(names)
        unknown = [name for name in classes if name not in known]
        if not unknown:
            return []
        rule = f"must be the benchmark that has the classes, but {names} has none {unknown[0]!r}"
        step = "Leave it out to use the names of the class folders, or write a list of texts."
        return [Problem("prompts.class_names", rule, nearest=nearest(unknown[0], known), next_step=step)]
    if names is None or len(names) == len(classes):
        return []
    rule = f"there must be one text per class, in label order ({len(classes)}: {', '.join(classes[:5])} ...)"
    return [Problem("prompts.class_names", rule, str(len(names)))]
