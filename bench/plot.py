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
        low, high = axis.dataLim.intervalx
        if axis.get_xscale() == "log" and axis.xaxis.get_transform().base == 10 and high < 1e6:
            axis.minorticks_off()  # whose labels would overlap
            axis.set_xticks([10.0**k * step for k in range(7) for step in (1, 2, 5)])
            axis.xaxis.set_major_formatter("{x:,.0f}")
            axis.set_xlim(low / 1.2, high * 1.2)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
