"""The training loop of CAR-FT. It knows nothing of Ray: ranks, reports and stopping come through ``RunContext``.

The loss is that of ``losses.py``; with ``kl_weight`` 0 the frozen model is never run and the loop is plain fine-tuning.

Shape letters: B images, C classes, T contexts, D embedding width, S side of an image.
"""

import contextlib
import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from carft_ray.data.source import IntArray, PixelArray, Source
from carft_ray.data.views import batches, view_batch
from carft_ray.errors import CarftError, DivergedError, Problem, RecipeError, StorageError
from carft_ray.learning.checkpoint import (
    Checkpoint,
    load_checkpoint,
    load_optimizer_tensors,
    newest_checkpoint,
    optimizer_tensors,
    save_checkpoint,
)
from carft_ray.learning.classifier import ImageClassifier, build_classifier, copies
from carft_ray.learning.context import RunContext
from carft_ray.learning.lora import trained_weights
from carft_ray.learning.losses import Loss, StoredTargets
from carft_ray.learning.mixing import update_average
from carft_ray.learning.models.clip import Clip
from carft_ray.learning.models.tower import shape_tower
from carft_ray.learning.optimizer import build_optimizer, clip_gradients, learning_rate_at, set_learning_rate
from carft_ray.learning.ranks import from_rank_0, on_all_ranks
from carft_ray.recipe.fine_tuning import TrainConfig
from carft_ray.recipe.schedule import num_warmup_steps

logger = logging.getLogger(__name__)

LOG_EVERY = 10  # steps between two checks of the stop flag and two rows of progress
CONTINUE, SAVE, STOP = 0, 1, 2  # what rank 0 has all ranks do at the end of such a window
# epoch from 1, indices [b], pixels [b, S, S, 3], size of the global batch
Batch = tuple[int, IntArray, PixelArray, int]


class StoppedRun(CarftError):  # noqa: N818 (it is no error: the run did what it was asked to)
    """The loop wrote a checkpoint and ended because ``should_stop`` said yes."""

    exit_code = 130


@dataclass
class _Means:
    """Means over images of an epoch's metrics; what they need is part of the checkpoint."""

    num_images: int = 0
    totals: dict[str, float] = field(default_factory=dict)

    def add(self, values: dict[str, float], num_images: int) -> None:
        self.num_images += num_images
        for key, value in values.items():
            self.totals[key] = self.totals.get(key, 0.0) + value * num_images

    def values(self) -> dict[str, float]:
        return {key: total / max(self.num_images, 1) for key, total in self.totals.items()}


@dataclass
class _Learner:
    """What a training changes, and where its checkpoints are."""

    classifier: ImageClassifier
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor]  # of the weights; empty without ``ema_decay``
    train: TrainConfig
    context: RunContext
    checkpoint_dir: Path | None
    attempt: int
    step: int = 0
    saved_at: float = field(default_factory=lambda: time.monotonic())  # the last checkpoint, or the start
    means: _Means = field(default_factory=_Means)

    def state(self) -> dict[str, Tensor]:
        return {**self.classifier.state(), **copies(self.average)}

    def update(self, loss: Loss, model: nn.Module, batch: Batch, labels_B: Tensor, num_steps: int) -> Tensor:
        """Makes one step; returns the sums of ``Loss.backward`` and the norm of the gradient, [4]."""
        epoch, indices, pixels, batch_size = batch
        # for towers that draw, as some drop patches: of the step alone, which makes resuming exact
        torch.manual_seed((self.train.seed * 1_000_003 + self.step * 1_009 + self.context.rank) % 2**63)
        pixels_BHWC = torch.from_numpy(pixels).to(labels_B.device)
        with _explained(self.step + 1, num_steps):
            factor = self.context.world_size / batch_size
            sums = loss.backward(model, pixels_BHWC, labels_B, indices, epoch - 1, factor)
            grad_norm = clip_gradients(self.classifier, self.train.clip_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.train.ema_decay is not None:
            update_average(self.average, trained_weights(self.classifier), self.train.ema_decay, self.step)
        return torch.cat([sums, (grad_norm * batch_size / self.context.world_size).double().view(1)])

    def save(self) -> None:
        """Writes a checkpoint, on rank 0."""
        self.saved_at = time.monotonic()
        if self.checkpoint_dir is not None and self.context.rank == 0:
            position = {"seed": self.train.seed, "num_images": self.means.num_images, "totals": self.means.totals}
            weights, average = copies(self.classifier.state_dict()), copies(self.average)
            checkpoint = Checkpoint(self.step, weights, optimizer_tensors(self.optimizer), position, average)
            save_checkpoint(self.checkpoint_dir, self.attempt, checkpoint)

    def resume(self, checkpoint_dir: Path) -> None:
        """Continues from the newest valid checkpoint, if any. Rank 0 finds it: others may still list an older one."""
        found: list[Checkpoint] = []

        def find() -> str:
            checkpoint, damaged = newest_checkpoint(checkpoint_dir)
            for problem in damaged:
                logger.warning("passed over a damaged checkpoint: %s", problem)
            found.extend([] if checkpoint is None else [checkpoint])
            return "" if checkpoint is None else checkpoint.name

        name = from_rank_0(self.context, find)
        if not name:
            return
        checkpoint = on_all_ranks(self.context, lambda: found[0] if found else load_checkpoint(checkpoint_dir / name))
        position, place = checkpoint.position, str(checkpoint_dir)
        if position["seed"] != self.train.seed:
            raise StorageError(Problem(place, f"must belong to seed {self.train.seed}", str(position["seed"])))
        if bool(checkpoint.average) != bool(self.average):
            rule = "must hold an average of the weights with ema_decay, and only then"
            raise StorageError(Problem(place, rule, "one" if checkpoint.average else "none"))
        self.classifier.load_state_dict(checkpoint.weights)
        for name, tensor in self.average.items():
            tensor.copy_(checkpoint.average[name])
        load_optimizer_tensors(self.optimizer, checkpoint.optimizer)
        self.step, self.means = checkpoint.step, _Means(position["num_images"], dict(position["totals"]))


@contextlib.contextmanager
def same_attention() -> Iterator[None]:
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
def _explained(step: int, num_steps: int) -> Iterator[None]:
    """Adds the step to what an exception says; the failure of torch's compiler, at the first step, is one message."""
    try:
        yield
    except Exception as error:
        error.add_note(f"at step {step} of {num_steps}")
        if not any(kind.__name__ == "TorchDynamoException" for kind in type(error).__mro__):
            raise
        next_step = "Write train.compile: false, or give torch a C++ compiler that works (the variable CXX names one)."
        rule = "must be false here: torch cannot compile the image tower"
        problem = Problem("train.compile", rule, str(error).strip().partition("\n")[0], next_step=next_step)
        raise RecipeError(problem) from error


@same_attention()
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
    every epoch, after each ``checkpoint_every`` and when it is stopped; the result is bit for bit that of an
    uninterrupted training.

    Args:
        clip: The model to start from; it is not changed.
        class_head_CD: Unit rows [C, D] of ``build_heads``.
        context_head_TD: Unit rows [T, D] of ``build_heads``.
        source: The training set; every epoch shows each image once.
        train: Hyperparameters.
        context: Rank, reports and stop flag; a single worker by default.
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
    has_kl = train.kl_weight > 0
    frozen = build_classifier(clip, class_head_CD, train, device).eval().requires_grad_(False) if has_kl else None
    loss = Loss(frozen, context_head_TD.to(device), train.context_scale or clip.logit_scale, train, stored_targets)
    averaged = trained_weights(classifier) if train.ema_decay is not None else {}
    average = {name: tensor.detach().clone() for name, tensor in averaged.items()}
    learner = _Learner(classifier, build_optimizer(classifier, train), average, train, context, checkpoint_dir, attempt)
    if checkpoint_dir is not None:
        learner.resume(checkpoint_dir)
    for each in (classifier, frozen) if train.compile else ():
        if each is not None:
            each.visual.compile()
    model: nn.Module = classifier
    if context.world_size > 1:
        model = DistributedDataParallel(classifier, broadcast_buffers=False)

    steps_per_epoch = math.ceil(len(source) / train.batch_size)
    num_steps = train.epochs * steps_per_epoch
    warmup = num_warmup_steps(train.warmup_steps, num_steps)
    window, window_images, clock = torch.zeros(4, dtype=torch.float64, device=device), 0, time.perf_counter()
    for batch in _views(source, train, clip.image_size, context, learner.step, num_threads):
        epoch, indices, _, batch_size = batch
        learning_rate = learning_rate_at(learner.step, train.learning_rate, warmup, num_steps)
        set_learning_rate(learner.optimizer, learning_rate)
        labels_B = torch.from_numpy(source.labels[indices]).to(device)
        window += learner.update(loss, model, batch, labels_B, num_steps)
        window_images += batch_size

        step = learner.step
        ends_epoch = step % steps_per_epoch == 0
        if step % LOG_EVERY and not ends_epoch:
            continue
        values = _means_of_window(window, window_images, train.kl_weight, context)
        if not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
            place = f"step {step} of {num_steps}"
            raise DivergedError(Problem(place, "loss and gradient must stay finite", _bad_first(values)))
        learner.means.add(values, window_images)
        speed = window_images / max(time.perf_counter() - clock, 1e-9)
        row = {"step": step, "num_steps": num_steps, "epoch": epoch, "learning_rate": learning_rate}
        if context.rank == 0:
            context.progress({**row, **values, "images_per_s": speed})
        if ends_epoch:
            metrics = on_epoch(learner.state, epoch) if on_epoch is not None else {}
            if context.rank == 0:
                context.report({**row, **learner.means.values(), "images_per_s": speed, **metrics})
            learner.means = _Means()
            learner.save()
        asked = CONTINUE if step == num_steps else _asked(learner, device)
        if asked != CONTINUE and not ends_epoch:
            learner.save()
        if asked == STOP:
            raise StoppedRun(f"stopped on request at step {step} of {num_steps}")
        window.zero_()
        window_images, clock = 0, time.perf_counter()
    return learner.state()


def _views(
    source: Source, train: TrainConfig, image_size: int, context: RunContext, first_step: int, num_threads: int
) -> Iterator[Batch]:
    """Yields this worker's part of each batch, from ``first_step`` on.

    With more than one thread the next batches are made while the current one is computed on. A view is a function of
    seed, sample and visit, so the number of threads changes nothing.
    """
    first_epoch, first_batch = divmod(first_step, math.ceil(len(source) / train.batch_size))

    def parts() -> Iterator[tuple[int, IntArray, int]]:
        for epoch in range(first_epoch, train.epochs):
            mine = batches(train.seed, epoch, len(source), train.batch_size, context.rank, context.world_size)
            skip = first_batch if epoch == first_epoch else 0
            for number, indices in enumerate(mine[skip:], start=skip):
                yield epoch, indices, min(train.batch_size, len(source) - number * train.batch_size)

    def make(epoch: int, indices: IntArray, size: int) -> Batch:
        ids = source.sample_ids[indices]
        pixels = view_batch(source, indices, ids, train.seed, epoch, train.crop_scale, image_size)
        return epoch + 1, indices, pixels, size

    if num_threads == 1:
        yield from itertools.starmap(make, parts())
        return
    with ThreadPoolExecutor(max_workers=num_threads - 1) as pool:
        ahead: deque[Future[Batch]] = deque()
        for part in parts():
            ahead.append(pool.submit(make, *part))
            if len(ahead) >= num_threads:
                yield ahead.popleft().result()
        yield from (future.result() for future in ahead)


def _means_of_window(window: Tensor, num_images: int, kl_weight: float, context: RunContext) -> dict[str, float]:
    """Returns the means over the images that all workers saw since the last row of progress."""
    window = window.clone()
    if context.world_size > 1:
        dist.all_reduce(window)
    ce, kl, entropy, grad_norm = (window / num_images).tolist()
    return {"loss": ce + kl_weight * kl, "ce": ce, "kl": kl, "context_entropy": entropy, "grad_norm": grad_norm}


def _bad_first(values: Mapping[str, float]) -> str:
    """Returns loss and gradient norm for a message, ``gradient norm inf; loss 23.92``: what is not finite first."""
    named = {"loss": values["loss"], "gradient norm": values["grad_norm"]}
    return "; ".join(f"{name} {named[name]:.4g}" for name in sorted(named, key=lambda name: math.isfinite(named[name])))


def _asked(learner: _Learner, device: torch.device) -> int:
    """Returns on all ranks whether rank 0 is to stop, or to write a checkpoint because of ``checkpoint_every``."""
    context, every, asked = learner.context, learner.train.checkpoint_every, CONTINUE
    if context.rank == 0:
        is_due = every is not None and time.monotonic() - learner.saved_at >= every
        asked = STOP if context.should_stop() else SAVE if is_due else CONTINUE
    if context.world_size == 1:
        return asked
    flag = torch.tensor([float(asked)], device=device)
    dist.broadcast(flag, 0)
    return int(flag.item())
