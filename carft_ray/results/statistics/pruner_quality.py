"""How well intermediate values predict the final objective of the trainings that were not cut."""

from collections.abc import Sequence
from typing import Any

from carft_ray.recipe.schema import PrunerConfig
from carft_ray.results.statistics.intervals import rank_correlation
from carft_ray.study.outcome import TrialRow
from carft_ray.study.proposals.pruning import deciding_value
from carft_ray.words import counted

WEAK = 0.3  # rank correlation under which a warning is given,
ENOUGH = 10  # from this many complete trials on


def pruner_quality(pruner: PrunerConfig, rows: Sequence[TrialRow]) -> dict[str, Any]:
    """Returns what is shown of a pruner, as plain data.

    Args:
        pruner: The recipe's; not ``none``.
        rows: The trials.

    Returns:
        ``name``, ``num_cut``, ``num_late`` (complete trials that would have been cut, but had ended by then),
        ``trials`` (complete ones with intermediate values), ``rank_correlation`` (Spearman's, of the last one at which
        a training could have been cut with its final objective; None where it is not defined), ``lines``, and
        ``warning`` (None, or a sentence).
    """
    pairs = [
        (value, row.objective)
        for row in rows
        if row.outcome == "complete"
        and row.objective is not None
        and (value := deciding_value(pruner, row.intermediate_values)) is not None
    ]
    value = rank_correlation([value for value, _ in pairs], [objective for _, objective in pairs])
    num_cut = sum(row.outcome == "pruned" for row in rows)
    num_late = sum(bool(row.late_cut) for row in rows)
    late = f", {num_late} more would have been, but had ended before the cut took effect" if num_late else ""
    shown = "not known yet" if value is None else f"{value:.2f}"
    line = (
        f"Pruner {pruner.name}: {counted(num_cut, 'trial')} cut{late}; rank correlation of the last intermediate value "
        f"before the end with the final objective: {shown} ({counted(len(pairs), 'complete trial')})."
    )
    warning = None
    if value is not None and value < WEAK and len(pairs) >= ENOUGH:
        warning = (
            f"the intermediate values of {pruner.name} hardly predict the end (rank correlation {value:.2f}): it may "
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
