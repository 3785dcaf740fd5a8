"""What two ranks of a real gloo group agree on when one of them has met something that the other has not."""

import pytest
import torch
from conftest import CLASS_WORDS, TEMPLATES, ArraySource
from test_lost import gloo
from tiny import make_tiny_clip

from carft_ray.model.heads import build_heads
from carft_ray.recipe.schema.fine_tuning import TrainConfig
from carft_ray.training.own_training import OwnInputs, own_fine_tune
from carft_ray.training.ranks import from_rank_0, gather

pytestmark = pytest.mark.slow


class NotPickledError(Exception):
    def __init__(self):
        super().__init__("of a user")
        self.lock = (one for one in ())


class NotOpenedError(Exception):
    """Is pickled, and cannot be made again with what it was pickled with."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


def raise_on_rank_0(context):
    for error in (NotPickledError(), NotOpenedError(1, 2)):

        def fail(error=error):
            raise error

        wanted = type(error) if context.rank == 0 else RuntimeError
        with pytest.raises(RuntimeError if context.rank else wanted, match=str(error)):
            from_rank_0(context, fail)
        assert gather(context, context.rank) == [0, 1]


def test_an_exception_that_does_not_travel_reaches_every_rank_in_words():
    assert gloo(raise_on_rank_0) == [0, 0]


def move_on_one_rank(context, folder):
    clip = make_tiny_clip()
    class_head_CD, _ = build_heads(clip.model, clip.tokenizer, CLASS_WORDS, TEMPLATES)
    inputs = OwnInputs(clip, class_head_CD, CLASS_WORDS, ArraySource(), ())
    epochs = []

    def on_epoch(state, epoch):
        epochs.append(gather(context, epoch))  # an evaluation is a collective
        return {}

    def function(values, own):
        own.report({"loss": 1.0})
        if own.rank == 1:
            with torch.no_grad():
                next(own.model.parameters()).add_(1)
        own.report({"loss": 1.0})
        own.report({"loss": 1.0}, own.model.state_dict() if own.rank == 0 else None)
        return own.model.state_dict() if own.rank == 0 else None

    own_fine_tune(function, TrainConfig(epochs=3), inputs, context, torch.device("cpu"), folder, on_epoch)
    assert epochs == [[2, 2], [3, 3]]


def test_an_epoch_is_evaluated_on_all_ranks_where_the_weights_of_one_have_moved(tmp_path):
    assert gloo(move_on_one_rank, tmp_path) == [0, 0]
