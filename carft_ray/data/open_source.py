"""From a set of a recipe to its images, whatever its source; bad ones are left out where the recipe says so."""

from pathlib import Path

from carft_ray.data import sandbox
from carft_ray.data.cache import user_cache_dir
from carft_ray.data.readers import list_set
from carft_ray.data.records import without_bad_images
from carft_ray.data.selection import stored_source
from carft_ray.data.source import Source
from carft_ray.errors import DataError
from carft_ray.recipe.schema.data import CorruptedSet, SetSpec, StoredSet


def open_source(spec: SetSpec, name: str, classes: tuple[str, ...] | None, cache_dir: Path | None = None) -> Source:
    """Opens one set.

    Args:
        spec: The set as the recipe describes it.
        name: Role or name of the set, for messages.
        classes: Class folders in label order; None: those of the set.
        cache_dir: Folder of the decoded sets, which keeps what images cannot be decoded; None: the user's.

    Raises:
        DataError: Something is missing, or the classes do not match.
    """
    if isinstance(spec, CorruptedSet):
        from carft_ray.data.corruptions import CorruptedSource

        return CorruptedSource(open_source(spec.of, name, classes, cache_dir), spec)
    if isinstance(spec, StoredSet):
        source = stored_source(list_set(spec, name), spec, classes, name)
        if spec.on_bad_image == "fail":
            return source
        return without_bad_images(source, cache_dir or user_cache_dir())
    problems = sandbox.domain_problems(spec.domain, name)
    problems += [] if classes is None else sandbox.class_problems(classes, name)
    if problems:
        raise DataError(problems)
    return sandbox.sandbox_source(spec.domain, spec.split, spec.num_per_class, name)
