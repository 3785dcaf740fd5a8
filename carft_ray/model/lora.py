"""LoRA (arXiv 2106.09685) for the image tower: a matrix W [O, I] of a block computes as W + scale * B @ A.

    A [r, I], uniform in +- 1 / sqrt(I)        B [O, r], 0 at the start        scale = lora_alpha / lora_rank

Only A and B train. With B = 0 the tower is the zero-shot model bit for bit. The three stacked projections of an
attention are one matrix, which the attention reads: it is given the sum. The layers of an MLP are called instead, and
add the two thin products, ``scale * B (A x)``: neither the sum nor its gradient [O, I] is made. Every state that leaves
the training holds plain merged weights (``merged_state``), so that mixing with alpha scales the merged correction and
no other module knows of LoRA.

Shape letters: O outputs, I inputs, r rank.
"""

import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

CORRECTION = "low_rank"  # of a layer that is called
STACKED = "in_proj_weight"  # of an attention: queries, keys and values


class LowRank(nn.Module):
    """Adds a correction of low rank to a matrix, outside autocast.

    Args:
        weight_OI: The matrix.
        rank: r.
        scale: Factor of the correction.
        generator: Draws A.
    """

    def __init__(self, weight_OI: Tensor, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        num_outputs, num_inputs = weight_OI.shape
        bound = num_inputs**-0.5
        start_rI = torch.empty(rank, num_inputs, dtype=weight_OI.dtype).uniform_(-bound, bound, generator=generator)
        self.A = nn.Parameter(start_rI.to(weight_OI.device))
        self.B = nn.Parameter(weight_OI.new_zeros(num_outputs, rank))
        self.scale = scale

    def forward(self, weight_OI: Tensor) -> Tensor:
        """Returns the matrix with its correction [O, I]."""
        with torch.autocast(weight_OI.device.type, enabled=False):
            return weight_OI + self.scale * (self.B @ self.A)

    def product(self, inputs: Tensor) -> Tensor:
        """Returns the correction times inputs, [..., I] -> [..., O]."""
        return self.scale * functional.linear(functional.linear(inputs, self.A), self.B)


def matrices(visual: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Returns which of the named parameters are matrices that LoRA adapts: of ``Linear`` layers and of attention."""
    found: dict[str, Tensor] = {}
    for name in names:
        holder, _, kind = name.rpartition(".")
        module = visual.get_submodule(holder)
        if (isinstance(module, nn.Linear) and kind == "weight") or kind == STACKED:
            found[name] = visual.get_parameter(name)
    return found


def add_corrections(visual: nn.Module, names: Iterable[str], rank: int, scale: float, seed: int) -> None:
    """Freezes a tower, in place, and adds trainable corrections to the named matrices (``matrices``)."""
    visual.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        holder, _, kind = name.rpartition(".")
        correction, module = LowRank(visual.get_parameter(name), rank, scale, generator), visual.get_submodule(holder)
        if "mlp" in holder.split("."):
            module.add_module(CORRECTION, correction)
            module.register_forward_hook(_corrected)
        else:
            parametrize.register_parametrization(module, kind, correction)


def _corrected(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    correction: LowRank = getattr(module, CORRECTION)
    return output + correction.product(inputs[0])


def plain_name(name: str) -> str:
    """Returns the name of the weight that a parameter is a part of: ``x.weight`` for the A of its correction."""
    name = re.sub(rf"\.{CORRECTION}\..*$", ".weight", name)
    return re.sub(r"\.parametrizations\.(\w+)\..*$", r".\1", name)


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns ``state_dict`` with plain merged weights in place of matrices and corrections; nothing else is copied."""
    state: dict[str, Tensor] = dict(model.state_dict())
    with torch.no_grad():
        for path, module in model.named_modules():
            if parametrize.is_parametrized(module):
                state |= {f"{path}.{kind}": getattr(module, kind).detach() for kind in module.parametrizations}
            elif hasattr(module, CORRECTION):
                state[f"{path}.weight"] = getattr(module, CORRECTION)(module.weight).detach()
    return {name: tensor for name, tensor in state.items() if name == plain_name(name)}


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Returns the part of ``merged_state`` that training changes."""
    trained = {plain_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: tensor for name, tensor in merged_state(model).items() if name in trained}
