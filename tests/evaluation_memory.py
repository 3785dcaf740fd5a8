"""Evaluates random images on a classifier of one layer and prints what that took of this process's memory.

    python evaluation_memory.py IMAGES CLASSES [GROUPS]     GROUPS of two classes each

Prints bytes of the peak above what the process had before, and seconds, as JSON.
"""

import json
import resource
import sys
import time

import numpy as np
import torch
from torch import nn

from carft_ray.data.source import ImageSet
from carft_ray.training.evaluate import predict
from carft_ray.training.run_context import RunContext

SIDE, BATCH = 8, 128


class StandIn(nn.Module):
    """Pixels -> features and class logits, as ``ImageClassifier``."""

    def __init__(self, num_classes):
        super().__init__()
        self.class_head = nn.Parameter(torch.randn(num_classes, 3 * SIDE * SIDE))

    def forward(self, pixels_BHWC):
        features_BD = pixels_BHWC.flatten(1).float() / 255
        return features_BD, features_BD @ self.class_head.T


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(num_images, num_classes, num_groups=0):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng, classifier = np.random.default_rng(0), StandIn(num_classes)
    images = rng.integers(0, 256, (num_images, SIDE, SIDE, 3), dtype=np.uint8)
    labels = 2 * rng.integers(0, num_groups, num_images) if num_groups else rng.integers(0, num_classes, num_images)
    groups = tuple((2 * index, 2 * index + 1) for index in range(num_groups)) or None
    given = ImageSet("id_val", images, labels, np.arange(num_images, dtype=np.uint64), groups)
    first = ImageSet("id_val", images[:8], labels[:8], given.sample_ids[:8], groups)
    predict(classifier, first, 1.0, BATCH, RunContext())  # what a process needs once
    before, began = peak(), time.perf_counter()
    table = predict(classifier, given, 1.0, BATCH, RunContext())
    found = {"bytes": peak() - before, "seconds": time.perf_counter() - began, "whole": peak(), "table": table.nbytes}
    return {**found, "images": num_images}


if __name__ == "__main__":
    print(json.dumps(measure(*map(int, sys.argv[1:]))))
