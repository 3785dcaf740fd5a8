"""The layers of image towers, against open_clip's own `lock` and timm's layer decay."""

import logging

import open_clip
import pytest
import torch
from open_clip.model import _build_vision_tower
from timm.optim import param_groups_layer_decay
from torch import nn

from carft_ray.model.tower import layer_factors, layer_groups

pytestmark = pytest.mark.slow

# name -> number of layers: stem, blocks, and what stands after them
TOWERS = {
    "ViT-B-32": 12 + 2,
    "ViT-L-14-CLIPA": 24 + 2,
    "coca_ViT-B-32": 12 + 2,
    "RN50": 3 + 4 + 6 + 3 + 2,
    "ViT-B-16-SigLIP": 12 + 2,
    "EVA02-B-16": 12 + 2,
    "PE-Core-B-16": 12 + 2,
    "MobileCLIP2-B": 12 + 2,
    "convnext_base_w": 3 + 3 + 27 + 3 + 2,
}


def tower(name):
    config = open_clip.get_model_config(name)
    level = logging.getLogger().level
    with torch.device("meta"):
        visual = _build_vision_tower(config["embed_dim"], config["vision_cfg"])
    logging.getLogger().setLevel(level)
    return visual


@pytest.mark.parametrize("name", TOWERS)
def test_each_parameter_stands_in_one_layer_and_the_blocks_are_counted(name):
    visual = tower(name)
    groups = layer_groups(visual)
    names = [parameter for parameter, _ in visual.named_parameters()]
    assert sorted(parameter for group in groups for parameter in group) == sorted(names)
    assert len(groups) == TOWERS[name]
    assert all(group == [parameter for parameter in names if parameter in set(group)] for group in groups)


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-L-14-CLIPA"])
def test_the_last_layers_of_a_vit_are_those_that_open_clip_unlocks(name):
    for num_unlocked in (1, 2, 13):
        visual = tower(name)
        visual.lock(unlocked_groups=num_unlocked)
        trained = {parameter for parameter, value in visual.named_parameters() if value.requires_grad}
        assert trained == {parameter for group in layer_groups(visual)[-num_unlocked:] for parameter in group}


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP", "EVA02-B-16", "MobileCLIP2-S2", "swin_base_patch4_window7_224"])
def test_the_layers_of_a_timm_tower_are_those_of_its_layer_decay(name):
    visual = tower(name)
    theirs = param_groups_layer_decay(visual.trunk, layer_decay=0.5)
    factors = {id(parameter): group["lr_scale"] for group in theirs for parameter in group["params"]}
    ours = layer_factors(visual, 0.5)  # below one more layer, the class head
    after = 0.5 if name.startswith("swin") else 1.0  # timm does not know the projection that open_clip adds to it
    for parameter, value in visual.named_parameters():
        assert ours[parameter] == 0.5 * (after * factors[id(value)] if parameter.startswith("trunk.") else 1.0)


def test_attention_pooling_stands_before_the_last_norm_and_any_other_module_counts_its_children():
    assert "ln_post.weight" in layer_groups(tower("ViT-B-32"))[12]
    assert "ln_post.weight" in layer_groups(tower("coca_ViT-B-32"))[13]
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4))
    module.register_parameter("scale", nn.Parameter(torch.ones(1)))
    assert layer_groups(module) == [["scale"], ["0.weight", "0.bias"], ["2.weight", "2.bias"]]
