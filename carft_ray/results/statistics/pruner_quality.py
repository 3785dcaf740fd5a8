"""How well the looks of a pruner foretold the end of the trainings that were not cut."""

from collections.abc import Sequence
from typing import Any

from carft_ray.recipe.schema import PrunerConfig
from carft_ray.results.statistics.intervals import rank_correlation
from carft_ray.study.outcome import TrialRow
from carft_ray.study.proposals.pruning import deciding_look
from carft_ray.words import counted

WEAK = 0.3  # rank correlation under which a warning is given,
ENOUGH = 10  # from this many complete trials on


def pruner_quality(pruner: PrunerConfig, rows: Sequence[TrialRow]) -> dict[str, Any]:
    """Returns what is told of a pruner, as plain data.

    Args:
        pruner: The recipe's; not ``none``.
        rows: The trials.

    Returns:
        ``name``, ``num_cut``, ``num_late`` (complete trials that would have been cut, but had ended by then),
        ``trials`` (complete ones that were looked at), ``rank_correlation`` (Spearman's, of the last look at which a
        training could have been cut with its final objective; None where it is not defined), ``lines``, and ``warning``
        (None, or a sentence).
    """
    pairs = [
        (look, row.objective)
        for row in rows
        if row.outcome == "complete"
        and row.objective is not None
        and (look := deciding_look(pruner, row.looks)) is not None
    ]
    value = rank_correlation([look for look, _ in pairs], [objective for _, objective in pairs])
    num_cut = sum(row.outcome == "pruned" for row in rows)
    num_late = sum(bool(row.late_cut) for row in rows)
    late = f", {num_late} more would have been, but had ended before the cut took effect" if num_late else ""
    told = "not known yet" if value is None else f"{value:.2f}"
    line = (
        f"Pruner {pruner.name}: {counted(num_cut, 'trial')} cut{late}; rank correlation of the last look before the "
        f"end with the final objective: {told} ({counted(len(pairs), 'complete trial')})."
    )
    warning = None
    if value is not None and value < WEAK and len(pairs) >= ENOUGH:
        warning = (
            f"the looks of the pruner {pruner.name} hardly foretell the end (rank correlation {value:.2f}): it may "
            "have cut good trials. A later search.pruner.first or a larger evaluate.subset tells more."
        )
    return {
        "name": pruner.name,
        "num_cut": num_cut,
        "num_late": num_late,
        "trials": len(pairs),
        "rank_correlation": value,
        "warning": warning,
        "lines": [line],
    }
