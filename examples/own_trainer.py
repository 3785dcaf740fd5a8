"""Plain fine-tuning as wise-ft does it (AdamW, cosine, cross-entropy), for `train.function: own_trainer:fine_tune`.

carft-ray search examples/own_trainer.yaml --study studies/own --trust
"""

import math
import os
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader


def fine_tune(values: dict[str, Any], context: Any) -> dict[str, torch.Tensor] | None:
    model, device, epochs = context.model, context.device, values["epochs"]
    loader = DataLoader(context.train_set, batch_size=values["batch_size"], shuffle=True)
    num_steps = epochs * len(loader)
    num_warmup = min(500, num_steps // 10)
    optimizer = torch.optim.AdamW(model.parameters(), values["learning_rate"], weight_decay=values["weight_decay"])

    def factor(step: int) -> float:
        if step < num_warmup:
            return (step + 1) / num_warmup
        return 0.5 * (1 + math.cos(math.pi * (step - num_warmup) / (num_steps - num_warmup)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    kept, first_epoch = context.checkpoint_dir / "last.pt", 1
    if kept.exists():
        model_state, optimizer_state, scheduler_state, epoch = torch.load(kept, map_location=device)
        model.load_state_dict(model_state)
        optimizer.load_state_dict(optimizer_state)
        scheduler.load_state_dict(scheduler_state)
        first_epoch = epoch + 1
    for epoch in range(first_epoch, epochs + 1):
        total = 0.0
        for images, labels in loader:
            if context.should_stop():
                return None
            images, labels = images.to(device), labels.to(device)
            loss = cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            total += loss.item() * len(labels)
        context.report({"epoch": epoch, "loss": total / len(context.train_set), "lr": scheduler.get_last_lr()[0]})
        state = model.state_dict(), optimizer.state_dict(), scheduler.state_dict(), epoch
        torch.save(state, kept.with_suffix(".new"))
        os.replace(kept.with_suffix(".new"), kept)
    return model.state_dict()
