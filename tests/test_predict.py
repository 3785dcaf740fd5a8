"""`predict`, the code of the model card and the predictions that a study has stored give the same answers."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import crash_host
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import short_training
import torch
from layouts_tables import encoded, mixed_modes, write_folder
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import carft_ray
from carft_ray.data.listing import sample_id
from carft_ray.launch.command import Plan, train_once
from carft_ray.recipe.loading import load_recipe
from carft_ray.untrusted import of_csv_cell

pytestmark = pytest.mark.slow  # trainings, and stock libraries in processes of their own
HEADINGS = {"open_clip": "open_clip", "huggingface": "transformers", "onnx": "onnxruntime"}
FORMATS = tuple(HEADINGS)
CLASSES = short_training.CLASSES
CLOSE = 1e-3  # of two probabilities; JPEGs are decoded by two libraries


def emoji(label, number):
    """A coloured shape with partly and fully transparent pixels, whose hidden colour is random; half are palettes."""
    rng = np.random.default_rng([label, number])
    pixels = rng.integers(0, 256, (20, 24, 4), np.uint8)
    pixels[..., 3] = 0
    pixels[4:16, 4 + label : 16 + label] = (50 * label, 255 - 50 * label, rng.integers(256), 255)
    pixels[6:9, 6:20, 3] = 128
    if number % 2:
        return encoded(Image.fromarray(pixels))
    palette = Image.fromarray(pixels[..., :3]).quantize(16)
    return encoded(palette, transparency=bytes([0, 0, 0, 128, *[255] * 12]))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A training whose id_val has 400 emoji and every mode of images, its export in all formats, and the folder."""
    folder = tmp_path_factory.mktemp("study")
    path = short_training.make(folder)
    for domain, count in (("photo", 8), ("photo_val", 80)):
        shutil.rmtree(folder / "images" / domain)
        for label, name in enumerate(CLASSES):
            (folder / "images" / domain / name).mkdir(parents=True)
            for number in range(count):
                content = emoji(label, number + 1000 * (count == 80))
                (folder / "images" / domain / name / f"{number}.png").write_bytes(content)
    write_folder(folder / "images" / "photo_val", mixed_modes(CLASSES))
    damaged = folder / "images" / "photo_val" / "star" / "damaged_exif.jpg"
    Image.new("RGB", (24, 20), (200, 55, 128)).save(damaged, exif=b"garbage!")
    overrides = ["train.head_bias=true", "train.alpha=0.7", "train.precision=fp32", "train.epochs=2"]
    train_once(Plan(load_recipe(path, [*overrides, "data.cache_dir=cache", "data.shared_images=keep"]), folder / "run"))
    carft_ray.export(folder / "run", folder / "export", formats=FORMATS)
    return folder


def only(study, form, to):
    """A copy of the export with one format alone."""
    files = {
        "open_clip": ("open_clip*", "no_merges*"),
        "huggingface": ("*config.json", "model.safetensors", "vocab.json", "merges.txt"),
        "onnx": ("model.onnx",),
    }
    to.mkdir()
    for pattern in ("class_head*", "README.md", *files[form]):
        for path in (study / "export").glob(pattern):
            if not (form == "huggingface" and path.name.startswith("open_clip")):
                shutil.copy(path, to)
    return to


def by_card(export, heading, paths):
    """What the code on the card prints in a process that cannot import carft_ray: path -> class, probability."""
    code = re.search(f"## Use with {heading}\n\n```python(.*?)```", (export / "README.md").read_text(), re.S)[1]
    for old, new in {'"FOLDER"': repr(str(export)), '["image.jpg"]': repr(paths)}.items():
        assert code.count(old) == 1
        code = code.replace(old, new)
    code = "import sys; sys.modules['carft_ray'] = None\n" + code
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=export, timeout=600)
    assert done.returncode == 0, done.stderr
    lines = (line.rsplit(" ", 2) for line in done.stdout.splitlines())
    return {path: (name, float(probability)) for path, name, probability in lines}


@pytest.mark.parametrize("form", FORMATS)
def test_predict_the_card_and_the_study_give_the_same_answers(study, form, tmp_path):
    export, images = only(study, form, tmp_path / "export"), study / "images" / "photo_val"
    found = carft_ray.predict(export, images, top=2, progress=False)
    assert found.numbers["format"] == form
    rows = found.rows.to_pylist()
    own = {first["file"]: (first, second) for first, second in zip(rows[::2], rows[1::2], strict=True)}
    assert list(own) == sorted(map(str, (path for path in images.rglob("*.*"))))
    stated = by_card(export, HEADINGS[form], list(own))
    ids = {sample_id(f"photo_val/{path.relative_to(images).as_posix()}"): str(path) for path in images.rglob("*.*")}
    (stored,) = (study / "run").rglob("validation.parquet")
    table = pq.read_table(stored).to_pylist()
    kept = {ids[row["sample_id"]]: row for row in table if row["set"] == "id_val" and row["alpha"] == 0.7}
    assert kept.keys() == own.keys()
    assert len(own) == 400 + 7 * len(CLASSES) + 1
    for path, (first, second) in own.items():
        name, probability = stated[path]
        assert abs(probability - first["probability"]) < CLOSE, path
        assert abs(kept[path]["confidence"] - first["probability"]) < CLOSE, path
        if first["probability"] - second["probability"] > CLOSE:
            assert name == first["class"] == CLASSES[kept[path]["prediction"]], path


@pytest.fixture
def run(study, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)

    def call(*words):
        capsys.readouterr()
        code = crash_host.call(["predict", *words])
        return code, *capsys.readouterr()

    return call


def test_an_unreadable_file_is_named_and_the_others_are_answered(study, run, tmp_path):
    folder = tmp_path / "in"
    for name in ("=b/x.png", "a.png", 'c,"d.png', "broken.png", "empty.jpg"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(emoji(1, 1) if "b" not in name[:1] and "empty" not in name else b"no image")
    code, out, err = run(study / "export", "in", "--to", "found.csv", "--json")
    assert code == 4
    assert "in/broken.png: must be a readable image" in err
    assert "2 of 5 that are not, such as in/broken.png" in err
    assert [each["file"] for each in json.loads(out)["unreadable"]] == ["in/broken.png", "in/empty.jpg"]
    with open("found.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [of_csv_cell(row["file"]) for row in rows] == ["in/=b/x.png", "in/a.png", 'in/c,"d.png']
    assert run(study / "export", "in/a.png")[1].startswith('"file","class","probability"\n"in/a.png",')


def test_the_kinds_of_files_and_of_tables_have_the_same_rows(study, run, tmp_path):
    names = [f"{number}.png" for number in range(3)]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(emoji(number, 1))
    (tmp_path / "t.csv").write_text("picture,name\n" + "".join(f"{name},row {name}\n" for name in names))
    pq.write_table(table_of_bytes(names), tmp_path / "b.parquet")
    expected = carft_ray.predict(study / "export", [tmp_path / name for name in names], progress=False).rows
    for given, options in (("t.csv", ("--image", "picture")), ("b.parquet", ("--id", "name"))):
        for to in ("x.csv", "x.parquet", "x.jsonl"):
            assert run(study / "export", given, *options, "--to", to)[0] == 0
        found = pq.read_table("x.parquet")
        assert found["probability"].to_pylist() == expected["probability"].to_pylist()
        assert found["file"].to_pylist() == names
        lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
        assert [line["class"] for line in lines] == expected["class"].to_pylist()


def table_of_bytes(names):
    return pa.table({"image": [Path(name).read_bytes() for name in names], "name": names})


BAD = [
    (("run", "images"), 2, "must be the folder of an export, but got a study\n    Write it: carft-ray export"),
    (("nothing", "images"), 2, "got no such folder"),
    (("export", "images", "--to", "x.txt"), 2, "(allowed: .csv, .parquet, .jsonl)"),
    (("export", "images", "--to", "no/x.csv"), 2, "must be in an existing folder"),
    (("export", "images", "--top", "9"), 2, "must be from 1 to 5"),
    (("export", "images", "--json"), 2, "needs --to"),
    (("export", "export"), 4, "must contain an image"),
    (("export", "missing.png"), 4, "no such file or folder"),
]


@pytest.mark.parametrize(("words", "expected", "text"), BAD)
def test_wrong_input_is_one_message(study, run, monkeypatch, words, expected, text):
    monkeypatch.chdir(study)
    code, out, err = run(*words)
    assert (code, out) == (expected, "")
    assert text in err


DAMAGE = {
    "names": lambda tensors, about: about.update(class_names=json.dumps(CLASSES[:3])),
    "no names": lambda tensors, about: about.pop("class_names"),
    "shape": lambda tensors, about: tensors.update(class_head=tensors["class_head"][:, :7].contiguous()),
    "bias": lambda tensors, about: tensors.update(class_bias=tensors["class_bias"][:2].contiguous()),
    "NaN": lambda tensors, about: tensors.update(class_head=tensors["class_head"] * torch.nan),
}


@pytest.mark.parametrize("form", ["open_clip", "onnx"])
@pytest.mark.parametrize("name", DAMAGE)
def test_a_head_that_does_not_match_is_one_message(study, run, tmp_path, name, form):
    export, image = only(study, form, tmp_path / "export"), study / "images" / "photo" / "star" / "0.png"
    path = export / "class_head.safetensors"
    with safe_open(path, "pt") as file:
        tensors, about = {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata())  # noqa: SIM118
    DAMAGE[name](tensors, about)
    save_file(tensors, path, about)
    code, out, err = run(export, image)
    if (name, form) == ("shape", "onnx"):  # whose head is inside the model
        assert code == 0
        return
    assert (code, out) == (4, "")
    assert err.startswith("error: ")
    assert "internal error" not in err


@pytest.mark.parametrize(
    "name", ["open_clip_config.json", "open_clip_model.safetensors", "class_head.safetensors", "model.onnx"]
)
@pytest.mark.parametrize("content", [b"", b"{}", b'{"model_cfg": {"vision_cfg": 1}}', b"\x80\x04.", None])
def test_a_damaged_file_of_an_export_is_one_message(study, run, tmp_path, name, content):
    form = "onnx" if name == "model.onnx" else "open_clip"
    export, image = only(study, form, tmp_path / "export"), study / "images" / "photo" / "star" / "0.png"
    path = export / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content is None else content)
    code, out, err = run(export, image)
    assert (code, out) == (4, ""), err
    assert err.startswith("error: ")


def test_ctrl_c_leaves_no_file_and_the_input_is_not_overwritten(study, run, tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(emoji(1, 1))
    (tmp_path / "t.csv").write_text("image\na.png\n")
    assert "must be another file than IMAGES" in run(study / "export", "t.csv", "--to", "t.csv")[2]

    def stop(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr("carft_ray.results.export.predict.answers", stop)
    code, _, err = run(study / "export", "t.csv", "--to", "x.csv")
    assert (code, "stopped; nothing was written" in err) == (130, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "t.csv"]


PEAK = """
import resource, sys
import carft_ray

carft_ray.predict(*sys.argv[1:4], progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.whole
def test_memory_does_not_grow_with_the_number_of_images(study, tmp_path):
    peaks = []
    for number in (1_000, 10_000):
        folder = tmp_path / str(number)
        folder.mkdir()
        for index in range(number):
            (folder / f"{index}.png").symlink_to(study / "images/photo_val/star" / f"{index % 80}.png")
        words = [study / "export", folder, tmp_path / f"{number}.parquet"]
        done = subprocess.run([sys.executable, "-c", PEAK, *words], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
        assert pq.read_metadata(words[2]).num_rows == number
    assert peaks[1] <= 1.2 * peaks[0]
