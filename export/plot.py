"""The demo's figure: one network trained with BatchNorm and with BatchRenorm, and what r and d did meanwhile."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from export.train import Curves

_NORM_COLOR, _RENORM_COLOR, _INK, _MUTED = "#4477aa", "#cc3311", "#222222", "#777777"

_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelcolor": _INK,
    "axes.edgecolor": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e4e4e4",
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "lines.linewidth": 2.2,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "white",
}


def save_curves(path: Path, batch_norm: Curves, batch_renorm: Curves, *, title: str, subtitle: str) -> None:
    """Draw training loss, test error, r and d over the steps, and write a PNG.

    Args:
        path: Where the PNG goes; replaced if it exists.
        batch_norm: Curves of the network with BatchNorm.
        batch_renorm: Curves of the same network with BatchRenorm; r and d are drawn from these.
        title: First line of the figure.
        subtitle: Second line.
    """
    with plt.rc_context(_STYLE):
        figure = curves_figure(batch_norm, batch_renorm, title=title, subtitle=subtitle)
        figure.savefig(path, dpi=160, format="png", metadata={"Software": None})
        plt.close(figure)


def curves_figure(batch_norm: Curves, batch_renorm: Curves, *, title: str, subtitle: str) -> Figure:
    """Draw what `save_curves` writes.

    Args:
        batch_norm: As there.
        batch_renorm: As there.
        title: As there.
        subtitle: As there.

    Returns:
        A figure of four panels.
    """
    figure = plt.figure(figsize=(12.5, 5.0))
    grid = figure.add_gridspec(
        2, 3, width_ratios=(1, 1, 0.8), left=0.06, right=0.975, top=0.77, bottom=0.12, wspace=0.25, hspace=0.42
    )
    loss, error = figure.add_subplot(grid[:, 0]), figure.add_subplot(grid[:, 1])
    ratio, shift = figure.add_subplot(grid[0, 2]), figure.add_subplot(grid[1, 2])
    figure.text(0.06, 0.945, title, fontsize=15, fontweight="bold", color=_INK, va="center")
    figure.text(0.06, 0.88, subtitle, fontsize=11, color=_MUTED, va="center")
    _draw_pair(loss, batch_norm.step, batch_norm.train_loss, batch_renorm.train_loss)
    loss.set(title="Training loss", ylabel="cross-entropy (nats)", xlabel="step", ylim=(0, None))
    loss.legend(loc="upper right", frameon=False)
    _draw_pair(error, batch_norm.step, batch_norm.test_error, batch_renorm.test_error)
    _draw_error_axis(error, batch_norm, batch_renorm)
    _draw_ratio(ratio, batch_renorm)
    _draw_shift(shift, batch_renorm)
    handles, labels = shift.get_legend_handles_labels()
    corner = (0.985, 0.905)
    figure.legend(handles, labels, loc="center right", bbox_to_anchor=corner, ncols=2, frameon=False, fontsize=10)
    for axes in (loss, error, ratio, shift):
        axes.set_xlim(0, batch_norm.step[-1])
    return figure


def _draw_pair(axes: Axes, step: list[int], batch_norm: list[float], batch_renorm: list[float]) -> None:
    axes.plot(step, batch_norm, color=_NORM_COLOR, label="BatchNorm")
    axes.plot(step, batch_renorm, color=_RENORM_COLOR, label="BatchRenorm")


def _draw_error_axis(axes: Axes, batch_norm: Curves, batch_renorm: Curves) -> None:
    """Logarithmic, in percent, from just below the smallest error seen."""
    least = min(e for e in (*batch_norm.test_error, *batch_renorm.test_error, 1.0) if e > 0)
    axes.set(title="Test error, inference mode", ylabel="wrong answers", xlabel="step", yscale="log")
    axes.set_ylim(least * 0.8, 1.0)
    ticks = [t for t in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if t >= least * 0.8]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))


def _draw_ratio(axes: Axes, curves: Curves) -> None:
    _draw_band(axes, curves.step, curves.r)
    _draw_bounds(axes, curves.step, [1 / r_max for r_max in curves.r_max], curves.r_max)
    axes.set(title=r"Scale correction $r = \sigma_{batch}\,/\,\sigma$", yscale="log", ylim=(0.2, 5))
    axes.yaxis.set_major_locator(FixedLocator([0.25, 0.5, 1, 2, 4]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(labelbottom=False)


def _draw_shift(axes: Axes, curves: Curves) -> None:
    _draw_band(axes, curves.step, curves.d)
    _draw_bounds(axes, curves.step, [-d_max for d_max in curves.d_max], curves.d_max)
    axes.set(title=r"Shift correction $d = (\mu_{batch} - \mu)\,/\,\sigma$", xlabel="step", ylim=(-6, 6))


def _draw_bounds(axes: Axes, step: list[int], low: list[float], high: list[float]) -> None:
    for values, label in ((low, None), (high, "bounds in force")):
        axes.plot(step, values, color=_INK, linewidth=1.2, linestyle=(0, (4, 2)), label=label)


def _draw_band(axes: Axes, step: list[int], quantiles: list[tuple[float, float, float]]) -> None:
    """Shade from the 5 % to the 95 % quantile and draw the median."""
    low, median, high = zip(*quantiles, strict=True)
    axes.fill_between(step, low, high, color=_RENORM_COLOR, alpha=0.22, linewidth=0, label="90 % of all channels")
    axes.plot(step, median, color=_RENORM_COLOR, linewidth=1.4)
