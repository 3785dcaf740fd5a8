"""The frozen model's context distributions: computed by the first training that needs them, read by later ones.

The distribution of (image, visit) depends on frozen model, prompts, scale and view alone. It is computed in blocks of
the visit's order (``target_blocks``), eagerly and in evaluation mode, and rounded to float16; the loss renormalises it.
A training uses the rounded values whether it has computed or read them, and whether anything is stored: on one kind of
device they are the same, bit for bit. The frozen tower is built at the first block that is not stored.

Shape letters: B images of a worker's part of a batch, K images of a block, T contexts, D embedding width.
"""

import hashlib
import json
import logging
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from carft_ray import environment
from carft_ray.data.source import IntArray, PixelArray, Source
from carft_ray.data.views import VIEW_VERSION, view_batch
from carft_ray.errors import StorageError
from carft_ray.learning.classifier import ImageClassifier, build_classifier
from carft_ray.learning.feeding import MakeViews, Upload, arrived, copy_stream, upload
from carft_ray.learning.losses import context_distribution
from carft_ray.learning.models.clip import Clip
from carft_ray.learning.target_blocks import BLOCK, FORMAT_VERSION, Rows, num_blocks, read_block, write_block
from carft_ray.recipe.fine_tuning import TrainConfig

KIND = "context distributions"  # what a row of the store is
MAX_UNWRITTEN = 32  # blocks that a training may be ahead of its disk

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Block:
    """A block while batches need it: its views are made at most once, and its targets computed or read once."""

    visit: int
    number: int
    indices: IntArray  # of its images [K]
    lock: threading.Lock = field(default_factory=threading.Lock)
    is_looked_up: bool = False
    pixels_KHWC: PixelArray | None = None  # where it is not stored
    uploaded: Upload | None = None  # its rows or pixels, on their way to the device
    p_KT: Tensor | None = None  # on the device


class Part(NamedTuple):
    """What a worker's part of a batch has of a block."""

    block: Block
    rows: slice


def store_dir(
    folder: Path, inputs_key: str, clip: Clip, context_head_TD: Tensor, train: TrainConfig, device: torch.device
) -> Path:
    """Returns the store for everything that decides a bit of a target; trainings that agree in it share a store.

    Args:
        folder: All stores of a study.
        inputs_key: Changes with weights, prompts and training set.
        clip: The model.
        context_head_TD: Unit rows [T, D].
        train: Seed, crop scale, context scale and precision.
        device: Where the training computes, with the threads that torch has now.
    """
    head_TD = context_head_TD.contiguous().cpu()
    head = hashlib.blake2b(head_TD.numpy().tobytes(), digest_size=16).hexdigest()
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    computed: list[str | int]
    if device.type == "cuda":
        computed = [torch.cuda.get_device_name(device), torch.get_float32_matmul_precision()]
    else:
        computed = [environment.cpu_model(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
    parts = [
        [KIND, FORMAT_VERSION, BLOCK],
        [inputs_key, clip.image_size, clip.mean, clip.std, head, str(head_TD.dtype), len(head_TD)],
        [VIEW_VERSION, train.seed, train.crop_scale, train.context_scale or clip.logit_scale, train.precision, bf16],
        [device.type, *computed, torch.__version__],
    ]
    return folder / hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()


class Targets:
    """The targets of one training, in one of its workers. A context manager: leaving it waits for what is written.

    Args:
        clip: The model to start from.
        context_head_TD: Unit rows [T, D].
        source: The training set.
        train: Seed, crop scale, context scale and precision decide which targets.
        device: Where the frozen model runs.
        store: Of ``store_dir``; None: nothing is read or written.
    """

    def __init__(
        self,
        clip: Clip,
        context_head_TD: Tensor,
        source: Source,
        train: TrainConfig,
        device: torch.device,
        store: Path | None = None,
    ) -> None:
        self.clip, self.source, self.train, self.device = clip, source, train, device
        self.context_head_TD = context_head_TD.to(device)
        self.context_scale = train.context_scale or clip.logit_scale
        self.store = self._write_to = store
        self.stream = copy_stream(device)
        self.frozen: ImageClassifier | None = None
        self._live: dict[tuple[int, int], Block] = {}
        self._unwritten: deque[Future[None]] = deque()
        self._writer: ThreadPoolExecutor | None = None

    def __enter__(self) -> "Targets":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._await_writes(MAX_UNWRITTEN if kind else 0)
        finally:
            if self._writer is not None:
                self._writer.shutdown(cancel_futures=True)

    def parts(self, visit: int, order: IntArray, first: int, num_images: int) -> list[Part]:
        """Returns the parts of blocks that hold consecutive positions of a visit's order; none without a KL term.

        Called for one batch after the other, in one thread. A block lives as long as batches that hold it.

        Args:
            visit: The epoch, from 0.
            order: The permutation of the visit [N].
            first: The first position.
            num_images: How many.
        """
        if not num_images or not self.train.kl_weight:
            return []
        end, found = first + num_images, []
        live: dict[tuple[int, int], Block] = {}
        for number in range(first // BLOCK, num_blocks(end)):
            start = number * BLOCK
            block = self._live.get((visit, number)) or Block(visit, number, order[start : start + BLOCK])
            live[visit, number] = block
            found.append(Part(block, slice(max(first - start, 0), min(end - start, BLOCK))))
        self._live = live
        return found

    def views(self, parts: Sequence[Part], indices: IntArray, visit: int, make: MakeViews = view_batch) -> PixelArray:
        """Returns the views of a worker's part of a batch, uint8 [B, S, S, 3]; any thread may call it.

        Of a block that is not stored all views are made, and kept for the batches that follow.

        Args:
            parts: Of ``parts``.
            indices: Of the images [B], one part behind the other.
            visit: The epoch, from 0.
            make: Makes them.
        """
        for part in parts:  # first what no other thread is at
            self._looked_up(part.block, make, waits=False)
        whole = [self._looked_up(part.block, make) for part in parts]
        if all(pixels_KHWC is None for pixels_KHWC in whole):
            return self._views_of(indices, visit, make)
        pieces, at = [], 0
        for part, pixels_KHWC in zip(parts, whole, strict=True):
            end = at + part.rows.stop - part.rows.start
            pieces.append(
                self._views_of(indices[at:end], visit, make) if pixels_KHWC is None else pixels_KHWC[part.rows]
            )
            at = end
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def of(self, parts: Sequence[Part]) -> Tensor | None:
        """Returns the rounded probabilities of a worker's part of a batch, float16 [B, T] on the device.

        None without a KL term.

        Raises:
            StorageError: The store cannot be read.
        """
        if not self.train.kl_weight:
            return None
        if not parts:  # of a last batch with fewer images than workers
            return torch.zeros(0, len(self.context_head_TD), dtype=torch.float16, device=self.device)
        return torch.cat([self._of_block(part.block)[part.rows] for part in parts])

    def _looked_up(self, block: Block, make: MakeViews = view_batch, waits: bool = True) -> PixelArray | None:
        """Returns the views of a block that is not stored, else None; also where another thread makes them meanwhile.

        Args:
            block: The block.
            make: Makes views.
            waits: Wait for the other thread.
        """
        if not block.lock.acquire(blocking=waits):
            return None
        try:
            if not block.is_looked_up:
                stored = self._read(block)
                if stored is None:
                    block.pixels_KHWC = self._views_of(block.indices, block.visit, make)
                    block.uploaded = upload([block.pixels_KHWC], self.stream)
                else:
                    block.uploaded = upload([stored], self.stream)
                block.is_looked_up = True
            return block.pixels_KHWC
        finally:
            block.lock.release()

    def _views_of(self, indices: IntArray, visit: int, make: MakeViews) -> PixelArray:
        train, ids = self.train, self.source.sample_ids[indices]
        return make(self.source, indices, ids, train.seed, visit, train.crop_scale, self.clip.image_size)

    def _read(self, block: Block) -> Rows | None:
        if self.store is None:
            return None
        stored = read_block(self.store, block.visit, block.number, len(block.indices), len(self.context_head_TD))
        return None if stored is None else stored.copy()  # torch warns of arrays that are read-only

    def _of_block(self, block: Block) -> Tensor:
        if block.p_KT is None:
            is_stored = self._looked_up(block) is None
            # another training may have written it since the views were made
            if not is_stored and (stored := self._read(block)) is not None:
                is_stored, block.uploaded = True, upload([stored], self.stream)
            (on_device,) = arrived(block.uploaded)  # type: ignore[arg-type]  # it is looked up
            block.p_KT = on_device if is_stored else self._compute(on_device)
            block.uploaded = None
            if not is_stored:
                self._write(block, block.p_KT)
        return block.p_KT

    @torch.no_grad()
    def _compute(self, pixels_KHWC: Tensor) -> Tensor:
        if self.frozen is None:
            unused_head_CD = self.context_head_TD[:1]  # of classes: only the image tower runs
            frozen = build_classifier(self.clip, unused_head_CD, self.train, self.device)
            self.frozen = frozen.eval().requires_grad_(False)
        features_KD = self.frozen.features(pixels_KHWC)
        return context_distribution(features_KD, self.context_head_TD, self.context_scale).exp().half()

    def _write(self, block: Block, p_KT: Tensor) -> None:
        """Gives a block to a thread that copies and writes it: no step waits for the device or for a network disk."""
        store = self._write_to
        if store is None:
            return
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, "targets")

        def write() -> None:
            write_block(store, block.visit, block.number, p_KT.cpu().numpy())

        self._unwritten.append(self._writer.submit(write))
        self._await_writes(MAX_UNWRITTEN)

    def _await_writes(self, num_left: int) -> None:
        """Waits until at most so many blocks are unwritten. Where they cannot be stored, nothing more is."""
        while self._unwritten and (len(self._unwritten) > num_left or self._unwritten[0].done()):
            try:
                self._unwritten.popleft().result()
            except StorageError as error:
                if self._write_to is not None:
                    logger.warning("The frozen model's targets are not kept for later trainings: %s", error)
                self._write_to = None
