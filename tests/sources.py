"""Sets of stored images, opened as a recipe would."""

from pathlib import Path

from pydantic import TypeAdapter

from carft_ray.data.listing import stored_source
from carft_ray.data.readers import list_set
from carft_ray.recipe.loading import absolute_set
from carft_ray.recipe.schema import SetSpec


def open_set(class_list=None, role="train", /, base_dir=Path("/"), **spec):
    """Opens the set that these keys of a recipe describe, with a class list or its own."""
    parsed = absolute_set(TypeAdapter(SetSpec).validate_python(spec), base_dir)
    return stored_source(list_set(parsed, role), parsed, class_list, role)


def folder_source(root, domains, classes, name, **selection):
    return open_set(classes, name, source="folder", path=str(root), domains=domains, **selection)
