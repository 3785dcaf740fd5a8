"""Class head and context head against NumPy and against open_clip's own zero-shot classifier."""

import numpy as np
import open_clip
import pytest
import torch
from conftest import CLASS_WORDS, TEMPLATES
from tiny import make_tiny_clip

from carft_ray.data.facts import load_facts
from carft_ray.learning import build_heads
from carft_ray.learning.clip import templates
from carft_ray.recipe.schema import PromptsPart


def test_class_head_equals_the_zero_shot_classifier_of_open_clip(tiny_clip):
    class_head, _ = build_heads(tiny_clip.model, tiny_clip.tokenizer, CLASS_WORDS, TEMPLATES)
    oracle = open_clip.build_zero_shot_classifier(tiny_clip.model, tiny_clip.tokenizer, CLASS_WORDS, TEMPLATES)
    torch.testing.assert_close(class_head, oracle.T, atol=1e-6, rtol=0)


def test_both_heads_equal_numpy_in_float64():
    clip = make_tiny_clip(dtype=torch.float64)
    class_head, context_head = build_heads(clip.model, clip.tokenizer, CLASS_WORDS, TEMPLATES, batch_size=2)
    with torch.no_grad():
        raw = np.stack(
            [clip.model.encode_text(clip.tokenizer([t.format(c) for c in CLASS_WORDS])).numpy() for t in TEMPLATES]
        )

    def normal(rows):
        return rows / np.linalg.norm(rows, axis=-1, keepdims=True)

    np.testing.assert_allclose(class_head.numpy(), normal(normal(raw).mean(axis=0)), atol=1e-9)
    np.testing.assert_allclose(context_head.numpy(), normal(normal(raw).mean(axis=1)), atol=1e-9)


def test_equal_class_words_are_allowed(tiny_clip):
    class_head, _ = build_heads(tiny_clip.model, tiny_clip.tokenizer, ("missile", "missile", "dog"), TEMPLATES)
    torch.testing.assert_close(class_head[0], class_head[1])


def test_no_class_or_no_template_is_refused(tiny_clip):
    for words, prompts in (((), TEMPLATES), (CLASS_WORDS, ())):
        with pytest.raises(ValueError, match="at least one template and one class"):
            build_heads(tiny_clip.model, tiny_clip.tokenizer, words, prompts)


def test_templates_are_those_of_the_benchmark_that_is_named():
    mine = ("a {}", "the {}")
    assert templates(PromptsPart(templates=mine), ()) == mine
    assert templates(PromptsPart(templates="dtd"), ()) == load_facts("dtd").templates
    assert templates(PromptsPart(templates="imagenet"), ()) == templates(PromptsPart(templates="openai"), ())
