"""The comparison of roles as ``data.shared_images: fail`` makes it."""

from carft_ray.data.copies.shared_images import find_shared


def check_overlap(recipe, cache_dir):
    """Raises a ``HoldOutError`` where two roles of a recipe share images, whatever it says of them."""
    data = recipe.data.model_copy(update={"shared_images": "fail"})
    find_shared(recipe.model_copy(update={"data": data}), cache_dir)
