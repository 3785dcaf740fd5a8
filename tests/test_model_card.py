"""The code on a model card makes the pixels that open_clip's own transform makes."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
from PIL import Image
from report_studies import make_recipe

from carft_ray.results.export import model_card

SIZES = ((16, 16), (40, 17), (23, 51), (7, 9), (16, 33))  # width, height; smaller than the input too


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_the_code_for_onnx_resizes_and_crops_as_open_clip(tiny_clip, mode, interpolation):
    given = {"size": 16, "resize_mode": mode, "interpolation": interpolation}
    config = {"preprocess_cfg": {**tiny_clip.config["preprocess_cfg"], **given}}
    clip = dataclasses.replace(tiny_clip, config=config)
    code = model_card.usage("onnx", clip, has_bias=False).partition("```python\n")[2].partition("session =")[0]
    names = {}
    exec(code, names)
    stock = open_clip.image_transform(
        16, is_train=False, mean=(0, 0, 0), std=(1, 1, 1), resize_mode=mode, interpolation=interpolation
    )
    rng = np.random.default_rng(0)
    for width, height in SIZES:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        found = names["pixels"](image)
        assert (found.shape, found.dtype) == ((16, 16, 3), np.uint8)
        np.testing.assert_array_equal(found, (stock(image).numpy() * 255).round().transpose(1, 2, 0))


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("shortest", "RGB, the shorter side resized to 16 pixels, 16 x 16 cut out of the middle (bicubic), "),
        ("longest", "RGB, the longer side resized to 16 pixels, padded with black to 16 x 16 (bicubic), "),
        ("squash", "RGB, resized to 16 x 16 pixels (bicubic), "),
    ],
)
def test_the_preprocessing_in_words(tiny_clip, mode, words):
    config = {"preprocess_cfg": {**tiny_clip.config["preprocess_cfg"], "resize_mode": mode}}
    said = model_card.preprocessing(dataclasses.replace(tiny_clip, config=config))
    assert said == (
        f"{words}divided by 255, mean (0.48145466, 0.4578275, 0.40821073), std (0.26862954, 0.26130258, 0.27577711)"
    )


def test_names_stand_on_the_card_as_they_are(tiny_clip):
    recipe, strange = make_recipe(), ["[x](https://elsewhere.example)", "<img src=x>", "a|b", "`c`\x1b", "line\n# two"]
    point = {"alpha": 1.0, "accuracy/id_val": 0.5}
    result = {"curve": [point], "alpha": 1.0, "num_images": {"id_val": 8}, "train": {"epochs": 2}}
    inputs = SimpleNamespace(clip=tiny_clip, class_names=strange)
    trained = SimpleNamespace(recipe=recipe, result=result, inputs=inputs, name="run_<b>", shared=["<i> and `j`"])
    card = model_card.model_card(trained, 1.0, (), has_bias=False)
    assert r"\[x\](https://elsewhere.example), \<img src=x\>, a\|b, \`c\`\\x1b, line # two" in card
    assert r"from run\_\<b\>." in card
    assert r"- \<i\> and \`j\`" in card
