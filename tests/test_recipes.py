"""Every recipe that ships passes the doctor on sets in the true layouts, with a tiny model in place of its own."""

import functools
import shutil
from pathlib import Path

import pytest
from layouts import make_layout
from short_training import write_image, write_model
from test_search_spaces import FOLDER, RECIPES

from carft_ray.data.benchmarks.facts import load_facts
from carft_ray.recipe.checks.rules import named_sets
from carft_ray.recipe.loading import load_recipe, resolve_path
from carft_ray.recipe.schema.sets import BenchmarkSet, FolderSet, plain
from carft_ray.training.doctor import examine

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

TASKS = {
    "dtd": "split: train | split: val | split: test",
    "stanford-cars": "split: train, part: [0.1, 1] | split: train, part: [0, 0.1] | split: test",
    "cifar10": "split: train, part: [0.1, 1] | split: train, part: [0, 0.1] | split: test",
    "oxford-pets": "split: trainval, part: [0.1, 1] | split: trainval, part: [0, 0.1] | split: test",
    "sun397": "part: [0.2, 1] | part: [0, 0.1] | part: [0.1, 0.2]",
    "caltech101": "part: [0.2, 1] | part: [0, 0.1] | part: [0.1, 0.2]",
}  # of downstream.yaml, for each of its lines: what stands for train, id_val and id_test
NAMES = [path.stem for path in RECIPES] + [f"downstream:{task}" for task in TASKS]
OFTEN = ("folders", "pacs", "fmow", "downstream:dtd")  # the others in `make test-all`
FEW_CLASSES = 110  # up to so many, four images of each


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A checkout's ``search_spaces`` with a tiny model, and a function that makes benchmarks beside it, each once."""
    root = tmp_path_factory.mktemp("workshop")
    shutil.copytree(FOLDER, root / "search_spaces")
    write_model(root / "search_spaces" / "clip")
    return root / "search_spaces", functools.cache(make_benchmark)


def make_benchmark(name, root):
    make_layout(name, root, per_class=4 if len(load_facts(name).classes) <= FEW_CLASSES else 1)


def make_folders(root, domains):
    """Writes noise with a mark of its class; the class folders of all trees are the same."""
    for number, domain in enumerate(domains):
        for label, name in enumerate(("cat", "dog", "hen")):
            for index in range(160 if domain == "photo" else 24):  # of which a tenth is a role of one-gpu.yaml
                write_image(root / domain / name / f"{index}.png", label, 1000 * number + index)


def write_recipe(folder, name):
    """Returns the path of a recipe; ``downstream:TASK`` is downstream.yaml changed as it says to another task."""
    if ":" not in name:
        return folder / f"{name}.yaml"
    task = name.split(":")[1]
    text = (folder / "downstream.yaml").read_text().replace("flowers102", task)
    for split, words in zip(("train", "val", "test"), TASKS[task].split(" | "), strict=True):
        text = text.replace(f"{task}, split: {split}}}", f"{task}, {words}}}")
    (folder / f"downstream-{task}.yaml").write_text(text)
    return folder / f"downstream-{task}.yaml"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in OFTEN else pytest.mark.whole) for name in NAMES]
)
def test_every_recipe_passes_the_doctor_on_its_layouts(workshop, name, monkeypatch):
    folder, make = workshop
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
    recipe = load_recipe(write_recipe(folder, name), () if name == "quickstart" else TINY)
    specs = [plain(spec) for spec in named_sets(recipe).values()]
    for spec in specs:
        if isinstance(spec, BenchmarkSet):
            make(spec.name, Path(resolve_path(folder, spec.path)))
    for tree in {spec.path for spec in specs if isinstance(spec, FolderSet)}:
        domains = {domain for spec in specs if spec.path == tree for domain in spec.domains}
        make_folders(Path(resolve_path(folder, tree)), sorted(domains))
    found = examine(recipe, num_images=50)
    assert [str(problem) for problem in found.errors] == []
    assert set(found.zero_shot) == {"id_val", *recipe.data.ood_val}
    assert set(found.sets) == {".".join(path) for path in named_sets(recipe)}
    assert found.pairs == [] or name == "quickstart"
