"""A fine-tuning of the user's own: ``fn(values, context)`` is given a ``TrainingContext`` and returns a state dict.

It takes the place of ``loop.fine_tune``; what comes after a training (alpha curve, evaluation, export) is the same.

Shape letters: B images, C classes, D embedding width, S side of an image.
"""

import contextlib
import functools
import math
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms

from carft_ray import files
from carft_ray.data.source import ImageSet, IntArray, Source
from carft_ray.errors import DivergedError, OutOfMemoryError, Problem, RecipeError, nearest
from carft_ray.model.classifier import ImageClassifier, build_classifier, copies
from carft_ray.recipe.schema.train import TrainConfig
from carft_ray.training.loop import StoppedRun, same_attention
from carft_ray.training.out_of_memory import is_out_of_memory
from carft_ray.training.own_function import KEY
from carft_ray.training.ranks import from_rank_0, gather, on_all_ranks
from carft_ray.training.run_context import RunContext
from carft_ray.training.shared_inputs import SharedInputs

WRAPPERS = ("module.", "_orig_mod.", "module.")  # of DistributedDataParallel and torch.compile, in each order
MOST_SHOWN = 5  # problems of a state

State = Mapping[str, Tensor]
Transform = Callable[[Image.Image], Any]
OnEpoch = Callable[[Callable[[], dict[str, Tensor]], int], dict[str, float]]


class OwnClassifier(ImageClassifier):
    """The classifier that a training starts from, for normalised images: [B, 3, S, S] -> logits [B, C].

    ``visual`` is the image tower and ``class_head`` the head; ``features`` takes uint8 pixels [B, S, S, 3].
    """

    def forward(self, images_BCHW: Tensor) -> Tensor:  # type: ignore[override]  # of another input
        """Returns the class logits [B, C] of normalised images [B, 3, S, S]."""
        return self.logits(self.embed(images_BCHW.to(self.mean.dtype)))  # fp64 has weights wider than the images


class Images(Dataset[tuple[Any, int]]):
    """A set as torch's ``DataLoader`` takes it: (image, label) pairs, the image as ``transform`` makes it.

    Args:
        images: The set.
        transform: Given an RGB image of PIL.

    Attributes:
        labels: Label of every image, int64 [N]; positions in ``class_names`` of the context.
        transform: As given.
    """

    def __init__(self, images: Source | ImageSet, transform: Transform) -> None:
        self._images = images
        self.labels: IntArray = images.labels
        self.transform = transform

    def __len__(self) -> int:
        """Returns N."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Returns image ``index``, transformed, and its label."""
        return self.transform(self.image(index)), int(self.labels[index])

    def image(self, index: int) -> Image.Image:
        """Returns image ``index`` in RGB: of the training set as it is stored, of a validation set S x S.

        Raises:
            DataError: It cannot be read.
        """
        if not 0 <= index < len(self):  # what ends a plain ``for`` over a set
            raise IndexError(index)
        is_decoded = isinstance(self._images, ImageSet)
        return Image.fromarray(self._images.images_NHWC[index] if is_decoded else self._images.pixels(int(index)))  # type: ignore[union-attr]  # by is_decoded

    def with_transform(self, transform: Transform) -> "Images":
        """Returns the same images with another transform."""
        return Images(self._images, transform)


class TrainingContext:
    """The second argument of ``fn(values, context)``. It gives no access to test sets.

    Attributes:
        rank: Number of this worker; if there are several, the state of rank 0 counts.
        world_size: Number of workers; with more than one ``torch.distributed`` is initialised.
        device: Where to compute.
        model: A fresh trainable classifier on ``device``, equal to the zero-shot one: images -> logits [B, C].
        class_names: Words for the classes, in label order.
        image_size: S.
        transform: The model's evaluation preprocessing: RGB image of PIL -> normalised [3, S, S].
        train_transform: Random crop of ``crop_scale``, bicubic resize to S, the same normalisation.
        normalise: Tensor [3, S, S] or [B, 3, S, S] in [0, 1] -> normalised.
        train_set: The training set, with ``train_transform``.
        validation_sets: By name, ``id_val`` first, with ``transform``.
        checkpoint_dir: An existing folder of this training for the files that the function needs to continue. Empty
            at the first attempt, removed when the training has ended. Rank 0 writes it; each report keeps its
            content.
    """

    def __init__(
        self,
        train: TrainConfig,
        inputs: SharedInputs,
        class_head_CD: Tensor,
        run: RunContext,
        device: torch.device,
        checkpoint_dir: Path,
        on_epoch: OnEpoch,
    ) -> None:
        clip, bicubic = inputs.clip, transforms.InterpolationMode.BICUBIC
        crop = transforms.RandomResizedCrop(clip.image_size, (train.crop_scale, 1.0), interpolation=bicubic)
        self.rank, self.world_size = run.rank, run.world_size
        self.device, self.checkpoint_dir = device, checkpoint_dir
        self._made = functools.partial(build_classifier, clip, class_head_CD, train, device, OwnClassifier)
        self.model: OwnClassifier = self._made().train()  # type: ignore[assignment]  # of that class
        self.class_names, self.image_size = inputs.class_names, clip.image_size
        self.normalise = transforms.Normalize(clip.mean, clip.std)
        to_input = [transforms.ToTensor(), self.normalise]
        self.transform: Transform = transforms.Compose([clip.to_input, *to_input])
        self.train_transform: Transform = transforms.Compose([crop, *to_input])
        self.train_set = Images(inputs.train, self.train_transform)
        self.validation_sets = {each.name: Images(each, transforms.Compose(to_input)) for each in inputs.validation}
        self._start: State = self.model.state()
        self._run, self._num_epochs, self._on_epoch = run, train.epochs, on_epoch
        self._epoch, self._is_stopped = 0, False  # the last epoch that was reported

    @functools.cached_property
    def frozen(self) -> OwnClassifier:
        """The zero-shot classifier, made when it is first asked for: eval mode, without gradients."""
        return self._made().eval().requires_grad_(False)  # type: ignore[return-value]  # of that class

    def report(self, metrics: Mapping[str, Any], state: State | None = None) -> None:
        """Reports the end of an epoch, on every rank: a row of ``metrics.jsonl``, for pruner, live table, TensorBoard.

        If the recipe needs an intermediate value, the mixed weights are evaluated on a subset of the validation
        sets, as in the built-in loop; ``metrics`` may have any names.

        Args:
            metrics: Numbers by name. ``epoch`` counts from 1 and is by default the one after the last reported; give
                it in a function that continues from a checkpoint. ``step`` and ``num_steps`` are by default the epochs.
                A number that is not finite is left out.
            state: The current weights; None: those of ``model``, once they have changed.

        Raises:
            DivergedError: A number with ``loss`` in its name is not finite, on any rank.
            TypeError: A value is not a number.
            RecipeError: ``state`` has other names or shapes than ``model.state_dict()``.
        """
        row = {name: _number(name, value) for name, value in metrics.items()}
        epoch = self._epoch = int(row.get("epoch", self._epoch + 1))
        bad = next((name for name, value in row.items() if "loss" in name and not math.isfinite(value)), "")
        if bad := next(filter(None, gather(self._run, f"{bad} {row[bad]}" if bad else "")), ""):
            place = f"epoch {epoch} of {self._num_epochs}"
            raise DivergedError(Problem(place, "the loss must stay finite", bad))
        row = {name: value for name, value in row.items() if math.isfinite(value)}
        found = {}
        if any(gather(self._run, state is not None or self._has_moved())):  # all ranks, or none: it is a collective
            now = self.model.state_dict() if state is None else state
            found = self._on_epoch(lambda: checked_state(now, self._start), epoch)
        self._run.should_stop()  # a sign of life
        if self.rank == 0:
            row = {"step": epoch, "num_steps": self._num_epochs, **row, "epoch": epoch}
            self._run.progress(row)
            self._run.report({**row, **found})

    def should_stop(self) -> bool:
        """Returns whether to end now: the search stops, the pruner has cut the training, or its node is taken away.

        Save what is needed to continue, then return; this return value does not count. Call it every few steps, on all
        ranks alike: it is also the heartbeat of the training (``resources.hang_timeout_s``).
        """
        answer = self._run.should_stop()  # on every rank: a sign of life
        self._is_stopped |= from_rank_0(self._run, lambda: answer)
        return self._is_stopped

    def _has_moved(self) -> bool:
        now = self.model.state_dict()
        return any(not torch.equal(now[name].cpu(), tensor) for name, tensor in self._start.items())


@same_attention()
def own_fine_tune(
    function: Callable[[dict[str, Any], TrainingContext], Any],
    train: TrainConfig,
    inputs: SharedInputs,
    class_head_CD: Tensor,
    context: RunContext,
    device: torch.device,
    checkpoint_dir: Path,
    on_epoch: OnEpoch,
) -> dict[str, Tensor]:
    """Calls a function of the user's own; returns the fine-tuned state on the CPU, of rank 0 on every rank.

    The random numbers of Python, NumPy and torch begin at ``train.seed`` plus the rank.

    Args:
        function: Given all of ``train`` as a dictionary, and the context.
        train: The values of the training.
        inputs: Model and sets; no test set is among them.
        class_head_CD: Unit rows [C, D].
        context: Rank, reports and stop flag.
        device: Where to compute.
        checkpoint_dir: The function's folder; it is made.
        on_epoch: Called on every rank at the end of an epoch, as by ``fine_tune``.

    Raises:
        StoppedRun: It was told to stop.
        DivergedError: A loss that it has reported, or a weight that it has returned, is not finite.
        RecipeError: What it returns is no state of this model.
        OutOfMemoryError: The device has no memory for it.
        Exception: What it raises.
    """
    on_all_ranks(context, lambda: _made(checkpoint_dir))
    own = TrainingContext(train, inputs, class_head_CD, context, device, checkpoint_dir, on_epoch)
    seed = train.seed + context.rank
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed % 2**63)
    with _explained(device):
        returned = function(train.model_dump(mode="json"), own)
    if own._is_stopped:
        raise StoppedRun(f"stopped on request after epoch {own._epoch} of {train.epochs}")
    return from_rank_0(context, lambda: finite(checked_state(returned, own._start)))


def _made(folder: Path) -> None:
    with files.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def _explained(device: torch.device) -> Iterator[None]:
    """Makes errors of what the function raises that are none in Python, or that mean something else elsewhere."""
    try:
        yield
    except SystemExit as error:
        raise RuntimeError(f"{KEY} called sys.exit({error.code!r})") from error
    except RuntimeError as error:
        if device.type == "cpu" or not is_out_of_memory(error):
            raise
        first = (str(error).splitlines() or [""])[0]
        step = "A smaller batch_size may fit; the function decides how many images it computes at once."
        raise OutOfMemoryError(Problem(KEY, f"must fit into the memory of {device}", first, next_step=step)) from error


def checked_state(returned: Any, start: State) -> dict[str, Tensor]:
    """Returns copies of a state on the CPU, in the precision of the model.

    Args:
        returned: What the function gave; the prefixes of wrapped models are taken off its names.
        start: The state of the model; the same names and shapes must be in ``returned``.

    Raises:
        RecipeError: They are not.
    """
    names = f"must return a state dict such as context.model.state_dict(): {len(start)} tensors by name"
    if not isinstance(returned, Mapping):
        step = "Return model.state_dict()." if isinstance(returned, torch.nn.Module) else ""
        kind = "nothing" if returned is None else type(returned).__name__
        raise RecipeError(Problem(KEY, names, kind, next_step=step))
    state = {functools.reduce(str.removeprefix, WRAPPERS, str(name)): value for name, value in returned.items()}
    problems = [Problem(KEY, names, repr(n), nearest=nearest(n, start)) for n in state if n not in start]
    for name, tensor in start.items():
        given = state.get(name)
        if not isinstance(given, Tensor) or given.shape != tensor.shape:
            shape = list(given.shape) if isinstance(given, Tensor) else "nothing" if given is None else type(given)
            problems.append(Problem(KEY, f"{name!r} must be a tensor of the shape {list(tensor.shape)}", str(shape)))
    if problems:
        more = [Problem(KEY, f"and {len(problems) - MOST_SHOWN} more")] if len(problems) > MOST_SHOWN else []
        raise RecipeError([*problems[:MOST_SHOWN], *more])
    return copies({name: state[name].to(tensor.dtype) for name, tensor in start.items()})


def finite(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns a state whose numbers are all finite.

    Raises:
        DivergedError: One is not.
    """
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DivergedError(Problem(KEY, "the weights that it returns must be finite", name))
    return state


def _number(name: str, value: Any) -> float | int:
    """Returns a metric as a plain number.

    Raises:
        TypeError: It is none.
    """
    if isinstance(value, Tensor | np.generic):
        value = value.tolist()  # of one element: a number
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"report takes numbers by name, but got {name}={value!r}")
    return value
