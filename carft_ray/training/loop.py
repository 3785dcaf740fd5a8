"""The training loop of CAR-FT. It knows nothing of Ray: ranks, reports and stopping come through ``RunContext``.

The loss is that of ``car_ft_loss``; without a penalty the frozen model is never run and the loop is plain fine-tuning.

Shape letters: B images, C classes, T contexts, D embedding width, S side of an image.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from carft_ray.data.source import IntArray, Source
from carft_ray.data.views import parts_of, permutation
from carft_ray.errors import CarftError, DivergedError, MachineError, Problem, RecipeError, StorageError
from carft_ray.model.classifier import ImageClassifier, build_classifier, copies
from carft_ray.model.clip import Clip
from carft_ray.model.lora import trained_weights
from carft_ray.model.mixing import move_towards, teacher_shares, update_average
from carft_ray.model.tower import compile_tower, half_built, set_aside_half_built, shape_tower
from carft_ray.recipe.schedule import learning_rate_at, num_warmup_steps
from carft_ray.recipe.schema.train import PENALTIES, TrainConfig
from carft_ray.training import prefetch
from carft_ray.training.car_ft_loss import Loss
from carft_ray.training.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    load_checkpoint,
    load_optimizer_tensors,
    newest_checkpoint,
    optimizer_tensors,
)
from carft_ray.training.linear_probe import probe
from carft_ray.training.optimizer import build_optimizer, clip_gradients, set_learning_rate
from carft_ray.training.other_penalties import Anchor, share_at
from carft_ray.training.out_of_memory import is_out_of_memory, micro_batch_of
from carft_ray.training.ranks import from_rank_0, on_all_ranks
from carft_ray.training.run_context import RunContext
from carft_ray.training.targets import BLOCK, Part, Targets

logger = logging.getLogger(__name__)

LOG_EVERY = 10  # steps between two checks of the stop flag and two rows of progress
MOST_AHEAD = 16  # batches, however small
TEACHER = "teacher."  # before its names in a checkpoint
CONTINUE, SAVE, STOP = 0, 1, 2  # what rank 0 has all ranks do at the end of such a window
OnEpoch = Callable[
    [Callable[[], dict[str, Tensor]], int], dict[str, float]
]  # given the state's function, and the epoch


class Batch(NamedTuple):
    """A worker's part of a global batch, on the device."""

    epoch: int  # from 1
    indices: IntArray  # [b]
    size: int  # of the global batch
    parts: list[Part]  # of blocks of targets; none without KL
    pixels_BHWC: Tensor  # uint8 [b, S, S, 3]
    labels_B: Tensor


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
    """What a training changes, and what writes its checkpoints."""

    classifier: ImageClassifier
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor]  # of the weights; empty without ``ema_decay``
    teacher: dict[str, Tensor]  # weights of the moving one; empty where it is frozen
    train: TrainConfig
    context: RunContext
    writer: CheckpointWriter
    anchor: Anchor | None = None  # of L2-SP
    step: int = 0
    shares: list[float] = field(default_factory=list)  # of the weights after each step in the teacher
    saved_at: float = field(default_factory=lambda: time.monotonic())  # the last checkpoint, or the start
    means: _Means = field(default_factory=_Means)

    def __post_init__(self) -> None:
        self.parameters = list(self.classifier.parameters())
        # LoRA's are merged anew after each step, the others are the parameters themselves
        averages = bool(self.average or self.teacher)
        self.weights = trained_weights(self.classifier) if averages and self.train.lora_rank is None else None

    def state(self) -> dict[str, Tensor]:
        return {**self.classifier.state(), **copies(self.average)}

    def update(
        self, loss: Loss, targets: Targets, model: nn.Module, batch: Batch, num_steps: int, share: float
    ) -> Tensor:
        """Makes one step; returns the sums of ``Loss.backward``, that of L2-SP if any, and the norm of the gradient."""
        batch_size = batch.size
        with _explained(self.step + 1, num_steps):
            factor = self.context.world_size / batch_size
            reference = targets.of(batch.parts, batch.pixels_BHWC, self.step)
            sums = loss.backward(model, batch.pixels_BHWC, batch.labels_B, reference, factor, share)
            of_step = [] if self.anchor is None else [self.anchor.pull()]
            of_step.append(clip_gradients(self.parameters, self.train.clip_norm))
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.average or self.teacher:
            weights = self.weights or trained_weights(self.classifier)
            if self.train.ema_decay is not None:
                update_average(self.average, weights, self.train.ema_decay, self.step)
            if self.teacher:
                move_towards(self.teacher, weights, self.shares[self.step])
        each_image = (value * batch_size / self.context.world_size for value in of_step)
        return torch.cat([sums, *(value.double().view(1) for value in each_image)])

    def save(self) -> None:
        """Copies what a checkpoint holds, which is written beside the next steps."""
        self.saved_at = time.monotonic()
        self.writer.write(self._checkpoint)

    def _checkpoint(self) -> Checkpoint:
        totals = dict(self.means.totals)
        position = {"seed": self.train.seed, "num_images": self.means.num_images, "totals": totals}
        weights, average = copies(self.classifier.state_dict()), copies(self._averages())
        return Checkpoint(self.step, weights, optimizer_tensors(self.optimizer), position, average)

    def _averages(self) -> dict[str, Tensor]:
        return {**self.average, **{f"{TEACHER}{name}": tensor for name, tensor in self.teacher.items()}}

    def resume(self, checkpoint_dir: Path) -> None:
        """Continues from the newest valid checkpoint, if any. Rank 0 finds it: others may still list an older one."""
        found: list[Checkpoint] = []

        def find() -> str:
            checkpoint, damaged = newest_checkpoint(checkpoint_dir)
            for problem in damaged:
                logger.warning("skipped a damaged checkpoint: %s", problem)
            found.extend([] if checkpoint is None else [checkpoint])
            return "" if checkpoint is None else checkpoint.name

        name = from_rank_0(self.context, find)
        if not name:
            return
        checkpoint = on_all_ranks(self.context, lambda: found[0] if found else load_checkpoint(checkpoint_dir / name))
        position, place = checkpoint.position, str(checkpoint_dir)
        if position["seed"] != self.train.seed:
            raise StorageError(Problem(place, f"must belong to seed {self.train.seed}", str(position["seed"])))
        averages = self._averages()
        if checkpoint.average.keys() != averages.keys():
            rule = "must contain an average of the weights if ema_decay is set, or teacher is average, else none"
            raise StorageError(Problem(place, rule, "one" if checkpoint.average else "none"))
        self.classifier.load_state_dict(checkpoint.weights)
        for name, tensor in averages.items():
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
    """Adds the step to what an exception says; the failure of torch's compiler, at the first step, is one message.

    Libraries that a kill has left half built are a failure of the machine: they are set aside, for another attempt.
    """
    try:
        yield
    except Exception as error:
        error.add_note(f"at step {step} of {num_steps}")
        is_compilers = any(kind.__name__ == "TorchDynamoException" for kind in type(error).__mro__)
        if is_out_of_memory(error) or not (is_compilers or isinstance(error, ImportError | OSError)):
            raise
        if half := set_aside_half_built() or (half_built if is_compilers else []):
            text = "torch's compiler cache has a library that a killed process has left half built, now set aside"
            raise MachineError(f"{text}: {half[0]}") from error
        if not is_compilers:
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
    target_store: Path | None = None,
    on_epoch: OnEpoch | None = None,
    num_threads: int = 1,
) -> dict[str, Tensor]:
    """Fine-tunes the image tower and the class head, and returns the fine-tuned state on the CPU.

    The state is that of plain weights: LoRA's corrections are merged into it, and with ``ema_decay`` it is the average
    over the steps.

    With ``checkpoint_dir`` the training resumes from the newest valid checkpoint there and writes one after each
    ``checkpoint_every`` (None: at the end of every epoch) and when it is stopped, but none after the last step. The
    result is that of an uninterrupted training: with one or two workers bit for bit on a CPU, else, or on a GPU without
    deterministic algorithms (``device.set_up``), up to rounding.

    Args:
        clip: The model to start from; it is not changed.
        class_head_CD: Unit rows [C, D] of ``build_heads``.
        context_head_TD: Unit rows [T, D] of ``build_heads``.
        source: The training set; every epoch shows each image once.
        train: Hyperparameters; ``compile: auto`` is off here, the caller resolves it (``tower.compiles``).
        context: Rank, reports and stop flag; a single worker by default.
        device: The device that computes; the CPU by default.
        checkpoint_dir: Folder of the training, with a folder per attempt; None: no checkpoints are written.
        attempt: Number of this attempt at the training; checkpoints go to a folder of its own.
        target_store: Folder from which the frozen model's context distributions are read, and to which missing ones are
            written (``targets.store_dir``); None: neither.
        on_epoch: Called on every rank at the end of an epoch (from 1), with a function that returns the state as it
            would be returned now; what it returns joins the epoch's report.
        num_threads: Threads that make views of source images.

    Raises:
        StoppedRun: The context asked to stop; a checkpoint was written, unless it was in the linear probe.
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
    optimizer = build_optimizer(classifier, train)  # first: it freezes a head that does not train
    anchor = Anchor(classifier.visual, train.l2_sp_weight) if train.l2_sp_weight else None
    averaged = trained_weights(classifier) if train.ema_decay is not None else {}
    average = {name: tensor.detach().clone() for name, tensor in averaged.items()}
    micro_batch = micro_batch_of(train, context.world_size)
    targets = Targets(clip, context_head_TD, source, train, device, target_store, micro_batch, class_head_CD)
    teacher = targets.teacher(trained_weights(classifier)) if train.moves_teacher else {}
    writer = CheckpointWriter(checkpoint_dir if context.rank == 0 else None, attempt)
    learner = _Learner(classifier, optimizer, average, teacher, train, context, writer, anchor)
    if checkpoint_dir is not None:
        learner.resume(checkpoint_dir)
    if train.probe_epochs and learner.step == 0:

        def end_if_asked() -> None:
            if from_rank_0(context, context.should_stop):
                raise StoppedRun("stopped on request in the linear probe")

        probe(classifier, clip, source, train, context, micro_batch, num_threads, end_if_asked)
        if average:  # has begun with the zero-shot head
            move_towards(average, trained_weights(classifier), 1.0)
    if train.compile is True:
        compile_tower(classifier, micro_batch, train.grad_checkpointing)
    model: nn.Module = classifier
    if context.world_size > 1:
        model = DistributedDataParallel(classifier, broadcast_buffers=False, gradient_as_bucket_view=True)
    with targets, writer:
        _train(learner, model, targets, on_epoch, num_threads)
    return learner.state()


def _train(learner: _Learner, model: nn.Module, targets: Targets, on_epoch: OnEpoch | None, num_threads: int) -> None:
    """Makes the steps that are left."""
    source, train, context, device = targets.source, learner.train, learner.context, targets.device
    loss = Loss(targets.context_head_TD, targets.context_scale, train)
    steps_per_epoch = math.ceil(len(source) / train.batch_size)
    num_steps = train.epochs * steps_per_epoch
    learner.shares = teacher_shares(num_steps) if learner.teacher else []
    warmup = num_warmup_steps(train.warmup_steps, num_steps)
    names = (*loss.names, *(("l2_sp",) if train.l2_sp_weight else ()), "grad_norm")
    window = torch.zeros(2, len(names), dtype=torch.float64, device=device)  # sums; and times their share in the loss
    window_images, clock = 0, time.perf_counter()
    for batch in _views(targets, train, context, learner.step, num_threads):
        learning_rate = learning_rate_at(learner.step, train.learning_rate, warmup, num_steps)
        set_learning_rate(learner.optimizer, learning_rate)
        share = share_at(train, learner.step, num_steps)
        sums = learner.update(loss, targets, model, batch, num_steps, share)
        window += torch.stack([sums, share * sums])
        window_images += batch.size

        step = learner.step
        ends_epoch = step % steps_per_epoch == 0
        if step % LOG_EVERY and not ends_epoch:
            continue
        values = _means_of_window(window, window_images, names, train, context)
        if not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
            found = f"loss {values['loss']:.4g}; gradient {values['grad_norm']:.4g}"
            rule = "loss and norm of the gradient must stay finite"
            raise DivergedError(Problem(f"step {step} of {num_steps}", rule, found))
        learner.means.add(values, window_images)
        speed = window_images / max(time.perf_counter() - clock, 1e-9)
        row = {"step": step, "num_steps": num_steps, "epoch": batch.epoch, "learning_rate": learning_rate}
        if context.rank == 0:
            context.progress({**row, **values, "images_per_s": speed})
        learner.writer.check()
        if ends_epoch:
            metrics = on_epoch(learner.state, batch.epoch) if on_epoch is not None else {}
            if context.rank == 0:
                context.report({**row, **learner.means.values(), "images_per_s": speed, **metrics})
            learner.means = _Means()
        asked = CONTINUE if step == num_steps else _asked(learner, ends_epoch)
        if asked != CONTINUE:
            learner.save()
        if asked == STOP:
            learner.writer.wait()
            raise StoppedRun(f"stopped on request at step {step} of {num_steps}")
        window.zero_()
        window_images, clock = 0, time.perf_counter()


def _views(
    targets: Targets, train: TrainConfig, context: RunContext, first_step: int, num_threads: int
) -> Iterator[Batch]:
    """Yields this worker's part of each batch, from ``first_step`` on; the next ones are made meanwhile.

    A view is a function of seed, sample and visit, so the number of threads changes nothing.
    """
    num_images = len(targets.source)
    first_epoch, first_batch = divmod(first_step, math.ceil(num_images / train.batch_size))
    part = math.ceil(train.batch_size / context.world_size)
    # on a CPU one of them computes; a GPU's loop only starts kernels
    view_threads, stream = num_threads - (targets.device.type != "cuda"), targets.stream

    def parts() -> Iterator[tuple[int, IntArray, int, list[Part]]]:
        for epoch in range(first_epoch, train.epochs):
            order = permutation(train.seed, epoch, num_images)
            skip = first_batch if epoch == first_epoch else 0
            mine = parts_of(order, train.batch_size, context.rank, context.world_size, skip)
            for number, (first, indices) in enumerate(mine, start=skip):
                size = min(train.batch_size, num_images - number * train.batch_size)
                yield epoch, indices, size, targets.parts(epoch, order, first, len(indices))

    with prefetch.view_threads(view_threads) as make_views:

        def make(
            epoch: int, indices: IntArray, size: int, parts: list[Part]
        ) -> tuple[int, IntArray, int, list[Part], prefetch.Upload]:
            pixels = targets.views(parts, indices, epoch, make_views)
            return epoch + 1, indices, size, parts, prefetch.upload([pixels, targets.source.labels[indices]], stream)

        number = prefetch.num_ahead(part, view_threads)
        if number and train.kl_weight:  # small batches have blocks of targets together: those of two blocks
            number = max(number, min(2 * BLOCK // part, MOST_AHEAD))
        with contextlib.closing(prefetch.made_ahead(make, parts(), number)) as made:
            for epoch, indices, size, blocks, uploaded in made:
                yield Batch(epoch, indices, size, blocks, *prefetch.arrived(uploaded))


def _means_of_window(
    window: Tensor, num_images: int, names: Sequence[str], train: TrainConfig, context: RunContext
) -> dict[str, float]:
    """Returns the means over the images that all workers saw since the last row of progress, with that of the loss."""
    window = window.clone()
    if context.world_size > 1:
        dist.all_reduce(window)
    means, scheduled = (dict(zip(names, row, strict=True)) for row in (window / num_images).tolist())
    in_loss = {**scheduled, "l2_sp": means.get("l2_sp", 0.0)}  # which has no schedule
    terms = (getattr(train, name) * in_loss.get(name.removesuffix("_weight"), 0.0) for name in PENALTIES)
    return {"loss": sum(terms, start=means["ce"]), **means}


def _asked(learner: _Learner, ends_epoch: bool) -> int:
    """Returns on all ranks whether rank 0 is to stop, or to write a checkpoint because of ``checkpoint_every``."""
    every = learner.train.checkpoint_every

    def ask() -> int:
        is_due = ends_epoch if every is None else time.monotonic() - learner.saved_at >= every
        return STOP if learner.context.should_stop() else SAVE if is_due else CONTINUE

    return from_rank_0(learner.context, ask)
