"""Every recipe that ships passes the doctor on sets in the true layouts, with a tiny model in place of its own."""

import functools
import shutil

import pytest
from layouts import make_layout
from short_training import write_image, write_model
from test_search_spaces import FOLDER, RECIPES

from carft_ray.evaluation.doctor import examine
from carft_ray.recipe.loading import load_recipe, resolve_path
from carft_ray.recipe.rules import named_sets
from carft_ray.recipe.schema import BenchmarkSet, FolderSet, plain

pytestmark = pytest.mark.slow

# the tiny model's tower is plain, the tiny sets are smaller than a batch, and eighty templates take their time
TINY = (
    "model={name: 'local-dir:clip'}",
    "prompts.templates=['a photo of a {}', 'a sketch of a {}', 'a dark {}']",
    "train.batch_size=2",
    "train.micro_batch=null",
    "train.grad_checkpointing=false",
    "resources.gpus_per_worker=0",
)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A checkout's ``search_spaces`` with a tiny model, and a function that makes benchmarks beside it, each once."""
    root = tmp_path_factory.mktemp("workshop")
    shutil.copytree(FOLDER, root / "search_spaces")
    write_model(root / "search_spaces" / "clip")
    return root / "search_spaces", functools.cache(make_layout)


def make_folders(root, domains):
    """Writes noise with a mark of its class; the class folders of all trees are the same."""
    for number, domain in enumerate(domains):
        for label, name in enumerate(("cat", "dog", "hen")):
            for index in range(12):
                write_image(root / domain / name / f"{index}.png", label, 100 * number + index)


@pytest.mark.parametrize("name", [path.name for path in RECIPES])
def test_every_recipe_passes_the_doctor_on_its_layouts(workshop, name, monkeypatch):
    folder, make = workshop
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
    recipe = load_recipe(folder / name, () if name == "quickstart.yaml" else TINY)
    specs = [plain(spec) for spec in named_sets(recipe).values()]
    for spec in specs:
        if isinstance(spec, BenchmarkSet):
            make(spec.name, resolve_path(spec.path, folder))
    trees = {spec.path for spec in specs if isinstance(spec, FolderSet)}
    for tree in trees:
        domains = {domain for spec in specs if spec.path == tree for domain in spec.domains}
        make_folders(resolve_path(tree, folder), sorted(domains))
    found = examine(recipe, folder, num_images=50)
    assert [str(problem) for problem in found.errors] == []
    assert set(found.zero_shot) == {"id_val", *recipe.data.ood_val}
    assert set(found.sets) == {".".join(path) for path in named_sets(recipe)}
