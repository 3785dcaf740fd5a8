"""onnxruntime computes what the classifier computes, for batches of any size."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from open_clip.timm_model import TimmModel
from tiny import make_resnet_clip
from torch.nn import functional

from carft_ray.model.classifier import ImageClassifier
from carft_ray.results.export.onnx import write_onnx

pytestmark = pytest.mark.whole  # torch traces and translates each tower: seconds


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
