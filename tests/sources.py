"""Sets of stored images, opened as a recipe would."""

from functools import partial
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from carft_ray.data.cache import cache_dir
from carft_ray.data.class_names import class_folders
from carft_ray.data.selection import stored_source
from carft_ray.data.sets import list_set, open_source
from carft_ray.errors import DataError
from carft_ray.recipe.loading import resolve_path, with_paths
from carft_ray.recipe.schema.data import SetSpec
from carft_ray.recipe.schema.recipe import Recipe


def absolute_paths(part, base_dir):
    """Returns a recipe, or a part of one, whose relative paths begin in a folder."""
    return with_paths(part, partial(resolve_path, base_dir))


def recipe_of(data, **parts):
    """Returns a recipe of these sets, whose paths begin in the working directory."""
    return absolute_paths(Recipe.model_validate({"data": data, "train": {"batch_size": 2}, **parts}), Path.cwd())


def open_train(recipe):
    return open_source(recipe.data.train, "train", recipe.data.classes, cache_dir(recipe))


def open_validation(recipe):
    """Returns ``id_val`` and the OOD validation sets by name."""
    classes, cache = class_folders(recipe), cache_dir(recipe)
    ood_val = {name: open_source(spec, name, classes, cache) for name, spec in recipe.data.ood_val.items()}
    return open_source(recipe.data.id_val, "id_val", classes, cache), ood_val


def open_set(class_list=None, role="train", /, base_dir=None, **spec):
    """Opens the set that these keys of a recipe describe, with a class list or its own."""
    parsed = absolute_paths(TypeAdapter(SetSpec).validate_python(spec), base_dir or Path.cwd())
    return stored_source(list_set(parsed, role), parsed, class_list, role)


def told(open_it, *args, **keys):
    """Returns the message for a set or a file that cannot be opened."""
    with pytest.raises(DataError) as caught:
        open_it(*args, **keys)
    assert caught.value.exit_code == 4
    return str(caught.value)


def table(base, path="set.parquet", names=None, **keys):
    """Opens a table in the working directory."""
    return open_set(names, source="table", path=str(path), **keys)


def shards(base, path="set/shards", **keys):
    """Opens shards in the working directory."""
    return open_set(source="webdataset", path=str(path), **keys)


def contents(source):
    """Returns what is known of every image by its id."""
    ids = source.sample_ids.tolist()
    return {ids[i]: (source.class_names[source.labels[i]], source.content(i)) for i in range(len(source))}


def folder_source(root, domains, classes, name, **selection):
    return open_set(classes, name, source="folder", path=str(root), domains=domains, **selection)
