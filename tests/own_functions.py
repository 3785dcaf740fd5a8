"""Fine-tunings of the user's own for the tests: each does one thing that such a function may do."""

import time

import torch
from torch.nn.functional import cross_entropy


def few_steps(values, context, seconds=0.0):
    """Trains on one batch, an epoch a step; reports and asks as a real one does."""
    model, images = context.model, context.train_set
    batch = torch.stack([images[i][0] for i in range(len(images))]).to(context.device)
    labels = torch.from_numpy(images.labels).to(context.device)
    optimizer = torch.optim.SGD(model.parameters(), values["learning_rate"])
    for epoch in range(1, values["epochs"] + 1):
        if context.should_stop():
            return None
        loss = cross_entropy(model(batch), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        context.report({"epoch": epoch, "loss": loss})
        time.sleep(seconds)
    return model.state_dict()


def slow_steps(values, context):
    """The same, so slow that the pruner's answer comes while it trains."""
    return few_steps(values, context, seconds=0.6)


def frozen(values, context):
    """Returns the zero-shot model."""
    return context.frozen.state_dict()


def raises(values, context):
    raise ZeroDivisionError("of mine")


def exits(values, context):
    raise SystemExit(3)


def diverges(values, context):
    context.report({"epoch": 1, "loss": 1.0})
    context.report({"epoch": 2, "train/loss": float("nan")})


def misspelled_state(model):
    return {name.replace("head", "haed"): tensor for name, tensor in model.state_dict().items()}


def misspelled(values, context):
    return misspelled_state(context.model)


def one_argument(values):
    return values
