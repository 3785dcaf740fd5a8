"""One model of each family: loaded, preprocessed, with its tokenizer and heads, against stock open_clip."""

import numpy as np
import open_clip
import pytest
import torch
from families import FAMILIES, make_folder
from PIL import Image
from tiny import load_folder
from torch.nn import functional

from carft_ray.model.classifier import ImageClassifier
from carft_ray.model.heads import build_heads
from carft_ray.model.tower import layer_groups
from carft_ray.model.weights_files import quiet
from carft_ray.training.car_ft_loss import context_distribution, context_kl

TEMPLATES = ("a photo of a {}", "a sketch of the {}")
WORDS = ("cat", "dog", "car")
OFTEN = ("openai-resnet", "siglip2", "coca")  # the others in `make test-whole`


def picture(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in OFTEN else pytest.mark.whole) for name in FAMILIES]
)
def test_a_family_is_as_in_stock_open_clip_its_kl_zero_at_step_0_and_a_gradient_reaches_every_layer(tmp_path, name):
    family, folder = FAMILIES[name], make_folder(FAMILIES[name], tmp_path)
    with quiet():
        model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    clip = load_folder(folder)
    model.eval()

    tokens = clip.tokenizer(["a photo of a cat", "the dog"])
    assert tokens.tolist() == tokenizer(["a photo of a cat", "the dog"]).tolist()
    assert tokens.shape == (2, family.context_length)
    class_head, context_head = build_heads(clip.model, clip.tokenizer, WORDS, TEMPLATES)
    expected = open_clip.build_zero_shot_classifier(model, tokenizer, WORDS, TEMPLATES)
    torch.testing.assert_close(class_head, expected.T, atol=1e-5, rtol=0)
    assert context_head.shape == (len(TEMPLATES), class_head.shape[1])
    assert not torch.allclose(class_head[0], class_head[1], atol=1e-4)
    assert clip.logit_scale == pytest.approx(model.logit_scale.exp().item())

    classifier = ImageClassifier(clip.model.visual, class_head, clip.logit_scale, clip.mean, clip.std).eval()
    pictures = [picture(300, 200), picture(500, 450)]
    pixels = torch.from_numpy(np.stack([np.asarray(clip.to_input(image)) for image in pictures]))
    with torch.inference_mode():
        images = torch.stack([preprocess(image) for image in pictures])
        expected = functional.normalize(model.encode_image(images), dim=-1)
        features = classifier.features(pixels)
    assert pixels.shape[1:3] == (clip.image_size, clip.image_size)
    torch.testing.assert_close((pixels.permute(0, 3, 1, 2) / 255 - classifier.mean) / classifier.std, images)
    torch.testing.assert_close(functional.normalize(features, dim=-1), expected, atol=1e-5, rtol=0)
    assert not torch.allclose(expected[0], expected[1], atol=1e-5)  # it tells images apart

    classifier.train()
    with torch.no_grad():
        zero_shot = classifier.features(pixels)
    features, logits = classifier(pixels)
    log_p, log_p0 = (
        context_distribution(end.detach(), context_head, clip.logit_scale) for end in (features, zero_shot)
    )
    assert (context_kl(log_p, log_p0) == 0).all()
    functional.cross_entropy(logits, torch.tensor([0, 1])).backward()
    groups = layer_groups(classifier.visual)
    assert len(groups) == family.layers
    gradients = {name: value.grad for name, value in classifier.visual.named_parameters()}
    for group in groups:
        assert any(gradients[name] is not None and gradients[name].abs().sum() > 0 for name in group), group
