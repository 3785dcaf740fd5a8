"""CAR-FT on one page: heads, loss, fine-tuning, alpha curve, objective, and a search that repeats what leads.

    python examples/mini_carft.py

Read this before the package. It is the method alone: one process, no Ray, no checkpoints. Images and the tiny CLIP (a
model of open_clip) are the sandbox of carft-ray (``sandbox``); everything else is torch and Optuna. A test checks that
losses, alpha curves, objectives and trained weights are those of the package.

Context-aware robust fine-tuning (CAR-FT, arXiv 2211.16175) fine-tunes CLIP's image encoder with cross-entropy, plus
``kl_weight`` times the KL divergence between two distributions over contexts ("a photo of a ...", "a sketch of a ..."):
that of the frozen model and that of the fine-tuned one. The weights of both models are then mixed (WiSE-FT, arXiv
2109.01903).

Shape letters: B images of a batch, N images of a set, C classes, T templates (contexts), D embedding width, S side of
an image. Accuracies are fractions.
"""

import copy
import functools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator

import optuna
import torch
from torch import Tensor, nn
from torch.nn import functional

Sets = dict[str, tuple[Tensor, Tensor]]  # name -> pixels, uint8 [N, S, S, 3], and labels [N]
State = dict[str, Tensor]
Tokenizer = Callable[[list[str]], Tensor]
Values = tuple[float, float]  # learning rate and KL weight
ALPHAS = (0.2, 0.4, 0.6, 0.8, 1.0)
ID_WEIGHT = 0.5  # of the ID accuracy in the objective
BATCH_SIZE, WEIGHT_DECAY, CLIP_NORM, CROP_SCALE = 64, 0.1, 1.0, 0.9
NUM_VALUES, NUM_REPEATED, NUM_SEEDS, NUM_EPOCHS = 6, 2, 3, 6


# ---- the text side: computed once, then constant


@torch.no_grad()
def heads(model: nn.Module, tokenizer: Tokenizer, classes: list[str], templates: list[str]) -> tuple[Tensor, Tensor]:
    """Returns ``class_head`` [C, D] and ``context_head`` [T, D], unit rows.

    text[t, c] is the unit embedding of template t with class c. A class is the mean over templates, a context the mean
    over classes; both are normalised again.
    """
    sentences = [[template.replace("{}", name) for name in classes] for template in templates]
    text_TCD = torch.stack([functional.normalize(model.encode_text(tokenizer(each)), dim=-1) for each in sentences])
    return functional.normalize(text_TCD.mean(0), dim=-1), functional.normalize(text_TCD.mean(1), dim=-1)


# ---- the model and the loss


class Classifier(nn.Module):
    """CLIP's image tower with a class head that starts as the zero-shot classifier.

    The logit scale s is inside the head, so the logits are f @ head.T for a unit embedding f.
    """

    def __init__(self, clip: nn.Module, class_head_CD: Tensor) -> None:
        super().__init__()
        self.visual, self.scale = copy.deepcopy(clip.visual), float(clip.logit_scale.exp())
        self.class_head = nn.Parameter(self.scale * class_head_CD)
        self.mean, self.std = torch.tensor(clip.visual.image_mean), torch.tensor(clip.visual.image_std)
        self.eval().requires_grad_(False)  # BatchNorm keeps its statistics, so the KL is 0 before the first step

    def embed(self, pixels_BSS3: Tensor) -> Tensor:
        """Returns the unit embeddings [B, D] of uint8 pixels."""
        images = (pixels_BSS3 / 255 - self.mean) / self.std
        return functional.normalize(self.visual(images.permute(0, 3, 1, 2)), dim=-1)


def context_log_probabilities(features_BD: Tensor, context_head_TD: Tensor, scale: float) -> Tensor:
    """Returns log p [B, T] with p = softmax over t of s <f, context_head[t]>.

    The scale is inside the softmax. Without it the KL is about 1e-4 and does nothing.
    """
    return functional.log_softmax(scale * features_BD @ context_head_TD.T, dim=-1)


def car_ft_loss(
    model: Classifier, frozen: Classifier, context_head_TD: Tensor, pixels: Tensor, labels_B: Tensor, kl_weight: float
) -> Tensor:
    """Returns 1/B sum_b CE(logits[b], y[b]) + kl_weight 1/B sum_b KL(p0[b] || p[b]), both models on the same views.

    p0 is the context distribution of the frozen model, p that of the model in training. With ``kl_weight`` 0 this is
    plain fine-tuning.
    """
    features_BD = model.embed(pixels)
    loss = functional.cross_entropy(features_BD @ model.class_head.T, labels_B)
    if not kl_weight:
        return loss
    with torch.no_grad():
        log_p0_BT = context_log_probabilities(frozen.embed(pixels), context_head_TD, model.scale)
    log_p_BT = context_log_probabilities(features_BD, context_head_TD, model.scale)
    return loss + kl_weight * functional.kl_div(log_p_BT, log_p0_BT, reduction="batchmean", log_target=True)


# ---- one fine-tuning


def learning_rate_at(step: int, peak: float, num_steps: int) -> float:
    """Returns the learning rate of a step from 0: warm-up over 10 % of the steps, then a cosine to 0 (as wise-ft)."""
    warmup = min(500, num_steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (num_steps - warmup))) / 2


def fine_tune(
    frozen: Classifier,
    context_head_TD: Tensor,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_steps: int,
    learning_rate: float,
    kl_weight: float,
) -> State:
    """Fine-tunes a copy of the zero-shot classifier: AdamW on all weights, gradients clipped to a norm of 1.

    Args:
        frozen: The zero-shot classifier, which stays as it is.
        context_head_TD: Of ``heads``.
        batches: Views and labels, ``num_steps`` of them in all epochs.
        num_steps: Length of the schedule.
        learning_rate: The highest one.
        kl_weight: Weight of the KL term.
    """
    model = copy.deepcopy(frozen).requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY)
    for step, (pixels, labels_B) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = learning_rate_at(step, learning_rate, num_steps)
        optimizer.zero_grad()
        car_ft_loss(model, frozen, context_head_TD, pixels, labels_B, kl_weight).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def views(pixels_NSS3: Tensor, labels_N: Tensor, num_epochs: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields batches: each epoch shows each image once, in another order and another crop (area from 90 % on)."""
    random = torch.Generator().manual_seed(seed)
    side = pixels_NSS3.shape[1]
    for _ in range(num_epochs):
        for indices in torch.randperm(len(labels_N), generator=random).split(BATCH_SIZE):
            crops = []
            for image in pixels_NSS3[indices]:
                share, top, left = torch.rand(3, generator=random).tolist()
                size = round(side * math.sqrt(CROP_SCALE + (1 - CROP_SCALE) * share))
                top, left = round(top * (side - size)), round(left * (side - size))
                crop = image[top : top + size, left : left + size].permute(2, 0, 1)[None]
                crops.append(functional.interpolate(crop, (side, side), mode="bicubic", antialias=True))
            yield torch.cat(crops).permute(0, 2, 3, 1), labels_N[indices]


# ---- weight-space mixing, and what it is worth


def mix(zero_shot: State, fine_tuned: State, alpha: float) -> State:
    """Returns (1 - alpha) zero_shot + alpha fine_tuned over all weights, class head included (WiSE-FT)."""
    return {
        name: torch.lerp(start, fine_tuned[name], alpha) if start.is_floating_point() else start
        for name, start in zero_shot.items()
    }


@torch.no_grad()
def accuracy(model: Classifier, pixels_NSS3: Tensor, labels_N: Tensor) -> float:
    """Returns the share of the images whose class has the largest logit."""
    answers = [(model.embed(part) @ model.class_head.T).argmax(-1) for part in pixels_NSS3.split(256)]
    return float((torch.cat(answers) == labels_N).double().mean())


def objective(accuracies: dict[str, float]) -> float:
    """Returns w ID + (1 - w) mean OOD; ``id_val`` is the ID set, all others are OOD sets."""
    ood = [value for name, value in accuracies.items() if name != "id_val"]
    return ID_WEIGHT * accuracies["id_val"] + (1 - ID_WEIGHT) * statistics.fmean(ood)


def alpha_curve(frozen: Classifier, fine_tuned: State, validation: Sets) -> dict[float, dict[str, float]]:
    """Returns the accuracy on each set at each alpha: one training gives the whole curve."""
    model, start = copy.deepcopy(frozen), frozen.state_dict()
    curve = {}
    for alpha in ALPHAS:
        model.load_state_dict(mix(start, fine_tuned, alpha))
        curve[alpha] = {name: accuracy(model, *images) for name, images in validation.items()}
    return curve


def best_alpha(objectives: dict[float, float]) -> float:
    """Returns the alpha with the highest objective, of equals the smallest."""
    return max(sorted(objectives), key=lambda alpha: objectives[alpha])


# ---- a search of values, with repeats


def train_once(
    frozen: Classifier,
    context_head_TD: Tensor,
    train: tuple[Tensor, Tensor],
    validation: Sets,
    values: Values,
    seed: int,
) -> dict[float, float]:
    """Returns the objective at each alpha of one training; the seed decides order and crops."""
    num_steps = NUM_EPOCHS * math.ceil(len(train[1]) / BATCH_SIZE)
    state = fine_tune(frozen, context_head_TD, views(*train, NUM_EPOCHS, seed), num_steps, *values)
    curve = alpha_curve(frozen, state, validation)
    return {alpha: objective(accuracies) for alpha, accuracies in curve.items()}


def summary(of_seeds: list[dict[float, float]]) -> tuple[float, float, float]:
    """Returns alpha, mean and standard deviation over trainings, at the alpha with the highest mean."""
    means = {alpha: statistics.fmean(each[alpha] for each in of_seeds) for alpha in ALPHAS}
    alpha = best_alpha(means)
    return alpha, means[alpha], statistics.stdev(each[alpha] for each in of_seeds) if len(of_seeds) > 1 else math.nan


def search(train: Callable[[Values, int], dict[float, float]]) -> dict[Values, list[dict[float, float]]]:
    """Tries values that Optuna proposes, then trains those that lead again, with other seeds.

    The best of several single trainings is partly luck, so its objective is too high. The leading values, and plain
    fine-tuning at the same learning rate, are therefore compared by their means over several seeds.

    Returns:
        The objectives at each alpha, training by training, of all values that were repeated.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0, n_startup_trials=4))
    found: dict[Values, list[dict[float, float]]] = {}
    for _ in range(NUM_VALUES):
        trial = study.ask()
        learning_rate = trial.suggest_float("learning_rate", 1e-4, 5e-3, log=True)
        values = learning_rate, trial.suggest_float("kl_weight", 0.1, 100, log=True)
        found[values] = [train(values, 0)]
        study.tell(trial, summary(found[values])[1])
        show("", values, found[values])
    leading = sorted(found, key=lambda values: summary(found[values])[1], reverse=True)[:NUM_REPEATED]
    repeated = [*leading, (leading[0][0], 0.0)]
    return {
        values: [
            *found.get(values, []),
            *(train(values, seed) for seed in range(len(found.get(values, [])), NUM_SEEDS)),
        ]
        for values in repeated
    }


def show(what: str, values: Values, of_seeds: list[dict[float, float]]) -> None:
    """Prints a line of the table, in percent."""
    alpha, mean, spread = summary(of_seeds)
    over = "" if math.isnan(spread) else f" +- {100 * spread:.1f}"
    print(
        f"{what}learning_rate {values[0]:.1e}, kl_weight {values[1]:<5.3g} alpha {alpha:.1f}   {100 * mean:.1f}{over} %"
    )


# ---- the sandbox, the one thing that comes from carft-ray


def sandbox(num_train: int = 32, num_validation: int = 24) -> tuple[nn.Module, Tokenizer, list[str], list[str], Sets]:
    """Returns the tiny CLIP, its tokenizer, class names, templates, and the sets, with so many images per class."""
    from carft_ray.data.sandbox import CLASSES, TEMPLATES, SandboxSource
    from carft_ray.model.clip import load_clip
    from carft_ray.recipe.schema.model import ModelConfig

    shifts = ("noisy_photo", "blurry_photo", "painting", "negative")
    sources = {"train": SandboxSource("photo", "train", num_train, "train")}
    sources |= {"id_val": SandboxSource("photo", "val", num_validation, "id_val")}
    sources |= {name: SandboxSource(name, "val", num_validation, name) for name in shifts}
    sets: Sets = {}
    for name, source in sources.items():
        pixels = torch.stack([torch.tensor(source.pixels(index)) for index in range(len(source))])
        sets[name] = pixels, torch.tensor(source.labels)
    clip = load_clip(ModelConfig(name="sandbox"))
    return clip.model, clip.tokenizer, list(CLASSES), list(TEMPLATES), sets


def main() -> None:
    """Runs the search on the sandbox and prints the best setting with its spread over seeds."""
    torch.set_num_threads(1)  # for images this small; threads that wait for each other on a busy machine cost more
    clip, tokenizer, classes, templates, validation = sandbox()
    class_head_CD, context_head_TD = heads(clip, tokenizer, classes, templates)
    frozen, train = Classifier(clip, class_head_CD), validation.pop("train")
    zero_shot = objective({name: accuracy(frozen, *images) for name, images in validation.items()})
    print(f"Objective: mean of ID and OOD accuracy. Zero-shot: {100 * zero_shot:.1f} %. One training per line:")
    found = search(functools.partial(train_once, frozen, context_head_TD, train, validation))
    print(f"\nMean and standard deviation over {NUM_SEEDS} seeds:")
    for values, of_seeds in found.items():
        show("", values, of_seeds)
    best = max(found, key=lambda values: summary(found[values])[1])
    show("Best: ", best, found[best])


if __name__ == "__main__":
    main()
