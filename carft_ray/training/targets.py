"""The frozen model's context distributions: computed by the first training that needs them, read by later ones.

The distribution of (image, visit) depends on frozen model, prompts, scale and view alone. It is computed in blocks of
64 positions of the visit's order, eagerly and in evaluation mode, and rounded to float16; the loss renormalises it. So
its bits depend neither on batch size, rank and number of workers, nor on who asks first. A training uses the rounded
values whether it has computed or read them, and whether anything is stored: on one kind of device they are the same,
bit for bit. The frozen tower is built at the first block that is not stored.

A GPU that neither reads nor stores them computes them for the images of a batch, which lie there already, in passes of
the micro-batch and compiled where the other tower is: nobody else sees them, and no bit is promised there but with
``train.deterministic``.

Other penalties than the KL of the contexts need more of the frozen model. A training that has one runs the frozen model
once on each of its batches, in passes of the micro-batch, for all of its penalties, and neither reads nor stores. So
does one whose teacher moves: its tower is a running mean of the student's weights (``mixing``), its class head stays.

A visit is one file of the cache, ``STORE/visit-0003``, in a folder that carft-ray has made (``cache.own_folder``).
Block b begins at a multiple of the size of a block: 8 bytes, a hash of its place and content, then float16
[images, contexts], little-endian. Nothing is flushed or locked: a block that is missing, half written or damaged does
not have its hash, and is computed again. Two that write a block write the same bytes.

Shape letters: B images of a worker's part of a batch, K images of a block, T contexts, D embedding width.
"""

import hashlib
import logging
import os
import threading
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from carft_ray import environment
from carft_ray.data.cache import key_of, own_folder
from carft_ray.data.source import IntArray, PixelArray, Source
from carft_ray.data.views import VIEW_VERSION, view_batch
from carft_ray.model.classifier import ImageClassifier, build_classifier
from carft_ray.model.clip import Clip, model_key
from carft_ray.model.device import compute_dtype, computed_on
from carft_ray.model.tower import compile_passes
from carft_ray.recipe.schema.train import TrainConfig
from carft_ray.training.car_ft_loss import context_distribution
from carft_ray.training.other_penalties import RandomTexts, Reference
from carft_ray.training.prefetch import MakeViews, Upload, arrived, copy_stream, upload

TARGETS = "targets"  # all stores, in the cache
BLOCK = 64  # images; a forward pass of this size fills a GPU, and a part of a batch rarely is smaller
FORMAT_VERSION = 2
_HASH_BYTES = 8
_DTYPE = np.dtype("<f2")
Rows = npt.NDArray[np.float16]

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Block:
    """A block of 64 images, kept until no batch needs it: its views and its targets are made or read at most once."""

    visit: int
    number: int
    indices: IntArray  # of its images [K]
    lock: threading.Lock = field(default_factory=threading.Lock)
    pixels_KHWC: PixelArray | None = None  # where it is not stored
    uploaded: Upload | None = None  # its rows or pixels, on their way to the device
    p_KT: Tensor | None = None  # on the device


class Part(NamedTuple):
    """What a worker's part of a batch has of a block."""

    block: Block
    rows: slice


def store_dir(
    folder: Path, source_key: str, clip: Clip, context_head_TD: Tensor, train: TrainConfig, device: torch.device
) -> Path:
    """Returns the store for everything that decides a bit of a target; trainings that agree in it share a store.

    Args:
        folder: All stores.
        source_key: Changes with the images of the training set, their order and their pixels.
        clip: The model.
        context_head_TD: Unit rows [T, D].
        train: Seed, crop scale, context scale and precision.
        device: Where the training computes, with the threads that torch has now.
    """
    head_TD = context_head_TD.contiguous().cpu()
    head = hashlib.blake2b(head_TD.numpy().tobytes(), digest_size=16).hexdigest()
    dtype = str(compute_dtype(train, device))
    parts = [
        [FORMAT_VERSION, BLOCK, source_key, environment.versions_of(("torch", "open_clip_torch", "timm"))],
        [model_key(clip), clip.image_size, clip.mean, clip.std, head, str(head_TD.dtype), len(head_TD)],
        [VIEW_VERSION, train.seed, train.crop_scale, train.context_scale or clip.logit_scale, train.precision, dtype],
        [device.type, *computed_on(device)],
    ]
    return folder / key_of(parts)


def by_batches(train: TrainConfig, device: torch.device, store: Path | None) -> bool:
    """Tells whether targets are computed for the images of a batch, not in blocks."""
    return not train.shares_targets or (device.type == "cuda" and store is None and not train.deterministic)


class Targets:
    """The targets of one training, in one of its workers. A context manager: leaving it waits for what is written.

    Args:
        clip: The model to start from.
        context_head_TD: Unit rows [T, D].
        source: The training set.
        train: Seed, crop scale, context scale and precision decide which targets.
        device: Where the frozen model runs.
        store: Of ``store_dir``; None: nothing is read or written.
        micro_batch: Images of a pass of the frozen model, where they are not those of a block.
        class_head_CD: Unit rows [C, D]; None: no class logits are needed.
    """

    def __init__(
        self,
        clip: Clip,
        context_head_TD: Tensor,
        source: Source,
        train: TrainConfig,
        device: torch.device,
        store: Path | None = None,
        micro_batch: int = BLOCK,
        class_head_CD: Tensor | None = None,
    ) -> None:
        self.clip, self.source, self.train, self.device, self.store = clip, source, train, device, store
        self.context_head_TD = context_head_TD.to(device)
        self.context_scale = train.context_scale or clip.logit_scale
        self.stream = copy_stream(device)
        self.class_head_CD = self.context_head_TD[:1] if class_head_CD is None else class_head_CD
        self.frozen: ImageClassifier | None = None
        self.texts: RandomTexts | None = None
        self._live: dict[tuple[int, int], Block] = {}
        self._writer = ThreadPoolExecutor(1, "targets")
        self._failed = False
        self._pass = micro_batch if by_batches(train, device, store) else 0

    def __enter__(self) -> "Targets":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._writer.shutdown(cancel_futures=kind is not None)

    def parts(self, visit: int, order: IntArray, first: int, num_images: int) -> list[Part]:
        """Returns the parts of blocks that hold consecutive positions of a visit's order; none where none is needed.

        Called for one batch after the other, in one thread. A block lives as long as batches that hold it.

        Args:
            visit: The epoch, from 0.
            order: The permutation of the visit [N].
            first: The first position.
            num_images: How many.
        """
        if not num_images or not self.train.kl_weight or self._pass:
            return []
        end, found = first + num_images, []
        live: dict[tuple[int, int], Block] = {}
        for start in range(first - first % BLOCK, end, BLOCK):
            number = start // BLOCK
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
        whole = [self._begun(part.block, make).pixels_KHWC for part in parts]
        if all(pixels_KHWC is None for pixels_KHWC in whole):
            return self._views_of(indices, visit, make)
        return np.concatenate(
            [
                self._views_of(block.indices[rows], visit, make) if pixels_KHWC is None else pixels_KHWC[rows]
                for (block, rows), pixels_KHWC in zip(parts, whole, strict=True)
            ]
        )

    def of(self, parts: Sequence[Part], pixels_BHWC: Tensor, step: int) -> Reference:
        """Returns what the penalties compare a worker's part of a batch with, on the device.

        The probabilities of the contexts are rounded to float16.

        Args:
            parts: Of ``parts``.
            pixels_BHWC: Its views, on the device.
            step: The update, from 0.
        """
        if self.train.shares_targets or not self.train.compares_models:
            return Reference(self._contexts(parts, pixels_BHWC))
        return self._of_batch(pixels_BHWC, step) if len(pixels_BHWC) else Reference()

    def teacher(self, names: Collection[str]) -> dict[str, Tensor]:
        """Returns the named weights of the frozen image tower, on the device: who changes them moves the teacher."""
        tower = self._frozen().named_parameters()
        return {name: each.detach() for name, each in tower if name in names and name.startswith("visual.")}

    @torch.no_grad()
    def _of_batch(self, pixels_BHWC: Tensor, step: int) -> Reference:
        train, frozen = self.train, self._frozen()
        passes = [frozen(pass_BHWC) for pass_BHWC in torch.split(pixels_BHWC, self._pass)]
        features_BD, logits_BC = (torch.cat(each) for each in zip(*passes, strict=True))
        contexts_BT = self._rounded(features_BD) if train.kl_weight else None
        if train.text_weight and self.texts is None:
            self.texts = RandomTexts(self.clip, train, self.device)
        texts_MD = self.texts.of(step) if self.texts is not None else None
        return Reference(contexts_BT, functional.normalize(features_BD, dim=-1), logits_BC, texts_MD)

    def _contexts(self, parts: Sequence[Part], pixels_BHWC: Tensor) -> Tensor | None:
        """Returns the rounded probabilities of the contexts, float16 [B, T]; None without a KL term."""
        if not self.train.kl_weight:
            return None
        if not len(pixels_BHWC):  # of a last batch with fewer images than workers
            return torch.zeros(0, len(self.context_head_TD), dtype=torch.float16, device=self.device)
        if self._pass:
            return torch.cat([self._compute(pass_BHWC) for pass_BHWC in torch.split(pixels_BHWC, self._pass)])
        return torch.cat([self._of_block(part.block)[part.rows] for part in parts])

    def _begun(self, block: Block, make: MakeViews = view_batch) -> Block:
        """Reads a block or makes its views, once, and has that copied to the device."""
        with block.lock:
            if block.uploaded is None and block.p_KT is None:
                shape = len(block.indices), len(self.context_head_TD)
                rows_KT = None if self.store is None else read_block(self.store, block.visit, block.number, *shape)
                if rows_KT is None:
                    block.pixels_KHWC = self._views_of(block.indices, block.visit, make)
                    block.uploaded = upload([block.pixels_KHWC], self.stream)
                else:
                    block.uploaded = upload([rows_KT], self.stream)
        return block

    def _views_of(self, indices: IntArray, visit: int, make: MakeViews) -> PixelArray:
        train, ids = self.train, self.source.sample_ids[indices]
        return make(self.source, indices, ids, train.seed, visit, train.crop_scale, self.clip.image_size)

    def _of_block(self, block: Block) -> Tensor:
        if block.p_KT is None:
            (on_device,) = arrived(self._begun(block).uploaded)  # type: ignore[arg-type]  # it is begun
            block.p_KT = on_device if block.pixels_KHWC is None else self._compute(on_device)
            block.uploaded = None
            if block.pixels_KHWC is not None and self.store is not None:
                # by a thread, so that no step waits for the device or for the disk
                self._writer.submit(self._write, self.store, block.visit, block.number, block.p_KT)
        return block.p_KT

    def _frozen(self) -> ImageClassifier:
        if self.frozen is None:
            frozen = build_classifier(self.clip, self.class_head_CD, self.train, self.device)
            # a tower that keeps what it has made of weights in eval mode must not do so with weights that move
            self.frozen = frozen.train(self.train.moves_teacher).requires_grad_(False)
            if self._pass and self.train.compile is True:
                compile_passes(self.frozen, self._pass)
        return self.frozen

    @torch.no_grad()
    def _compute(self, pixels_KHWC: Tensor) -> Tensor:
        return self._rounded(self._frozen().features(pixels_KHWC))

    def _rounded(self, features_KD: Tensor) -> Tensor:
        return context_distribution(features_KD, self.context_head_TD, self.context_scale).exp().half()

    def _write(self, store: Path, visit: int, number: int, p_KT: Tensor) -> None:
        """Writes a block; where that fails, nothing more is written."""
        try:
            if not self._failed:
                write_block(store, visit, number, p_KT.cpu().numpy())
        except OSError as error:
            self._failed = True
            text = "The frozen model's targets are not kept for later trainings: %s: %s"
            logger.warning(text, store, error.strerror)


def read_block(store: Path, visit: int, number: int, num_rows: int, width: int) -> Rows | None:
    """Returns a block, float16 [num_rows, width]; None where it is missing or damaged."""
    path, begin = _place(store, visit, number, width)
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb", buffering=0) as file:
            size = _HASH_BYTES + num_rows * width * _DTYPE.itemsize
            content = bytearray(os.pread(file.fileno(), size, begin))  # torch warns of arrays that are read-only
    except OSError:
        return None
    if content[:_HASH_BYTES] != _hash(visit, number, content[_HASH_BYTES:]):
        return None
    return np.frombuffer(content, _DTYPE, offset=_HASH_BYTES).reshape(num_rows, width)


def write_block(store: Path, visit: int, number: int, rows: Rows) -> None:
    """Writes a block, float16 [K, T].

    Raises:
        OSError: It cannot be written, or the store is none that carft-ray has made.
    """
    path, begin = _place(store, visit, number, rows.shape[1])
    data, flags = rows.astype(_DTYPE).tobytes(), os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    with (
        own_folder(store.parent.parent, store.parent.name, store.name) as folder,
        open(os.open(path.name, flags, 0o666, dir_fd=folder), "wb") as file,  # other blocks stay
    ):
        os.pwrite(file.fileno(), _hash(visit, number, data) + data, begin)


def _place(store: Path, visit: int, number: int, width: int) -> tuple[Path, int]:
    """Returns the file of a block, and where in it the block begins."""
    return store / f"visit-{visit:04d}", number * (_HASH_BYTES + BLOCK * width * _DTYPE.itemsize)


def _hash(visit: int, number: int, data: bytes | bytearray) -> bytes:
    return hashlib.blake2b(data, digest_size=_HASH_BYTES, key=f"{visit} {number}".encode()).digest()
