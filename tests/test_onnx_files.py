"""onnxruntime computes what the classifier computes, for batches of any size."""

import numpy as np
import onnx
import onnxruntime
import open_clip
import pytest
import torch
from torch.nn import functional

from carft_ray.model.classifier import ImageClassifier
from carft_ray.model.clip import wrap_model
from carft_ray.results.export.onnx import write_onnx

pytestmark = pytest.mark.slow  # torch traces and translates each tower: seconds

TOWERS = {
    "resnet": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
    "timm": {"timm_model_name": "test_vit", "image_size": 160, "timm_pool": "", "timm_proj": "linear"},
}


def make(name):
    config = {"embed_dim": 16, "vision_cfg": TOWERS[name]}
    config["text_cfg"] = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    torch.manual_seed(0)
    model = open_clip.CLIP(**config)
    size = TOWERS[name]["image_size"]
    open_clip.set_model_preprocess_cfg(model, {**vars(open_clip.transform.PreprocessCfg()), "size": size})
    return wrap_model(model, open_clip.SimpleTokenizer(context_length=16), config)


@pytest.mark.parametrize("name", TOWERS)
def test_onnxruntime_gives_the_same_logits_and_features_for_any_batch(tmp_path, name):
    clip = make(name)
    head = functional.normalize(torch.randn(5, 16), dim=-1)
    classifier = ImageClassifier(clip.model.visual, head, 20.0, clip.mean, clip.std, bias=name == "timm").eval()
    if classifier.class_bias is not None:
        classifier.class_bias.data += torch.arange(5.0)
    write_onnx(tmp_path, classifier, clip.image_size, {"class_names": '["a"]'})
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)

    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map == {"class_names": '["a"]'}
    (given,) = session.get_inputs()
    assert (given.name, given.type, given.shape[1:]) == (
        "pixels",
        "tensor(uint8)",
        [clip.image_size, clip.image_size, 3],
    )
    rng = np.random.default_rng(0)
    for count in (1, 2, 5):
        pixels = rng.integers(0, 256, (count, clip.image_size, clip.image_size, 3), np.uint8)
        logits, features = session.run(["logits", "image_features"], {"pixels": pixels})
        with torch.no_grad():
            raw, expected = classifier(torch.from_numpy(pixels))
        np.testing.assert_allclose(logits, expected, atol=1e-4)
        np.testing.assert_allclose(features, functional.normalize(raw, dim=-1), atol=1e-5)
