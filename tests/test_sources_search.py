"""Training and search on every kind of stored images: the numbers are those of the folders, bit for bit."""

import json

import crash_host
import pytest
import short_training
from layouts_tables import Picture, hf_dataset, table_of, write_shards, write_table

from carft_ray.recipe.loading import dump_recipe, load_recipe
from carft_ray.study.rows import trials

pytestmark = pytest.mark.slow
DOMAINS = {"train": "photo", "id_val": "photo_val", "ood_val.sketch": "sketch"}
SETS = {
    "folder": "{{source: folder, path: images/{domain}}}",
    "paths": "{{source: table, path: {domain}.csv, root: images/{domain}}}",
    "bytes": "{{source: table, path: {domain}.parquet, id: name}}",
    "shards": "{{source: webdataset, path: {domain}_shards}}",
    "saved": "{{source: huggingface, path: {domain}_saved, id: name}}",
}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The images of the short training in every layout, and a recipe for each: KIND.yaml."""
    import datasets

    datasets.disable_progress_bars()
    folder = tmp_path_factory.mktemp("kinds")
    recipe = short_training.make(folder)
    for domain in DOMAINS.values():
        root = folder / "images" / domain
        files = sorted(path.relative_to(root) for path in root.glob("*/*.png"))
        images = [Picture(str(file), file.parent.name, (root / file).read_bytes()) for file in files]
        write_table(folder / f"{domain}.csv", table_of(images, "paths"))
        write_table(folder / f"{domain}.parquet", table_of(images, "struct"))
        write_shards(folder / f"{domain}_shards", images, classes=short_training.CLASSES)
        hf_dataset(images, short_training.CLASSES).save_to_disk(folder / f"{domain}_saved")
    for kind in SETS:
        (folder / f"{kind}.yaml").write_text(dump_recipe(load_recipe(recipe, sets(*[kind] * 3))))
    return folder


def sets(*kinds):
    """Returns the settings that give each role a set of a kind."""
    return [
        f"data.{role}={SETS[kind].format(domain=domain)}"
        for (role, domain), kind in zip(DOMAINS.items(), kinds, strict=True)
    ]


@pytest.fixture(scope="module")
def results(here):
    """Trains on every kind, each with a cache of its own."""
    found = {}
    for kind in SETS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(here / f"cache_{kind}"))
            code = crash_host.call(["train", here / f"{kind}.yaml", "--out", here / f"out_{kind}", "--json"])
        assert code == 0
        found[kind] = json.loads((short_training.place_in(here / f"out_{kind}") / "result.json").read_text())
    return found


@pytest.mark.parametrize("kind", [kind for kind in SETS if kind != "folder"])
def test_a_training_on_the_same_images_has_the_same_numbers_whatever_holds_them(results, kind):
    for key in ("objective", "alpha", "metrics", "fine_tuned", "curve"):
        assert results[kind][key] == results["folder"][key], key


def test_a_search_takes_every_kind_in_one_recipe(here, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache_search"))
    chosen = [word for setting in sets("saved", "shards", "bytes") for word in ("--set", setting)]
    words = ["search", here / "folder.yaml", "--study", here / "study", "--executor", "debug"]
    words += ["--set", "search.trials=1", *chosen]
    assert crash_host.call(words) == 0
    (trial,) = trials(here / "study")
    assert trial.outcome == "complete"
