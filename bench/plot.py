"""Charts to a file, without a display."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def panels(path: str, rows: int, columns: int, size: tuple[float, float]) -> Iterator[Any]:
    """A grid of axes to draw on, saved to `path` at the end; `size` in inches."""
    import matplotlib as mpl  # takes a second, and most runs draw nothing

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False)
    yield axes
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
