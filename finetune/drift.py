"""Reward hacking, to be seen: what is reinforced against what is meant, and how answers grow.

Gao et al. 2023 (arXiv:2210.10760): a proxy goes on rising when the truth has begun to fall.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

SERIES = {
    "grader": "rewards/grader/mean",
    "proxy": "rewards/proxy/mean",
    "preferred": "rewards/accuracies",
    "length": "completions/mean_length",
}
"""Names of ours, and of trl's log."""

_SHARE = 0.2
"""Of the reports, that are the beginning, and the end."""

History = Sequence[Mapping[str, Any]]


def series(history: History) -> dict[str, list[tuple[int, float]]]:
    """By name, (step, value) of what the trainer reported."""
    found = {
        name: [(int(one["step"]), float(one[key])) for one in history if key in one]
        for name, key in SERIES.items()
    }
    return {name: values for name, values in found.items() if values}


def figures(history: History) -> dict[str, float]:
    """Means over the beginning and the end of the training, for the manifest."""
    found: dict[str, float] = {}
    for name, values in series(history).items():
        few = max(1, round(_SHARE * len(values)))
        found[f"training.{name}_first"] = fmean(value for _, value in values[:few])
        found[f"training.{name}_last"] = fmean(value for _, value in values[-few:])
    return found


def plot(history: History, path: Path) -> None:
    """Rewards and lengths by step, as a picture; nothing where there are none."""
    found = series(history)
    if not found:
        return
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    axis.set(xlabel="step", ylabel="reward")
    for name, values in found.items():
        on = axis.twinx() if name == "length" else axis
        on.plot(*zip(*values, strict=True), label=name, color="grey" if on is not axis else None)
        if on is not axis:
            on.set_ylabel("tokens of an answer (grey)")
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
