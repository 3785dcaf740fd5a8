"""The training loop of CAR-FT. It knows nothing of Ray: ranks, reports and stopping come through ``RunContext``.

    loss = 1/B * sum_b CE(class_logits[b], y[b]) + kl_weight * 1/B * sum_b KL(p0[b] || p[b])       B: the global batch

Sums over samples are divided by the size of the global batch, so the gradient is the same for any split into workers
and micro-batches. With ``kl_weight`` 0 the frozen model is never run and the loop is plain fine-tuning.

Shape letters: B images, T contexts, D embedding width.
"""

import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from carft_ray.data.source import IntArray, PixelArray, Source
from carft_ray.data.views import batches, view_batch
from carft_ray.errors import CarftError, DivergedError, Problem, RecipeError, StorageError
from carft_ray.learning.averaging import start_average, update_average
from carft_ray.learning.checkpoint import (
    Checkpoint,
    load_checkpoint,
    load_optimizer_tensors,
    newest_checkpoint,
    optimizer_tensors,
    save_checkpoint,
)
from carft_ray.learning.classifier import ImageClassifier, autocast_dtype, copies
from carft_ray.learning.context import RunContext
from carft_ray.learning.lora import trained_weights
from carft_ray.learning.losses import context_distribution, context_entropy, context_kl
from carft_ray.learning.models.clip import Clip
from carft_ray.learning.models.tower import shape_tower
from carft_ray.learning.optimizer import build_optimizer, clip_gradients, set_learning_rate
from carft_ray.learning.ranks import from_rank_0, on_all_ranks
from carft_ray.learning.schedule import learning_rate_at, num_warmup_steps
from carft_ray.recipe.fine_tuning import TrainConfig

logger = logging.getLogger(__name__)

LOG_EVERY = 10  # steps between two looks at the stop flag and two rows of progress


__all__ = ["LOG_EVERY", "DivergedError", "StoppedRun", "StoredTargets", "build_classifier", "fine_tune"]


class StoppedRun(CarftError):  # noqa: N818 (it is no error: the run did what it was asked to)
    """The loop wrote a checkpoint and ended because ``should_stop`` said yes."""

    exit_code = 130


class StoredTargets(Protocol):
    """Context distributions of the frozen model, computed before."""

    def read(self, indices: IntArray, visit: int) -> npt.NDArray[np.float16] | None:
        """Returns probabilities [B, T] for these rows at this visit, or None when they are not stored."""


@dataclass
class _Means:
    """Means over images of an epoch's metrics; what they need travels with the checkpoint."""

    num_images: int = 0
    totals: dict[str, float] = field(default_factory=dict)

    def add(self, values: dict[str, float], num_images: int) -> None:
        self.num_images += num_images
        for key, value in values.items():
            self.totals[key] = self.totals.get(key, 0.0) + value * num_images

    def values(self) -> dict[str, float]:
        return {key: total / max(self.num_images, 1) for key, total in self.totals.items()}


def build_classifier(clip: Clip, class_head_CD: Tensor, train: TrainConfig, device: torch.device) -> ImageClassifier:
    """Returns the zero-shot classifier that a training starts from, on ``device``, in the precision of the recipe."""
    dtype = torch.float64 if train.precision == "fp64" else torch.float32
    classifier = ImageClassifier(
        clip.model.visual,  # type: ignore[arg-type]  # open_clip is untyped
        class_head_CD,
        clip.logit_scale,
        clip.mean,
        clip.std,
        train.class_head_form,
        train.head_bias,
        autocast_dtype(train.precision, device),
    )
    return classifier.to(device=device, dtype=dtype)


@contextlib.contextmanager
def _same_attention() -> Iterator[None]:
    """Keeps torch's shortcut for attention without gradients off.

    It rounds otherwise than the training path, and the KL between identical models would not be 0.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _told_of_compiler() -> Iterator[None]:
    """Turns the failure of torch's compiler, which works at the first step, into one message."""
    try:
        yield
    except RuntimeError as error:
        if not any(kind.__name__ == "TorchDynamoException" for kind in type(error).__mro__):
            raise
        step = "Write train.compile: false, or give torch a C++ compiler that works (the variable CXX names one)."
        rule = "must be false here: torch cannot compile the image tower"
        problem = Problem("train.compile", rule, str(error).strip().partition("\n")[0], next_step=step)
        raise RecipeError(problem) from error


@contextlib.contextmanager
def _noting_step(step: int, num_steps: int) -> Iterator[None]:
    """Adds the step to what an exception says."""
    try:
        yield
    except Exception as error:
        error.add_note(f"at step {step} of {num_steps}")
        raise


@_same_attention()
def fine_tune(
    clip: Clip,
    class_head_CD: Tensor,
    context_head_TD: Tensor,
    source: Source,
    train: TrainConfig,
    context: RunContext | None = None,
    *,
    device: torch.device | None = None,
    checkpoint_dir: Path | None = None,
    attempt: int = 1,
    stored_targets: StoredTargets | None = None,
    on_epoch: Callable[[Callable[[], dict[str, Tensor]], int], dict[str, float]] | None = None,
    num_threads: int = 1,
) -> dict[str, Tensor]:
    """Fine-tunes the image tower and the class head, and returns the fine-tuned state on the CPU.

    The state is that of plain weights: LoRA's corrections are merged into it, and with ``ema_decay`` it is the average
    over the steps.

    With ``checkpoint_dir`` the training resumes from the newest valid checkpoint there and writes one at the end of
    every epoch and when it is stopped; the result is bit for bit that of an uninterrupted training.

    Args:
        clip: The model to start from; it is not changed.
        class_head_CD: Unit rows [C, D] of ``build_heads``.
        context_head_TD: Unit rows [T, D] of ``build_heads``.
        source: The training set; every epoch shows each image once.
        train: Hyperparameters.
        context: Rank, reports and stop flag; one lonely worker by default.
        device: Where to compute; the CPU by default.
        checkpoint_dir: Folder of the checkpoints; None: none are written.
        attempt: Number of this attempt at the training; checkpoints go to a folder of its own.
        stored_targets: Context distributions of the frozen model; computed here where they are not stored.
        on_epoch: Called on every rank at the end of an epoch (from 1), with a function that returns the state as it
            would be returned now; what it returns joins the epoch's report.
        num_threads: Threads that make views of source images.

    Raises:
        StoppedRun: The context asked to stop; a checkpoint was written.
        DivergedError: The loss became infinite or not a number.
        StorageError: A checkpoint cannot be written.
        MachineError: A rank does not see the checkpoint that rank 0 has found.
        DataError: An image cannot be read.
        RecipeError: The image tower cannot do what ``train`` asks, or cannot be compiled.
    """
    context = context or RunContext()
    device = device or torch.device("cpu")
    classifier = build_classifier(clip, class_head_CD, train, device).train()
    shape_tower(classifier, train)
    optimizer = build_optimizer(classifier, train)
    frozen = None
    if train.kl_weight > 0:
        frozen = build_classifier(clip, class_head_CD, train, device).eval().requires_grad_(False)
    loss = _Loss(frozen, context_head_TD.to(device), train.context_scale or clip.logit_scale, train, stored_targets)
    step, means = 0, _Means()
    average = start_average(trained_weights(classifier)) if train.ema_decay is not None else {}
    if checkpoint_dir is not None:
        step, means = _resume(checkpoint_dir, classifier, optimizer, average, train, context)
    if train.compile:
        for compiled in (classifier, frozen):
            if compiled is not None:
                compiled.visual.compile()
    model: nn.Module = classifier
    if context.world_size > 1:
        model = DistributedDataParallel(classifier, broadcast_buffers=False)

    def state() -> dict[str, Tensor]:
        return {**classifier.state(), **copies(average)}

    def save() -> None:
        if checkpoint_dir is not None and context.rank == 0:
            position = {"seed": train.seed, "num_images": means.num_images, "totals": means.totals}
            weights, averaged = copies(classifier.state_dict()), copies(average)
            checkpoint = Checkpoint(step, weights, optimizer_tensors(optimizer), position, averaged)
            save_checkpoint(checkpoint_dir, attempt, checkpoint)

    steps_per_epoch = math.ceil(len(source) / train.batch_size)
    num_steps = train.epochs * steps_per_epoch
    warmup = num_warmup_steps(train.warmup_steps, num_steps)
    views = _views(source, train, clip.image_size, context, step, steps_per_epoch, num_threads)
    window, window_images, clock = torch.zeros(4, dtype=torch.float64, device=device), 0, time.perf_counter()
    for epoch, indices, pixels, batch_size in views:
        torch.manual_seed(_step_seed(train.seed, step, context.rank))
        learning_rate = learning_rate_at(step, train.learning_rate, warmup, num_steps)
        set_learning_rate(optimizer, learning_rate)
        pixels_BHWC = torch.from_numpy(pixels).to(device)
        labels_B = torch.from_numpy(source.labels[indices]).to(device)
        with _noting_step(step + 1, num_steps), _told_of_compiler():
            sums = loss.backward(model, pixels_BHWC, labels_B, indices, epoch - 1, context.world_size / batch_size)
            grad_norm = clip_gradients(classifier, train.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        if train.ema_decay is not None:
            update_average(average, trained_weights(classifier), train.ema_decay, step)
        window[:3] += sums
        window[3] += grad_norm * batch_size / context.world_size
        window_images += batch_size

        ends_epoch = step % steps_per_epoch == 0
        if step % LOG_EVERY and not ends_epoch:
            continue
        values = _means_of_window(window, window_images, train.kl_weight, context)
        if not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
            place = f"step {step} of {num_steps}"
            raise DivergedError(Problem(place, "loss and gradient must stay finite", _bad_first(values)))
        means.add(values, window_images)
        speed = window_images / max(time.perf_counter() - clock, 1e-9)
        row = {"step": step, "num_steps": num_steps, "epoch": epoch, "learning_rate": learning_rate}
        if context.rank == 0:
            context.progress({**row, **values, "images_per_s": speed})
        if ends_epoch:
            metrics = on_epoch(state, epoch) if on_epoch is not None else {}
            if context.rank == 0:
                context.report({**row, **means.values(), "images_per_s": speed, **metrics})
            means = _Means()
            save()
        if step < num_steps and _stop_asked(context, device):
            save()
            raise StoppedRun(f"stopped on request at step {step} of {num_steps}")
        window.zero_()
        window_images, clock = 0, time.perf_counter()
    return state()


@dataclass(frozen=True)
class _Loss:
    """The loss of one worker's part of a global batch, in micro-batches."""

    frozen: ImageClassifier | None  # None: plain fine-tuning
    context_head_TD: Tensor
    context_scale: float
    train: TrainConfig
    stored_targets: StoredTargets | None

    def backward(
        self, model: nn.Module, pixels_BHWC: Tensor, labels_B: Tensor, indices: IntArray, visit: int, factor: float
    ) -> Tensor:
        """Adds the gradient of this part; returns its sums of CE, KL and context entropy, float64 [3].

        ``factor`` is number of workers / size of the global batch: the workers' gradients are averaged by
        ``DistributedDataParallel``, so the number of workers makes that the sum over the batch that is wanted.
        """
        sums = torch.zeros(3, dtype=torch.float64, device=labels_B.device)
        micro_batch = self.train.micro_batch or max(len(labels_B), 1)
        starts = range(0, max(len(labels_B), 1), micro_batch)
        for start in starts:
            part = slice(start, start + micro_batch)
            waits = isinstance(model, DistributedDataParallel) and start != starts[-1]
            with model.no_sync() if waits else nullcontext():  # type: ignore[operator]  # waits: it is a DDP
                loss_sum, values = self._sums(model, pixels_BHWC[part], labels_B[part], indices[part], visit)
                (loss_sum * factor).backward()  # type: ignore[no-untyped-call]
            sums += values
        return sums

    def _sums(
        self, model: nn.Module, pixels_BHWC: Tensor, labels_B: Tensor, indices: IntArray, visit: int
    ) -> tuple[Tensor, Tensor]:
        if len(labels_B) == 0:  # a last batch with fewer images than workers: take part with gradient 0
            blank_BHWC = pixels_BHWC.new_zeros(1, *pixels_BHWC.shape[1:])
            return model(blank_BHWC)[1].sum() * 0, torch.zeros(3, dtype=torch.float64, device=pixels_BHWC.device)
        features_BD, logits_BC = model(pixels_BHWC)
        ce = functional.cross_entropy(logits_BC, labels_B, reduction="sum", label_smoothing=self.train.label_smoothing)
        with nullcontext() if self.frozen is not None else torch.no_grad():
            log_p_BT = context_distribution(features_BD, self.context_head_TD, self.context_scale)
        kl = torch.zeros_like(ce)
        if self.frozen is not None:
            kl = self._kl_per_image(self.frozen, log_p_BT, pixels_BHWC, indices, visit).sum()
        entropy = context_entropy(log_p_BT.detach()) * len(labels_B)
        values = torch.stack([value.detach().double() for value in (ce, kl, entropy)])
        return (ce if self.frozen is None else ce + self.train.kl_weight * kl), values

    def _kl_per_image(
        self, frozen: ImageClassifier, log_p_BT: Tensor, pixels_BHWC: Tensor, indices: IntArray, visit: int
    ) -> Tensor:
        stored = self.stored_targets.read(indices, visit) if self.stored_targets is not None else None
        if stored is not None:
            return context_kl(log_p_BT, torch.from_numpy(stored).to(log_p_BT.device), log_target=False)
        with torch.no_grad():
            log_p0_BT = context_distribution(frozen.features(pixels_BHWC), self.context_head_TD, self.context_scale)
        return context_kl(log_p_BT, log_p0_BT)


def _resume(
    checkpoint_dir: Path,
    classifier: ImageClassifier,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor],
    train: TrainConfig,
    context: RunContext,
) -> tuple[int, _Means]:
    """Puts the newest valid checkpoint into model, optimizer and average; returns its step and the epoch's means.

    Rank 0 finds it: on a network disk the others may still list an older one.
    """
    found: list[Checkpoint] = []

    def find() -> str:
        checkpoint, damaged = newest_checkpoint(checkpoint_dir)
        for problem in damaged:
            logger.warning("passed over a damaged checkpoint: %s", problem)
        if checkpoint is None:
            return ""
        found.append(checkpoint)
        return checkpoint.name

    name = from_rank_0(context, find)
    if not name:
        return 0, _Means()
    checkpoint = on_all_ranks(context, lambda: found[0] if found else load_checkpoint(checkpoint_dir / name))
    position = checkpoint.position
    if position["seed"] != train.seed:
        raise StorageError(Problem(str(checkpoint_dir), f"must belong to seed {train.seed}", str(position["seed"])))
    if bool(checkpoint.average) != bool(average):
        rule, value = "must hold an average of the weights with ema_decay, and only then", checkpoint.average
        raise StorageError(Problem(str(checkpoint_dir), rule, "one" if value else "none"))
    classifier.load_state_dict(checkpoint.weights)
    for name, tensor in average.items():
        tensor.copy_(checkpoint.average[name])
    load_optimizer_tensors(optimizer, checkpoint.optimizer)
    return checkpoint.step, _Means(position["num_images"], dict(position["totals"]))


def _views(
    source: Source,
    train: TrainConfig,
    image_size: int,
    context: RunContext,
    first_step: int,
    steps_per_epoch: int,
    num_threads: int,
) -> Iterator[tuple[int, IntArray, PixelArray, int]]:
    """Yields ``(epoch from 1, indices, pixels [b, S, S, 3], size of the global batch)`` from ``first_step`` on.

    With more than one thread the next batches are made while the current one is computed on. A view is a function of
    seed, sample and visit, so the number of threads changes nothing.
    """

    def parts() -> Iterator[tuple[int, IntArray, int]]:
        for epoch in range(first_step // steps_per_epoch, train.epochs):
            mine = batches(train.seed, epoch, len(source), train.batch_size, context.rank, context.world_size)
            skip = max(first_step - epoch * steps_per_epoch, 0)
            for number, indices in enumerate(mine[skip:], start=skip):
                yield epoch, indices, min(train.batch_size, len(source) - number * train.batch_size)

    def make(epoch: int, indices: IntArray) -> PixelArray:
        ids = source.sample_ids[indices]
        return view_batch(source, indices, ids, train.seed, epoch, train.crop_scale, image_size)

    if num_threads == 1:
        for epoch, indices, size in parts():
            yield epoch + 1, indices, make(epoch, indices), size
        return
    with ThreadPoolExecutor(max_workers=num_threads - 1) as pool:
        ahead: deque[tuple[int, IntArray, int, Future[PixelArray]]] = deque()
        for epoch, indices, size in parts():
            ahead.append((epoch, indices, size, pool.submit(make, epoch, indices)))
            if len(ahead) >= num_threads:
                epoch_0, indices_0, size_0, future = ahead.popleft()
                yield epoch_0 + 1, indices_0, future.result(), size_0
        for epoch_0, indices_0, size_0, future in ahead:
            yield epoch_0 + 1, indices_0, future.result(), size_0


def _means_of_window(window: Tensor, num_images: int, kl_weight: float, context: RunContext) -> dict[str, float]:
    """Returns the means over the images that all workers saw since the last look."""
    window = window.clone()
    if context.world_size > 1:
        dist.all_reduce(window)
    ce, kl, entropy, grad_norm = (window / num_images).tolist()
    return {"loss": ce + kl_weight * kl, "ce": ce, "kl": kl, "context_entropy": entropy, "grad_norm": grad_norm}


def _bad_first(values: Mapping[str, float]) -> str:
    """Returns loss and gradient norm for a message, ``gradient norm inf; loss 23.92``: what is not finite first."""
    named = {"loss": values["loss"], "gradient norm": values["grad_norm"]}
    return "; ".join(f"{name} {named[name]:.4g}" for name in sorted(named, key=lambda name: math.isfinite(named[name])))


def _stop_asked(context: RunContext, device: torch.device) -> bool:
    """Asks rank 0 and tells everybody."""
    flag = torch.zeros(1, device=device)
    if context.rank == 0:
        flag[0] = float(context.should_stop())
    if context.world_size > 1:
        dist.broadcast(flag, 0)
    return bool(flag.item())


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Returns a seed for torch's generator at this step (some towers drop patches); it makes resuming exact."""
    return (seed * 1_000_003 + step * 1_009 + rank) % 2**63
