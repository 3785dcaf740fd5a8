"""An export opens with the libraries it is for in another process and gives the accuracy that was reported."""

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import crash_host
import numpy as np
import onnx
import onnxruntime
import open_clip
import pytest
import short_sealed
import short_training
import torch
from families import make_tokenizer
from open_clip.timm_model import TimmModel
from PIL import Image
from report_studies import make_recipe
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import load_folder, make_resnet_clip
from torch.nn import functional

import carft_ray
from carft_ray.data.role_checks import check_sets
from carft_ray.errors import StorageError, UsageError
from carft_ray.launch.command import Plan, train_once
from carft_ray.model.catalog import check_model
from carft_ray.model.classifier import ImageClassifier
from carft_ray.recipe.loading import load_recipe
from carft_ray.results.delivered import Choice
from carft_ray.results.export.export import export_model, model_card, preprocessing, usage
from carft_ray.results.export.onnx import write_onnx
from carft_ray.results.export.verify import TOLERANCE
from carft_ray.results.reading.trained import evaluate_trained, open_trained
from carft_ray.training.checkpoint import save_tensors
from carft_ray.training.evaluate import predict
from carft_ray.training.run_context import RunContext

# what a user of an export has: its folder, PNG images, and the code on its model card
STOCK = """
import contextlib, io, json, re, sys
from pathlib import Path

def num_right(export, images, library):
    card = (export / "README.md").read_text()
    code = re.search(f"## Use with {library}\\n\\n```python(.*?)```", card, re.S)[1]
    paths = [str(path) for path in sorted(images.glob("*/*.png"))]
    given = {'"FOLDER"': repr(str(export)), '["image.jpg"]': repr(paths)}
    for old, new in given.items():
        assert code.count(old) == 1
        code = code.replace(old, new)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {})
    told = {path: name for path, name, _ in (line.rsplit(" ", 2) for line in printed.getvalue().splitlines())}
    assert list(told) == paths
    return sum(Path(path).parent.name == name for path, name in told.items())

images, *words = sys.argv[1:]
asked = [(word, *word.rsplit(":", 1)) for word in words]
print(json.dumps({word: num_right(Path(export), Path(images), library) for word, export, library in asked}))
print([name for name in sys.modules if name.split(".")[0] in ("carft_ray", "ray", "optuna")])
"""
FORMS = {
    "plain": ["train.precision=fp64", "train.lora_rank=2", "train.ema_decay=0.5", "train.freeze_layers=1"],
    "biased": ["train.head_bias=true", "train.alpha=0.7", "train.precision=bf16"],
}
LIBRARIES = {"open_clip": "open_clip", "huggingface": "transformers", "onnx": "onnxruntime"}
ALWAYS = {"README.md", "class_head.safetensors", "recipe.yaml"}
FILES = {
    "open_clip": {"open_clip_config.json", "open_clip_model.safetensors", "no_merges.txt.gz"},
    "huggingface": {"config.json", "model.safetensors", "preprocessor_config.json"}
    | {"merges.txt", "tokenizer_config.json", "vocab.json"},
    "onnx": {"model.onnx"},
}

pytestmark = pytest.mark.slow  # trainings, and stock libraries in processes of their own


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forms")
    path = short_sealed.write(folder, short_training)
    for name, overrides in FORMS.items():
        recipe = load_recipe(path, [*short_sealed.settings(folder, 1), "train.epochs=2", *overrides])
        train_once(Plan(recipe, folder / name))
    return {name: open_trained(folder / name) for name in FORMS}


@pytest.fixture(scope="module")
def export(trained, tmp_path_factory):
    """The biased form in all formats; the libraries that open them say nothing on the terminal."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        found = export_model(
            trained["biased"], tmp_path_factory.mktemp("exports") / "biased", choice(trained["biased"]), tuple(FILES)
        )
    assert said.getvalue() == ""
    return found


def choice(training, alpha=None):
    """A training that nothing has measured again, at its alpha or at another one."""
    return Choice(training.name, training.result["alpha"] if alpha is None else alpha, "searched", "0" * 64, "it")


def stock_counts(exports, images):
    """Returns how many of a folder of PNG images each format of each export gets right, found in another process."""
    words = [f"{export.folder}:{LIBRARIES[name]}" for export in exports for name in export.formats]
    command = [sys.executable, "-W", "ignore", "-c", STOCK, str(images), *words]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=images, timeout=600)
    assert done.returncode == 0, done.stderr
    counts, others = done.stdout.splitlines()
    assert others == "[]"
    return json.loads(counts)


def right_and_close(training, tolerance):
    """Returns for how many images of id_val the class has the largest logit, and for how many that is close.

    It is where the largest logit and the one below it are within ``tolerance``: there rounding may decide otherwise.
    """
    classifier = training.classifier(training.result["alpha"])
    id_val = next(each for each in training.inputs.validation if each.name == "id_val")
    table = predict(classifier, id_val, 1.0, training.recipe.evaluate.batch_size, RunContext())
    with torch.inference_mode():
        logits = classifier(torch.from_numpy(id_val.images_NHWC.copy()))[1].float().sort(descending=True)[0]
    return table["rank"].to_pylist().count(1), int((logits[:, 0] - logits[:, 1] <= tolerance).sum())


@pytest.mark.whole
def test_stock_libraries_reproduce_the_reported_accuracy_from_the_images(trained, export, tmp_path):
    """Nothing of ours is imported; the code is that of each model card."""
    plain = export_model(trained["plain"], tmp_path / "plain", choice(trained["plain"]))
    images = Path(trained["plain"].recipe.data.id_val.path) / "photo_val"
    found = stock_counts([export, plain], images)
    for form, training in trained.items():
        train = training.recipe.train.model_copy(update={"precision": "fp32"})  # as its export
        single = dataclasses.replace(training, recipe=training.recipe.model_copy(update={"train": train}))
        right, close = right_and_close(single, 2 * TOLERANCE)
        counts = [count for word, count in found.items() if f"/{form}:" in word]
        assert len(counts) == {"plain": 1, "biased": 3}[form]
        assert all(abs(count - right) <= close for count in counts), form
        # logits of up to 20; what was measured in half precision has 8 bits of them
        _, close = right_and_close(training, {"plain": 2 * TOLERANCE, "biased": 2 * 20 / 2**8}[form])
        reported = round(training.result["metrics"]["accuracy/id_val"] * training.result["num_images"]["id_val"])
        assert abs(reported - right) <= close < 15, form


def test_an_export_has_the_chosen_alpha_and_the_files_of_its_formats_and_is_no_training(export):
    assert export.alpha == 0.7
    assert load_recipe(export.folder / "recipe.yaml").train.alpha == 0.7
    assert tuple(export.formats) == tuple(FILES)
    assert max(export.formats.values()) < 1e-4
    assert export.num_checked == 32
    assert {path.name for path in export.folder.iterdir()} == ALWAYS.union(*FILES.values())
    with safe_open(export.folder / "class_head.safetensors", "pt") as file:
        head = file.get_tensor("class_head")
        assert file.metadata()["alpha"] == "0.7"
    assert (head.shape[0], str(head.dtype)) == (5, "torch.float32")
    with pytest.raises(UsageError, match="give the study or training that it was made from"):
        open_trained(export.folder)


def test_the_model_card_gives_the_validation_accuracies_of_the_very_weights(trained):
    training = trained["plain"]
    for alpha in (0.0, training.result["alpha"]):
        card, metrics = model_card(training, choice(training, alpha), (), False), evaluate_trained(training, alpha)[0]
        rows = dict(re.findall(r"^\| (id_val|sketch) \| ([\d.]+) \|", card, re.M))
        assert rows == {name: f"{100 * metrics[f'accuracy/{name}']:.1f}" for name in ("id_val", "sketch")}
        assert f"Measured at alpha = {alpha:g}" in card
        assert alpha == 0 or metrics == training.result["metrics"]
        assert ("chosen on these sets" in card) == (alpha > 0)
    data = training.recipe.data.model_copy(update={"ood_val": {}})
    alone = dataclasses.replace(training, recipe=training.recipe.model_copy(update={"data": data}))
    told = "Selected on ID only: the recipe has no ood_val."
    assert [told in model_card(each, choice(each, alpha), (), False) for each in (training, alone)] == [False, True]
    model = training.recipe.model.model_copy(update={"name": "sandbox"})  # on images that are not drawn
    toy = dataclasses.replace(training, recipe=training.recipe.model_copy(update={"model": model}))
    assert "synthetic" not in model_card(toy, choice(toy, alpha), (), False)


def test_the_zero_shot_head_scores_mixed_features(trained):
    training = trained["biased"]
    start = training.classifier(0.0).state()
    head = {name: start[name] for name in ("class_head", "class_bias")}
    scored = dataclasses.replace(training, fine_tuned={**training.fine_tuned, **head})
    assert evaluate_trained(training, 0.7, zero_shot_head=True)[0] == evaluate_trained(scored, 0.7)[0]


def test_an_export_can_be_trained_on_and_its_recipe_with_images_and_model_beside_it(trained, export, tmp_path):
    """The names in it are those of the folders that the training had."""
    config = trained["biased"].inputs.clip.config
    merges = config["model_cfg"]["text_cfg"]["tokenizer_kwargs"]["bpe_path"]  # of its tokenizer, beside the weights
    opened = json.dumps(config).replace(merges, str(export.folder / Path(merges).name))
    assert json.dumps(load_folder(export.folder).config) == opened
    place = Path(trained["biased"].recipe.data.train.path).parent
    for name in ("images", "model"):
        (tmp_path / name).symlink_to(place / name)
    written = (export.folder / "recipe.yaml").read_text()
    assert "path: images\n" in written
    assert "name: local-dir:model\n" in written
    (tmp_path / "recipe.yaml").write_text(written)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert not check_model(recipe.model)
    assert not check_sets(recipe)


def test_an_export_holds_no_path_of_the_machine(trained, export):
    """Neither of its folders nor of the code that wrote it; the tiny model's own configuration names a file of it."""
    place = Path(trained["biased"].recipe.data.train.path).parent
    config = json.loads((place / "model" / "open_clip_config.json").read_text())
    named = json.dumps(config["model_cfg"]["text_cfg"]["tokenizer_kwargs"]["bpe_path"]).encode()
    code = (Path(library.__file__).parents[1] for library in (torch, carft_ray))
    private = [os.fsencode(path) for path in (place.parent, *code)]
    for path in export.folder.iterdir():
        content = path.read_bytes().replace(named, b"")
        assert [text for text in private if text in content] == [], path.name
        assert path.stat().st_mode & 0o777 == (export.folder / "README.md").stat().st_mode & 0o777


def test_the_model_card_names_the_licence_and_what_made_the_weights_and_holds_no_test_number(trained, export):
    assert trained["biased"].recipe.data.id_test is not None
    card = (export.folder / "README.md").read_text()
    assert "none is a test set" in card
    assert not re.search("photo_test|cartoon|painting|id_test|ood_test", card)
    assert card.startswith("# short: local-dir:model fine-tuned with CAR-FT")
    assert "The weights come from local-dir:model: its licence applies to them" in card
    assert re.findall("^## Use with (.*)", card, re.M) == list(LIBRARIES.values())
    assert "Classes, in the order of the logits: arrow, circle, heart, square, star." in card


def test_a_tokenizer_of_its_own_travels_with_the_export(trained, tmp_path, monkeypatch):
    """Without its files open_clip would ask a hub for them; here there is none of that name."""
    training = trained["plain"]
    folder = tmp_path / "model"
    shutil.copytree(training.recipe.model.name.removeprefix("local-dir:"), folder)
    config = json.loads((folder / "open_clip_config.json").read_text())
    del config["model_cfg"]["text_cfg"]["tokenizer_kwargs"]
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "nobody/nothing"
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    make_tokenizer(folder)
    clip = load_folder(folder)
    other = dataclasses.replace(training, inputs=dataclasses.replace(training.inputs, clip=clip))
    monkeypatch.setattr("carft_ray.results.export.export.farthest_logit", lambda *given: 0.0)  # seconds
    export = export_model(other, tmp_path / "export", choice(other))
    assert load_folder(export.folder).tokenizer(["a dark circle"])[0, :5].tolist() == [4, 9, 3, 2, 1]
    assert {"tokenizer.json", "tokenizer_config.json"} < {path.name for path in export.folder.iterdir()}
    assert not [path.name for path in export.folder.glob("tok*") if str(tmp_path) in path.read_text()]
    with pytest.raises(UsageError, match="a model with a tokenizer of another kind"):
        export_model(other, tmp_path / "refused", choice(other), ("huggingface",))


def not_a_number(path, state, about=None):
    save_file({name: torch.full(tensor.shape, torch.nan) for name, tensor in state.items()}, path, about)


def cut_off(path, state, about=None):
    save_file(state, path, about)
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("spoilt", "name", "message"),
    [
        (
            not_a_number,
            "open_clip",
            "open_clip must give the logits of the model within 0.001, but got a difference of nan",
        ),
        (cut_off, "open_clip", "open_clip must open the export, but got SafetensorError: "),
        (
            not_a_number,
            "huggingface",
            "transformers must give the logits of the model within 0.001, but got a difference",
        ),
        (lambda *given: None, "huggingface", "transformers must open the export, but got OSError: Error no file named"),
    ],
)
def test_an_export_of_other_logits_never_takes_its_name(trained, tmp_path, monkeypatch, spoilt, name, message):
    """Its weights are not numbers, cut off, or missing; the temporary name of the folder is not told."""

    def save(path, *given):
        write = spoilt if "model" in path.name else save_tensors
        write(path, *given)

    for module in ("export", "huggingface"):
        monkeypatch.setattr(f"carft_ray.results.export.{module}.save_tensors", save)
    with pytest.raises(StorageError) as caught:
        export_model(trained["plain"], tmp_path / "export", choice(trained["plain"]), (name,))
    assert str(caught.value).startswith(f"{tmp_path / 'export'}: {message}")
    assert list(tmp_path.iterdir()) == []


def test_a_format_whose_library_is_missing_is_told_before_anything_is_written(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError) as caught:
        export_model(trained["plain"], tmp_path / "export", choice(trained["plain"]), ("huggingface", "onnx"))
    for name, libraries, extra in (("huggingface", "transformers", "hf"), ("onnx", "onnx and onnxscript", "onnx")):
        assert f"--format: {name} needs {libraries}" in str(caught.value)
        assert f"Install it: pip install 'carft-ray[{extra}]'" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def clip_benchmark(export, set_name, root):
    """Returns what ``clip_benchmark eval`` finds out about an open_clip folder, in a process of its own."""
    # clip_benchmark 1.6.2 makes a float of an array with one element, which NumPy refuses since 2.4; no more is changed
    code = "import sys, clip_benchmark.cli as c; c.zeroshot_classification.float = lambda a: a.item(); c.main()"
    words = ["eval", "--dataset", f"wds/{set_name}", "--dataset_root", str(root), "--task", "zeroshot_classification"]
    words += ["--model", f"local-dir:{export}", "--pretrained", "", "--no_amp", "--num_workers", "0", "--quiet"]
    command = [sys.executable, "-W", "ignore", "-c", code, *words, "--output", str(root / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads((root / "found.json").read_text())["metrics"]


def write_webdataset(root, images, class_names, templates):
    """Writes a folder of PNG images as clip_benchmark wants its sets, with the prompts of a recipe."""
    (root / "test").mkdir(parents=True)
    (root / "classnames.txt").write_text("\n".join(class_names))
    prompts = [template.replace("{}", "{c}") for template in templates]
    (root / "zeroshot_classification_templates.txt").write_text("\n".join(prompts))
    (root / "test" / "nshards.txt").write_text("1")
    with tarfile.open(root / "test" / "0.tar", "w") as tar:
        for path in sorted(images.glob("*/*.png")):
            label = class_names.index(path.parent.name)
            (root / "label").write_text(str(label))
            tar.add(path, f"{label:02}_{path.stem}.png")
            tar.add(root / "label", f"{label:02}_{path.stem}.cls")


@pytest.mark.whole
def test_clip_benchmark_gives_the_accuracy_of_evaluate_with_the_zero_shot_head(trained, tmp_path, capsys):
    training = trained["plain"]
    plain = export_model(training, tmp_path / "plain", choice(training))
    place, inputs = Path(training.recipe.data.id_val.path), training.inputs
    write_webdataset(tmp_path / "wds", place / "photo_val", inputs.class_names, inputs.templates)
    found = clip_benchmark(plain.folder, "id_val", tmp_path / "wds")
    capsys.readouterr()
    assert crash_host.call(["evaluate", place.parent / "plain", "--head", "zero_shot", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)["metrics"]["accuracy/id_val"]
    zero_shot_head = {**training.fine_tuned, "class_head": training.classifier(0.0).state()["class_head"]}
    scored = dataclasses.replace(training, fine_tuned=zero_shot_head)
    right, close = right_and_close(scored, 2 * TOLERANCE)
    assert round(15 * printed) == right
    assert abs(round(15 * found["acc1"]) - right) <= close < 5


@pytest.mark.whole  # torch traces and translates each tower: seconds
@pytest.mark.parametrize("name", ["resnet", "timm"])
def test_onnxruntime_gives_the_same_logits_and_features_for_any_batch(tmp_path, name):
    clip, size, head = make_resnet_clip(), 32, functional.normalize(torch.randn(5, 16), dim=-1)
    visual = clip.model.visual
    if name == "timm":
        size, visual = 160, TimmModel("test_vit", embed_dim=16, image_size=160, pool="", proj="linear")
    classifier = ImageClassifier(visual, head, 20.0, clip.mean, clip.std, bias=name == "timm").eval()
    if classifier.class_bias is not None:
        classifier.class_bias.data += torch.arange(5.0)
    write_onnx(tmp_path, classifier, size, {"class_names": '["a"]'})
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)

    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map == {"class_names": '["a"]'}
    (given,) = session.get_inputs()
    assert (given.name, given.type, given.shape[1:]) == ("pixels", "tensor(uint8)", [size, size, 3])
    for count in (1, 5):
        pixels = np.random.default_rng(count).integers(0, 256, (count, size, size, 3), np.uint8)
        logits, features = session.run(["logits", "image_features"], {"pixels": pixels})
        with torch.no_grad():
            raw, expected = classifier(torch.from_numpy(pixels))
        np.testing.assert_allclose(logits, expected, atol=1e-4)
        np.testing.assert_allclose(features, functional.normalize(raw, dim=-1), atol=1e-5)


IN_WORDS = {
    "shortest": "RGB, the shorter side resized to 16 pixels, 16 x 16 cut out of the middle (",
    "longest": "RGB, the longer side resized to 16 pixels, padded with black to 16 x 16 (",
    "squash": "RGB, resized to 16 x 16 pixels (",
}


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", IN_WORDS)
def test_the_code_for_onnx_resizes_and_crops_as_open_clip_and_as_the_words_say(tiny_clip, mode, interpolation):
    given = {"resize_mode": mode, "interpolation": interpolation}
    config = {"preprocess_cfg": {**tiny_clip.config["preprocess_cfg"], "size": 16, **given}}
    clip = dataclasses.replace(tiny_clip, config=config)
    mean = "(0.48145466, 0.4578275, 0.40821073), std (0.26862954, 0.26130258, 0.27577711)"
    assert preprocessing(clip) == f"{IN_WORDS[mode]}{interpolation}), divided by 255, mean {mean}"
    code = usage("onnx", clip, has_bias=False).partition("```python\n")[2].partition("session =")[0]
    names = {}
    exec(code, names)
    stock = open_clip.image_transform(16, is_train=False, mean=(0, 0, 0), std=(1, 1, 1), **given)
    rng = np.random.default_rng(0)
    for width, height in ((16, 16), (40, 17), (23, 51), (7, 9), (16, 33)):  # smaller than the input too
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        found = names["pixels"](image)
        assert (found.shape, found.dtype) == ((16, 16, 3), np.uint8)
        np.testing.assert_array_equal(found, (stock(image).numpy() * 255).round().transpose(1, 2, 0))


def test_names_stand_on_the_card_as_they_are(tiny_clip):
    recipe, strange = make_recipe(), ["[x](https://elsewhere.example)", "<img src=x>", "a|b", "`c`\x1b", "line\n# two"]
    point = {"alpha": 1.0, "accuracy/id_val": 0.5}
    result = {"curve": [point], "alpha": 1.0, "num_images": {"id_val": 8}, "train": {"epochs": 2}}
    inputs = SimpleNamespace(clip=tiny_clip, class_names=strange)
    trained = SimpleNamespace(recipe=recipe, result=result, inputs=inputs, name="run_<b>", shared=["<i> and `j`"])
    card = model_card(trained, choice(trained), (), has_bias=False)
    assert r"\[x\](https://elsewhere.example), \<img src=x\>, a\|b, \`c\`\\x1b, line # two" in card
    assert r"from run\_\<b\>." in card
    assert r"- \<i\> and \`j\`" in card
