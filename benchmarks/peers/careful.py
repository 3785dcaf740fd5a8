"""The search as a careful engineer writes it by hand: Ray Tune, Optuna, torchvision's ImageFolder, torch's DataLoader.

    python -m benchmarks.peers.careful IMAGES --model DIR --templates FILE --trials 16 [--nested]

CAR-FT on folders of images with any CLIP of open_clip. A trial draws learning rate, KL weight and alpha, trains, mixes
the weights at its alpha, and reports the mean of ID accuracy and mean OOD accuracy. Inline, a trial is one process of
Tune, which is used again for the next; with ``--nested`` it is a Tune function that starts a ``TorchTrainer``, as the
documents of Ray show it. The driver opens the model and embeds the texts once; Ray's object store has them for all.

Shape letters: B images, C classes, D embedding width, T contexts.
"""

import argparse
import copy
import json
import math
import os
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import ray
import ray.train
import torch
from ray import tune
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_data_loader, prepare_model
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.search.optuna import OptunaSearch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, normalize
from torch.utils.data import ConcatDataset, DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

TRAIN, ID_VAL, OOD_VAL = "photo_train", "photo_id_val", ("noisy_photo", "blurry_photo", "painting", "negative")
EPOCHS, BATCH_SIZE, EVALUATION_BATCH, LOADERS = 12, 64, 256, 1
WEIGHT_DECAY, CLIP_NORM, CROP_SCALE = 0.1, 1.0, 0.9
HEAD_CPU = 0.01  # of a trial that waits for its group
SPACE = {"learning_rate": (1e-4, 5e-3), "kl_weight": (0.1, 100.0), "alpha": (0.1, 1.0)}


@dataclass
class Start:
    """What all trials begin from."""

    folder: Path
    visual: nn.Module
    class_head_CD: Tensor
    context_head_TD: Tensor
    scale: float
    augment: Any
    preprocess: Any


class Classifier(nn.Module):
    """Image tower and class head."""

    def __init__(self, visual: nn.Module, head_CD: Tensor) -> None:
        super().__init__()
        self.visual, self.head = visual, nn.Parameter(head_CD)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns unit embeddings [B, D] and class logits [B, C]."""
        features_BD = normalize(self.visual(images), dim=-1)
        return features_BD, features_BD @ self.head.T


def open_start(folder: Path, model_dir: Path, templates: list[str]) -> Start:
    """Opens the model, and embeds the sentences for both heads."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{model_dir}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{model_dir}")
    model = model.eval().requires_grad_(False)
    size, crop = model.visual.image_size, transforms.InterpolationMode.BICUBIC
    classes = [name.replace("_", " ") for name in ImageFolder(str(folder / TRAIN)).classes]
    with torch.inference_mode():
        rows = [model.encode_text(tokenizer([t.format(name) for name in classes]), normalize=True) for t in templates]
    text_TCD = torch.stack(rows).clone()
    return Start(
        folder,
        model.visual.to(memory_format=torch.channels_last),
        normalize(text_TCD.mean(0), dim=-1),
        normalize(text_TCD.mean(1), dim=-1),
        model.logit_scale.exp().item(),
        transforms.Compose(
            [
                transforms.RandomResizedCrop(size, scale=(CROP_SCALE, 1), interpolation=crop),
                *preprocess.transforms[-2:],  # to a tensor, normalised
            ]
        ),
        preprocess,
    )


def fine_tune(values: dict[str, float], start: Start, in_group: bool) -> float:
    """Trains one model and returns its objective."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    frozen, scale = start.visual, start.scale
    # eval mode: BatchNorm keeps the statistics of pre-training, and the KL begins at 0
    model = Classifier(copy.deepcopy(frozen).requires_grad_(True), scale * start.class_head_CD).eval()
    zero_shot = copy.deepcopy(model.state_dict())
    data = ImageFolder(str(start.folder / TRAIN), start.augment)
    loader = DataLoader(data, BATCH_SIZE, shuffle=True, num_workers=LOADERS, persistent_workers=LOADERS > 0)
    trained: nn.Module = model
    if in_group:
        trained, loader = prepare_model(model), prepare_data_loader(loader)
    optimizer = torch.optim.AdamW(model.parameters(), values["learning_rate"], weight_decay=WEIGHT_DECAY, fused=True)
    num_steps = EPOCHS * len(loader)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(factor, max(1, num_steps // 10), num_steps))
    for _ in range(EPOCHS):
        for images, labels in loader:
            images = images.contiguous(memory_format=torch.channels_last)
            features_BD, logits_BC = trained(images)
            with torch.no_grad():
                log_p0_BT = log_softmax(scale * normalize(frozen(images), dim=-1) @ start.context_head_TD.T, dim=-1)
            log_p_BT = log_softmax(scale * features_BD @ start.context_head_TD.T, dim=-1)
            kl = kl_div(log_p_BT, log_p0_BT, reduction="batchmean", log_target=True)
            optimizer.zero_grad()
            (cross_entropy(logits_BC, labels) + values["kl_weight"] * kl).backward()  # type: ignore[no-untyped-call]  # torch has no types there
            nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
            schedule.step()
    tuned, alpha = model.state_dict(), values["alpha"]
    mixed = {n: t + alpha * (tuned[n] - t) if t.is_floating_point() else t for n, t in zero_shot.items()}
    model.load_state_dict(mixed)
    return objective(model, start)


def factor(warmup: int, num_steps: int, step: int) -> float:
    """Returns the learning rate of a step relative to its peak: linear warm-up, then a cosine."""
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / (num_steps - warmup))) / 2


@torch.inference_mode()
def objective(model: nn.Module, start: Start) -> float:
    """Returns the mean of ID accuracy and mean OOD accuracy."""
    sets = [ImageFolder(str(start.folder / name), start.preprocess) for name in (ID_VAL, *OOD_VAL)]
    right = [
        model(images.contiguous(memory_format=torch.channels_last))[1].argmax(-1) == labels
        for images, labels in DataLoader(ConcatDataset(sets), EVALUATION_BATCH, num_workers=LOADERS)
    ]
    shares, found, start_of = [], torch.cat(right).float(), 0
    for each in sets:
        shares.append(found[start_of : start_of + len(each)].mean().item())
        start_of += len(each)
    id_val, *ood_val = shares
    return (id_val + sum(ood_val) / len(ood_val)) / 2


def trial(values: dict[str, float], start: Start) -> None:
    """A trial in a process of Tune."""
    tune.report({"objective": fine_tune(values, start, in_group=False)})


def nested_trial(values: dict[str, float], start: Start, storage: str) -> None:
    """A trial as a group of workers of Ray Train."""
    trial_id = tune.get_context().get_trial_id()
    TorchTrainer(
        _worker,
        train_loop_config={"values": values, "start": start},
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1 - HEAD_CPU}),
        run_config=RunConfig(
            name=f"train-{trial_id}",
            storage_path=storage,
            callbacks=[TuneReportCallback()],  # type: ignore[no-untyped-call,list-item]  # typed as the older one
        ),
    ).fit()


def _worker(config: dict[str, Any]) -> None:
    ray.train.report({"objective": fine_tune(config["values"], config["start"], in_group=True)})


def search(start: Start, num_trials: int, nested: bool, seed: int, storage: str) -> dict[str, Any]:
    """Runs the search; returns the objective of the best trial and its values."""
    num_cpus = len(os.sched_getaffinity(0))
    ray.init("local", num_cpus=num_cpus, include_dashboard=False, log_to_driver=False)
    if nested:
        trainable = tune.with_parameters(nested_trial, start=start, storage=storage)
    else:
        trainable = tune.with_parameters(trial, start=start)
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"CPU": HEAD_CPU if nested else 1}),
        param_space={
            name: tune.uniform(*ends) if name == "alpha" else tune.loguniform(*ends) for name, ends in SPACE.items()
        },
        tune_config=tune.TuneConfig(
            metric="objective",
            mode="max",
            search_alg=OptunaSearch(seed=seed),
            num_samples=num_trials,
            max_concurrent_trials=num_cpus,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(storage_path=storage, verbose=0),
    )
    best = tuner.fit().get_best_result()
    assert best.metrics is not None
    return {"objective": best.metrics["objective"], "values": {name: best.metrics["config"][name] for name in SPACE}}


def main() -> None:
    """Prints what was found as JSON, in one line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.careful", description="A search by hand.")
    parser.add_argument("images", type=Path, help="folder of DOMAIN/CLASS/FILE, as carft-ray sandbox images writes it")
    parser.add_argument("--model", type=Path, required=True, help="folder of an open_clip model")
    parser.add_argument("--templates", type=Path, required=True, help="file with a sentence on each line, {} its class")
    parser.add_argument("--trials", type=int, default=16, help="trainings (%(default)s)")
    parser.add_argument("--nested", action="store_true", help="each trial is a Ray Train group")
    parser.add_argument("--seed", type=int, default=0, help="of the sampler (%(default)s)")
    arguments = parser.parse_args()
    began = time.monotonic()
    start = open_start(
        arguments.images.resolve(), arguments.model.resolve(), arguments.templates.read_text().splitlines()
    )
    with tempfile.TemporaryDirectory(prefix="careful-") as storage:
        found = search(start, arguments.trials, arguments.nested, arguments.seed, storage)
        ray.shutdown()
    print(json.dumps({**found, "trials": arguments.trials, "elapsed_s": time.monotonic() - began}), flush=True)


if __name__ == "__main__":
    main()
