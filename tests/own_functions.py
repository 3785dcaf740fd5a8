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


def not_finite(values, context):
    state = context.model.state_dict()
    state["class_head"] = state["class_head"] * float("inf")
    return state


def nothing(values, context):
    return None


def the_model(values, context):
    return context.model


def misspelled(values, context):
    return {name.replace("head", "haed"): tensor for name, tensor in context.model.state_dict().items()}


def without_head(values, context):
    return {name: tensor for name, tensor in context.model.state_dict().items() if name != "class_head"}


def other_shape(values, context):
    state = context.model.state_dict()
    return {**state, "class_head": state["class_head"][1:]}


def one_argument(values):
    return values
