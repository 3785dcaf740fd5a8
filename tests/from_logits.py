"""Predictions as a model with these class logits has them."""

import numpy as np
import torch

from carft_ray.evaluation import predictions
from carft_ray.training.answers import answers, answers_between


def predictions_table(set_name, alpha, sample_ids, labels, logits_NC, groups=None):
    """Returns the table of N images; arrays or lists."""
    logits = torch.from_numpy(np.asarray(logits_NC, np.float32))
    answer = answers if groups is None else answers_between(groups, logits.device)
    found = answer(logits, torch.from_numpy(np.asarray(labels, np.int64)))
    return predictions.predictions_table(set_name, alpha, sample_ids, labels, found.numpy())
