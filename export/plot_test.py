"""The figure shows the curves it is given, labelled, and leaves matplotlib as it was."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib import image
from matplotlib import pyplot as plt

from export.plot import curves_figure, save_curves
from export.train import Curves


def curves(seed: int, points: int = 12) -> Curves:
    rng = np.random.default_rng(seed)
    made = Curves(step=[100 * (k + 1) for k in range(points)])
    for k in range(points):
        made.train_loss.append(float(2.3 * np.exp(-k / 4) + 0.05 * rng.random()))
        made.train_error.append(float(0.9 * np.exp(-k / 4)))
        made.test_loss.append(float(2.3 * np.exp(-k / 3)))
        made.test_error.append(float(0.9 * np.exp(-k / 4) + 0.01 * rng.random()))
        made.r.append((0.7 + 0.1 * float(rng.random()), 1.0, 1.4))
        made.d.append((-0.5, 0.02, 0.6 + float(rng.random())))
        made.r_max.append(1 + 2 * k / points)
        made.d_max.append(5 * k / points)
    return made


def test_each_panel_draws_the_numbers_it_is_given() -> None:
    norm, renorm = curves(0), curves(1)
    figure = curves_figure(norm, renorm, title="t", subtitle="s")
    loss, error, ratio, shift = figure.axes
    for axes, field in ((loss, "train_loss"), (error, "test_error")):
        drawn = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
        assert drawn == {"BatchNorm": getattr(norm, field), "BatchRenorm": getattr(renorm, field)}
        assert all(list(line.get_xdata()) == norm.step for line in axes.lines)
    bounds = [list(line.get_ydata()) for line in ratio.lines]
    assert renorm.r_max in bounds
    assert [1 / r_max for r_max in renorm.r_max] in bounds
    assert [median for _, median, _ in renorm.r] in bounds
    bounds = [list(line.get_ydata()) for line in shift.lines]
    assert renorm.d_max in bounds
    assert [-d_max for d_max in renorm.d_max] in bounds
    plt.close(figure)


def test_every_axis_says_what_it_shows_and_in_what_unit() -> None:
    figure = curves_figure(curves(0), curves(1), title="the title", subtitle="the subtitle")
    loss, error, ratio, shift = figure.axes
    assert "nats" in loss.get_ylabel()
    assert error.yaxis.get_major_formatter()(0.05) == "5%"
    assert [axes.get_xlabel() for axes in (loss, error, shift)] == ["step"] * 3
    assert all(axes.get_title(loc="left") for axes in figure.axes) or all(axes.get_title() for axes in figure.axes)
    assert ratio.get_yscale() == error.get_yscale() == "log"
    assert {text.get_text() for text in figure.texts} == {"the title", "the subtitle"}
    plt.close(figure)


def test_an_error_of_zero_does_not_break_the_logarithmic_axis(tmp_path: Path) -> None:
    perfect = curves(0)
    perfect.test_error = [0.5] * 6 + [0.0] * 6
    save_curves(tmp_path / "c.png", perfect, perfect, title="t", subtitle="s")
    figure = curves_figure(perfect, perfect, title="t", subtitle="s")
    low, high = figure.axes[1].get_ylim()
    assert 0 < low < 0.5 < high
    plt.close(figure)


def test_saving_writes_a_png_closes_the_figure_and_restores_the_style(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")
    save_curves(path, curves(0), curves(1), title="t", subtitle="s")
    pixels = image.imread(path)
    assert pixels.shape[:2] == (800, 2000)
    assert pixels[..., :3].std() > 0.05
    assert plt.get_fignums() == []
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("points", [1, 2])
def test_very_short_runs_can_be_drawn(tmp_path: Path, points: int) -> None:
    save_curves(tmp_path / "c.png", curves(0, points), curves(1, points), title="t", subtitle="s")
    assert (tmp_path / "c.png").stat().st_size > 10_000
