"""The doctor: what it finds in sets, prompts and models, one message each, and what it never does."""

import json
import re
import shutil

import pytest
from crash_host import call
from PIL import Image
from short_training import write_model
from test_init import write_tree

from carft_ray import words
from carft_ray.cli.doctor import step_words
from carft_ray.launch.cluster.doctor import as_plain_data, examine, zero_shot_findings
from carft_ray.recipe.loading import load_recipe
from carft_ray.ui.console import checkup_table

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tree of four domains, three classes, twelve images each, and a tiny CLIP."""
    root = tmp_path_factory.mktemp("doctor")
    write_model(root / "clip")
    write_tree(root / "images", ["train", "val", "fog", "secret"], ["circle", "square", "star"], images=12, size=20)
    return root


RECIPE = """
name: sick
model: {name: "local-dir:clip"}
data:
  train: {source: folder, path: images, domains: [train]}
  id_val: {source: folder, path: images, domains: [val]}
  ood_val:
    fog: {source: folder, path: images, domains: [fog]}
  ood_test:
    secret: {source: folder, path: images, domains: [secret]}
  cache_dir: cache
prompts: {templates: ["a photo of a {}", "a sketch of a {}"]}
train: {batch_size: 8}
resources: {threads: 1}
"""


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path / "here")
    (tmp_path / "here" / "r.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def diagnose(here, *overrides, **options):
    return examine(load_recipe(here / "r.yaml", overrides), **options)


def image(here, place):
    return here / "images" / f"{place}.png"


def texts(found, level):
    return [str(one.problem) for one in found.findings if one.level == level]


def test_a_healthy_recipe_has_no_error_and_every_number(here):
    found = diagnose(here)
    assert texts(found, "error") == []
    train = found.sets["data.train"]
    assert (train["num_images"], train["num_classes"], train["modes"]) == (36, 3, {"RGB": 36})
    assert train["images_per_class"] == {"min": 12, "median": 12, "max": 12, "smallest_class": "circle"}
    assert train["short_side"] == {"min": 20, "median": 20, "max": 20}
    assert set(found.zero_shot) == {"id_val", "fog"}
    assert all(one["num_images"] == 36 for one in found.zero_shot.values())
    assert 1 <= found.model["effective_contexts"] <= 2
    largest = found.model["largest_context"]
    assert 0.5 <= largest["share"] <= 1
    assert "{}" in largest["template"]
    assert json.loads(json.dumps(as_plain_data(found), allow_nan=False))["healthy"]


def test_a_test_set_is_counted_and_hashed_and_nothing_is_told_of_its_pictures(here):
    image(here, "secret/star/3").write_bytes(b"no image")
    found = diagnose(here)
    secret = found.sets["data.ood_test.secret"]
    assert secret["digest"]
    assert (secret["num_images"], secret["short_side"], secret["modes"]) == (36, None, {})
    assert (secret["num_unreadable"], secret["unreadable"], texts(found, "error")) == (0, [], [])
    (column,) = [one for one in checkup_table(found.sets, {}).columns if str(one.header) == "unreadable"]
    cells = dict(zip(found.sets, map(str, column.cells), strict=True))
    assert cells["data.ood_test.secret"] == ""  # not 0: it is not known
    assert set(found.zero_shot) == {"id_val", "fog"}


def spoil_image(here):
    image(here, "val/star/3").write_bytes(b"no image")


def contradict(here):
    shutil.copy(image(here, "train/circle/5"), image(here, "train/star/3"))


def mix_modes(here):
    for index, mode in enumerate(("L", "RGBA", "P")):
        path = image(here, f"train/star/{index}")
        Image.open(path).convert(mode).save(path)


def unbalance(here):
    for index in range(11):
        image(here, f"train/square/{index}").unlink()


def miss_class(here):
    for index in range(1, 12):  # 0.png is in the other half
        image(here, f"val/star/{index}").unlink()


def lose_class(here):
    (here / "images/fog/star").rename(here / "images/fog/stra")


def lose_class_of_test(here):
    (here / "images/secret/star").rename(here / "images/secret/stra")


def leak(here):
    shutil.copy(image(here, "train/star/7"), image(here, "secret/star/x"))


LONG = 'prompts.templates=["a {}", "' + "very " * 40 + '{}"]'
SICK = [
    (spoil_image, (), "error", "data.id_val: every image must be readable, but got 1 of 36 that are not, such as"),
    (spoil_image, ("data.id_val.on_bad_image=skip",), "warning", "They will be skipped."),
    (contradict, (), "warning", "data.train: an image must have one label, but got the same image under two labels"),
    (
        mix_modes,
        (),
        "note",
        "images of several modes are converted to RGB (docs/decoding.md): 33 RGB, 1 L, 1 RGBA, 1 P",
    ),
    (unbalance, (), "warning", "the sizes of the classes differ widely: 1 to 12 images, fewest of 'square'"),
    (miss_class, ("data.id_val.part=[0.5, 1]",), "note", "accuracy says nothing about a class without images: 2 of"),
    (unbalance, ("data.train.part=[0, 0.5]",), "warning", "a class without images is not learned: 2 of 3"),
    (lose_class, (), "error", "data.ood_val.fog: every class of a set must be in the class list, but got 'stra'; did"),
    (lose_class_of_test, (), "error", "data.ood_test.secret: every class of a set must be in the class list"),
    (leak, (), "note", "data.train: 1 image left out, also in data.ood_test.secret"),
    (leak, ("data.shared_images=fail",), "error", "ood_test.secret: a set has one role and must not share images with"),
    (None, ("data.cache_dir=r.yaml",), "error", "data.cache_dir: must be a writable folder, but got"),
    (
        None,
        ("model.name=local-dir:clop",),
        "error",
        "model.name: local-dir: must be followed by a folder that exists, but",
    ),
    (None, ("train.lora_rank=99",), "error", "train.lora_rank: must be at most 32, the smallest side of a matrix"),
    (None, ("prompts.class_names=[ring, ring, star]",), "note", "'ring' names 2 classes, which zero-shot cannot"),
    (None, (LONG,), "warning", "prompts: sentences must be shorter than the 32 tokens that the model reads, but got"),
    (None, ('prompts.templates=["a {}"]',), "warning", "prompts.templates: must spread over at least"),
]


@pytest.mark.parametrize(
    ("spoil", "overrides", "level", "message"), SICK, ids=[str((row[0] and row[0].__name__) or row[1]) for row in SICK]
)
def test_what_is_wrong_is_told_once_at_its_level(here, spoil, overrides, level, message):
    if spoil is not None:
        spoil(here)
    found = diagnose(here, *overrides)
    assert sum(message in text for text in texts(found, level)) == 1, [str(one.problem) for one in found.findings]
    assert bool(found.errors) == (level == "error")


def test_all_errors_are_told_at_once_with_exit_code_4_and_json_is_one_document(run, here):
    spoil_image(here)
    lose_class(here)
    code, out, err = run("doctor", "r.yaml")
    assert code == 4
    assert [text for text in ("every image must be readable", "'stra'") if text not in err] == []
    assert "train" in out
    code, out, _ = run("doctor", "r.yaml", "--json")
    sick = json.loads(out)
    assert (code, sick["healthy"]) == (4, False)
    assert [one["level"] for one in sick["findings"]].count("error") >= 2
    shutil.rmtree(here / "images")
    assert run("doctor", "r.yaml")[:2] == (4, "")  # no table where no set can be read


def test_quick_opens_no_image_writes_no_pairs_and_proposes_the_micro_batch_for_a_gpu(run, monkeypatch):
    monkeypatch.setattr("carft_ray.data.listing.StoredSource.content", None)
    quick = ("doctor", "r.yaml", "--quick")
    code, out, err = run(*quick)
    assert (code, "36" in out, "micro-batch" in out, "Next:" in err) == (0, True, False, True)
    for option, value, message in (
        ("--pairs", "pairs.csv", "--pairs: needs the images"),
        ("--pairs", "pairs.png", "must end in .csv"),
        ("--images", "20", "--images: needs the images"),
    ):
        code, _, err = run(*quick, option, value)
        assert (code, message in err) == (2, True)
    model = json.loads(run(*quick, "--memory-gb", "16", "--json")[1])["model"]
    assert (model["micro_batch"], model["gpu_gb"]) == (8, 16)  # the whole batch
    half = run(*quick, "--memory-gb", "16", "--set", "resources.gpus_per_worker=0.5", "--json")[1]
    assert json.loads(half)["model"]["gpu_gb"] == 8  # two trainings share a GPU
    assert re.fullmatch(r"micro-batch to begin with: 8; a step takes \S+ of 16 GB \(estimated\)", step_words(model))
    assert step_words({"micro_batch": 0, "step_gb": 30.1, "gpu_gb": 16}).startswith(
        "not even one image fits on the GPU: "
    )


@pytest.mark.parametrize(
    ("accuracy", "told"),
    [
        ((0.8, 0.6), []),
        ((0.8, 0.85), ["fog: no harder than id_val for the zero-shot model: 85.0 % against 80.0 % on id_val"]),
        (
            (0.8, 0.0),
            ["fog: zero-shot must be shown to be above chance (10.0 %), but got 0.0 % [0.0, 1.0] of 400 images"],
        ),
        ((0.1, 0.3), ["id_val: zero-shot must be shown to be above chance", "fog: no harder than id_val"]),
    ],
)
def test_zero_shot_at_chance_or_an_easy_shift_is_told(accuracy, told):
    numbers = [{"accuracy": value, "num_images": 400, "chance": 0.1, "at_chance": value <= 0.12} for value in accuracy]
    found = zero_shot_findings(dict(zip(("id_val", "fog"), numbers, strict=True)))
    assert [str(one.problem)[: len(text)] for one, text in zip(found, told, strict=True)] == told
    if told and "chance" in told[0]:
        for word in ("prompts.class_names", "order of the labels", "prompts.templates", "model.name"):
            assert word in found[0].problem.next_step


@pytest.mark.parametrize("name", ["pairs.csv", "pairs.html"])
def test_all_pairs_of_images_in_two_roles_are_written(here, name, capsys):
    for index in range(4):
        shutil.copy(image(here, f"train/circle/{index}"), image(here, f"secret/star/copy{index}"))
    assert call(["doctor", "r.yaml", "--pairs", name]) == 4
    text = (here / name).read_text()
    assert all(str(image(here, f"secret/star/copy{index}")) in text for index in range(4))
    assert text.count(f"{here}/images/") == 8
    assert text.count("same bytes") >= 4
    assert f"{name}: 4 pairs of images in two roles" in capsys.readouterr().err


def test_a_number_of_images_may_be_named_and_the_time_left_is_said(run, here, monkeypatch):
    monkeypatch.setattr(words, "FIRST_AFTER_S", -1.0)
    monkeypatch.setattr(words, "THEN_EVERY_S", 0.0)
    said = json.loads(run("doctor", "r.yaml", "--json", "--images", "10", "--set", "evaluate.batch_size=4")[1])
    assert {one["num_images"] for one in said["zero_shot"].values()} == {10}
    lines = []
    found = diagnose(here, "evaluate.batch_size=12", num_images=20, say=lines.append)
    assert {one["num_images"] for one in found.zero_shot.values()} == {20}
    assert any(line.startswith("measuring the zero-shot model: 20 of 40") for line in lines), lines
