"""The target store: context distributions of the frozen model, computed once and used by all trainings of a study.

The distribution for (image, visit) depends on frozen model, prompts, scale and view only, so with it CAR-FT costs what
plain fine-tuning costs. One memory-mapped array a visit, float16 probabilities [N, T]; the loss renormalises them.
Where a visit is not stored, the loop runs the frozen model as usual.
"""

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from carft_ray import files
from carft_ray.data.source import IntArray
from carft_ray.data.views import VIEW_VERSION, view_batch
from carft_ray.evaluation.shared_inputs import SharedInputs
from carft_ray.learning.classifier import ImageClassifier, build_classifier
from carft_ray.learning.losses import context_distribution
from carft_ray.learning.memory import in_batches
from carft_ray.recipe.fine_tuning import TrainConfig
from carft_ray.recipe.parameters import FloatParameter, IntParameter
from carft_ray.recipe.schema import Recipe

VIEW_FIELDS = ("crop_scale", "context_scale")  # searched over, every trial has other targets


class TargetStore:
    """Targets for one way to make views; ``read`` is the ``StoredTargets`` of the training loop.

    Args:
        train: Seed, crop scale, context scale and precision decide which targets.
        inputs: Model, prompts and training set.
        context_head_TD: Unit rows [T, D].
        folder: All targets of the study.
    """

    def __init__(self, train: TrainConfig, inputs: SharedInputs, context_head_TD: Tensor, folder: Path) -> None:
        self.train = train
        self.inputs = inputs
        self.context_head_TD = context_head_TD
        self.context_scale = train.context_scale or inputs.clip.logit_scale
        parts = [inputs.key, VIEW_VERSION, train.seed, train.crop_scale, self.context_scale, train.precision]
        self.folder = folder / hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()
        self._open: dict[int, npt.NDArray[np.float16]] = {}

    def read(self, indices: IntArray, visit: int) -> npt.NDArray[np.float16] | None:
        """Returns the probabilities [B, T] of these rows at this visit, or None when they are not stored."""
        if visit not in self._open:
            path = self._path(visit)
            if not files.exists(path):
                return None
            self._open[visit] = np.load(path, mmap_mode="r", allow_pickle=False)
        return self._open[visit][indices]

    def num_stored(self, num_visits: int) -> int:
        """Returns how many of the first visits are stored."""
        return sum(files.exists(self._path(visit)) for visit in range(num_visits))

    def fill(self, recipe: Recipe, device: torch.device, say: Callable[[str], None]) -> None:
        """Computes what is missing, one epoch after the other; says so, and says why when nothing is stored."""
        space = recipe.search.space
        searched = [name for name in VIEW_FIELDS if name in space]
        if searched:
            say(f"the frozen model runs in every trial: {' and '.join(searched)} in the search space changes targets")
            return
        if recipe.train.kl_weight == 0 and "kl_weight" not in space:
            return
        epochs = space.get("epochs")
        num_visits = int(epochs.high) if isinstance(epochs, IntParameter | FloatParameter) else recipe.train.epochs
        missing = [visit for visit in range(num_visits) if not files.exists(self._path(visit))]
        if not missing:
            return
        unused_head_CD = self.context_head_TD[:1]  # of classes; only the image tower runs
        frozen = build_classifier(self.inputs.clip, unused_head_CD, self.train, device).eval().requires_grad_(False)
        for visit in missing:
            say(f"storing the frozen model's context distributions, epoch {visit + 1} of {num_visits}")
            buffer = io.BytesIO()
            np.save(buffer, self._compute(frozen, visit, recipe.evaluate.batch_size), allow_pickle=False)
            files.write_bytes(self._path(visit), buffer.getvalue())

    def _compute(self, frozen: ImageClassifier, visit: int, batch_size: int) -> npt.NDArray[np.float16]:
        source, device = self.inputs.train, frozen.class_head.device
        context_head_TD, image_size = self.context_head_TD.to(device), self.inputs.clip.image_size
        train = self.train

        def distributions(indices: npt.NDArray[np.int64]) -> npt.NDArray[np.float16]:
            ids = source.sample_ids[indices]
            pixels_BHWC = view_batch(source, indices, ids, train.seed, visit, train.crop_scale, image_size)
            with torch.inference_mode():
                features_BD = frozen.features(torch.from_numpy(pixels_BHWC).to(device))
                p_BT = context_distribution(features_BD, context_head_TD, self.context_scale).exp()
            return p_BT.half().cpu().numpy()

        everything = np.arange(len(source), dtype=np.int64)
        return np.concatenate(in_batches(distributions, everything, batch_size, image_size, device))

    def _path(self, visit: int) -> Path:
        return self.folder / f"visit-{visit:04d}.npy"
