"""Class head and context head from the text tower.

Shape letters: T templates (contexts), C classes, D embedding width.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from carft_ray.learning.losses import at_least_float32

BATCH_SIZE = 512  # sentences; another one may change last bits


def build_heads(
    model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    class_names: Sequence[str],
    templates: Sequence[str],
    batch_size: int = BATCH_SIZE,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Tensor, Tensor]:
    """Returns ``(class_head [C, D], context_head [T, D])``, unit rows, float32 or wider.

    Each sentence is embedded and normalised; the class head averages the sentences of a class over the templates,
    the context head averages those of a template over the classes; both are normalised again (the protocol of CLIP's
    zero-shot classifier, and the same for contexts).

    Args:
        model: An open_clip model with ``encode_text``.
        tokenizer: Its tokenizer.
        class_names: C words; equal ones are allowed (ImageNet has two such pairs).
        templates: T sentences, each with ``{}`` for the class.
        batch_size: Sentences per pass through the text tower.
        on_progress: Told the number of sentences done and in all, after each pass.
    """
    if not class_names or not templates:
        raise ValueError("build_heads needs at least one template and one class")
    device = next(model.parameters()).device
    class_sums_CD = torch.zeros(())
    context_rows_D: list[Tensor] = []
    with torch.no_grad():
        for template in templates:
            sentences = [template.replace("{}", name) for name in class_names]
            parts = []
            for i in range(0, len(sentences), batch_size):
                tokens = tokenizer(sentences[i : i + batch_size]).to(device)
                parts.append(at_least_float32(model.encode_text(tokens)))  # type: ignore[operator]  # open_clip is untyped
                before = len(context_rows_D) * len(sentences)
                on_progress(before + min(i + batch_size, len(sentences)), len(templates) * len(sentences))
            text_CD = functional.normalize(torch.cat(parts), dim=-1)
            class_sums_CD = class_sums_CD.to(text_CD) + text_CD
            context_rows_D.append(text_CD.mean(0))
    class_head_CD = functional.normalize(class_sums_CD / len(templates), dim=-1)
    return class_head_CD, functional.normalize(torch.stack(context_rows_D), dim=-1)
