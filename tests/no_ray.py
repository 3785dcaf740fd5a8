"""`search`, `resume` and `confirm` with all trainings in this process, one after the other, without Ray."""

import contextlib

from carft_ray.evaluation.run import on_all_cores
from carft_ray.launch import confirm, search
from carft_ray.launch.cluster import Node
from carft_ray.layout import PREPARED
from carft_ray.learning.context import RunContext
from carft_ray.recipe.space import apply


def install(monkeypatch):
    """Replaces what starts Ray and what runs on it, for one test or module."""
    for module in (search, confirm):
        monkeypatch.setattr(module, "running_ray", lambda *words: contextlib.nullcontext((Node(2.0, 0.0),)))
        monkeypatch.setattr(module, "run_prepare", _prepare)
        monkeypatch.setattr(module, "run_trainings", _train)


def _prepare(plan, say):
    return plan.runner.prepare(on_all_cores(plan.recipe), plan.study_dir / PREPARED)


def _train(study, plan, on_event, began=None):
    while (spec := study.next()) is not None:
        folder = spec.folder(study.study_dir)
        folder.mkdir(parents=True, exist_ok=True)
        recipe, prepared = apply(plan.recipe, spec.values), study.study_dir / PREPARED
        plan.runner.train(recipe, folder, prepared, RunContext(), spec.attempt)
        study.settle(spec)
    return ""
