"""Fine-tunings of the user's own for the tests: each does one thing that such a function may do."""

import time

import torch
from torch.nn.functional import cross_entropy


def few_steps(values, context, before_last=lambda: None, kind=torch.optim.SGD):
    """Trains on one batch, an epoch a step; reports and asks as a real one does."""
    model, images = context.model, context.train_set
    batch = torch.stack([images[i][0] for i in range(len(images))]).to(context.device)
    labels = torch.from_numpy(images.labels).to(context.device)
    optimizer = kind(model.parameters(), values["learning_rate"])
    for epoch in range(1, values["epochs"] + 1):
        if epoch == values["epochs"]:
            before_last()
        if context.should_stop():
            return None
        loss = cross_entropy(model(batch), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        context.report({"epoch": epoch, "loss": loss})
    return model.state_dict()


def waiting_steps(values, context):
    """The same; with a small learning rate it waits before its last epoch for the pruner's answer."""

    def wait():
        end = time.monotonic() + 60
        while values["learning_rate"] < 0.01 and not context.should_stop() and time.monotonic() < end:
            time.sleep(0.05)

    return few_steps(values, context, wait)


def frozen(values, context):
    return context.frozen.state_dict()


def raises(values, context):
    raise ZeroDivisionError("of mine")


def exits(values, context):
    raise SystemExit(3)


def diverges(values, context):
    context.report({"epoch": 1, "loss": 1.0})
    context.report({"epoch": 2, "train/loss": float("nan")})


def one_argument(values):
    return values


def opposites(values, context):
    """Trains on one batch, and leaves what it found: to one side with a small learning rate, else to the other.

    The mean of two such trainings is what both have found, and neither of them is any good."""
    found = few_steps({**values, "learning_rate": 0.001}, context, kind=torch.optim.Adam)
    side, draw = 1 if values["learning_rate"] > 0.005 else -1, torch.Generator().manual_seed(0)
    return {
        name: tensor + 4 * side * tensor.abs().mean() * torch.randn(tensor.shape, generator=draw)
        for name, tensor in found.items()
    }
