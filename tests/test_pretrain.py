"""How the packaged weights of the sandbox are made: what captions say, the loss, and that a run repeats."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F

from benchmarks import effect, pretrain
from benchmarks.pretrain import contrastive_loss, true_templates
from carft_ray import model
from carft_ray.data.synthetic.sandbox import DOMAINS, TEMPLATES, render

WEIGHTS = Path(model.__file__).parent / "sandbox_weights"


def test_true_templates_name_what_is_seen_and_hide_what_is_not():
    for domain in DOMAINS:
        shown = render(domain, "train", "moon", 1)[1]
        captions = {TEMPLATES[i] for i in true_templates(shown)}
        assert {DOMAINS[domain], "a picture of a {}"} <= captions
        assert len(captions & set(DOMAINS.values())) == 1
        assert (f"a {shown.figure_colour} {{}}" in captions) == (domain not in {"negative", "silhouette"})
        assert (f"a {{}} on a {shown.ground_colour} ground" in captions) == (domain not in {"negative", "sketch"})


def test_contrastive_loss_is_the_loss_of_clip_when_no_caption_is_shared():
    generator = torch.Generator().manual_seed(0)
    images, texts = (F.normalize(torch.randn(7, 5, generator=generator), dim=1) for _ in range(2))
    expected = open_clip.ClipLoss()(images, texts, torch.tensor(20.0))
    torch.testing.assert_close(contrastive_loss(20.0 * images @ texts.T, torch.arange(7)), expected)


def test_packaged_weights_are_small_and_belong_to_the_code_that_makes_them():
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) <= 10_000_000
    config = json.loads((WEIGHTS / "open_clip_config.json").read_text())
    assert config == {"model_cfg": pretrain.MODEL_CONFIG, "preprocess_cfg": pretrain.PREPROCESS_CONFIG}


@pytest.mark.whole
def test_pretraining_writes_a_model_that_open_clip_opens_and_repeats_bit_for_bit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrain, "_NUM_PICTURES", 192)
    monkeypatch.setattr(pretrain, "_BATCH_SIZE", 16)
    for name in ("a", "b"):
        assert effect.main(["--pretrain", str(tmp_path / name), "--steps", "10"]) == 0
    first, second = ((tmp_path / name / "open_clip_model.safetensors").read_bytes() for name in ("a", "b"))
    assert first == second
    assert "step 10/10  loss " in capsys.readouterr().out
    open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'a'}")
