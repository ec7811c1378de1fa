import math
import sys
from itertools import pairwise

import matplotlib as mpl
import pytest
from helpers.made_up_estimates import make_advice, make_estimate

from lightning_wn.reports.history import read_csv_history
from lightning_wn.reports.noise_scale_figure import plot_noise_scale

mpl.use("Agg")


@pytest.fixture(autouse=True)
def _close_figures():
    import matplotlib.pyplot as plt

    yield
    plt.close("all")


def make_history(n=20, prefix="gns"):
    values = [60.0 + step for step in range(n)]
    return {
        "step": [5.0 * step for step in range(n)],
        f"{prefix}/noise_scale": values,
        f"{prefix}/noise_scale_lower": [0.0, *[0.7 * x for x in values[1:]]],
        f"{prefix}/noise_scale_upper": [math.inf, *[1.5 * x for x in values[1:]]],
        f"{prefix}/batch_size": [32.0] * n,
    }


def legend_of(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def marks_of(ax):
    return {line.get_label(): line for line in ax.get_lines() if not line.get_label().startswith("_")}


def test_shows_noise_scale_batch_size_and_both_places_on_the_curve():
    figure = plot_noise_scale(make_history(), make_advice(128.0, 100.0, 150.0))
    left, right = figure.axes
    assert legend_of(left) == ["its interval", "noise scale", "batch size in use"]
    assert left.get_xlabel() == "optimizer step"
    assert "examples" in left.get_ylabel()
    marks = marks_of(right)
    here, suggested = marks["you are here: 32 examples"], marks["suggested: 128 examples"]
    assert (here.get_xdata()[0], here.get_ydata()[0]) == pytest.approx((1.25, 5))
    assert (suggested.get_xdata()[0], suggested.get_ydata()[0]) == pytest.approx((2, 2))


def test_the_interval_of_the_noise_scale_becomes_a_stretch_of_the_curve():
    _, right = plot_noise_scale(make_history(), make_estimate(128.0, 64.0, 320.0)).axes
    (stretch,) = (line for line in right.get_lines() if line.get_linewidth() > 3)
    assert (stretch.get_xdata()[0], stretch.get_ydata()[0]) == pytest.approx((1.1, 11))
    assert (stretch.get_xdata()[-1], stretch.get_ydata()[-1]) == pytest.approx((1.5, 3))


def test_an_estimate_draws_no_suggestion():
    _, right = plot_noise_scale(make_history(), make_estimate(128.0)).axes
    assert not any("sugg" in text for text in legend_of(right))


@pytest.mark.parametrize(
    "advice",
    [
        make_advice(math.inf, 140.0, math.inf),
        make_advice(math.inf, math.inf, math.inf),
        make_advice(100.0, 0.0, math.inf),
        make_advice(0.0, 0.0, 5.0),
        make_advice(33.0),
        make_advice(3.0),
        make_advice(1e6),
        make_advice(math.nan, 0.0, math.inf, batch_size=math.nan, num_measurements=0),
        make_estimate(math.nan, 0.0, math.inf, batch_size=math.nan, num_measurements=0),
    ],
    ids=["infinite", "no-interval", "open-interval", "zero", "keep", "small", "huge", "unmeasured", "no-estimate"],
)
@pytest.mark.filterwarnings("error")
def test_every_kind_of_estimate_can_be_drawn(advice, tmp_path):
    path = tmp_path / "figure.png"
    figure = plot_noise_scale(make_history(), advice)
    figure.savefig(path)
    assert path.stat().st_size > 20_000
    # everything marked lies inside the axes
    right = figure.axes[1]
    for line in marks_of(right).values():
        for x, (low, high) in ((line.get_xdata()[0], right.get_xlim()), (line.get_ydata()[0], right.get_ylim())):
            assert math.isnan(x) or low < x < high


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("value", [80.0, math.inf, math.nan, 0.0])
def test_short_and_useless_histories_can_be_drawn(n, value, tmp_path):
    history = make_history(n)
    history["gns/noise_scale"] = [value] * n
    plot_noise_scale(history, make_advice(80.0)).savefig(tmp_path / "figure.png")


def test_no_labels_overlap():
    figure = plot_noise_scale(make_history(), make_advice(128.0, 100.0, 150.0))
    figure.canvas.draw()
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            boxes = [text.get_window_extent() for text in axis.get_ticklabels() if text.get_text()]
            boxes = [box for box in boxes if ax.bbox.x0 - 60 < box.x0 < ax.bbox.x1 and box.y0 < ax.bbox.y1]
            assert len(boxes) >= 3
            assert not any(a.overlaps(b) for a, b in pairwise(boxes))
    titles = [ax.title.get_window_extent() for ax in figure.axes]
    assert not titles[0].overlaps(titles[1])


def test_the_prefix_is_the_users():
    assert plot_noise_scale(make_history(prefix="big/gns"), make_advice(80.0), prefix="big/gns").axes
    with pytest.raises(ValueError, match=r"lacks \['other/noise_scale'"):
        plot_noise_scale(make_history(), make_advice(80.0), prefix="other")


def test_series_of_different_length_are_refused():
    history = make_history() | {"step": [1.0]}
    with pytest.raises(ValueError, match="differ in length"):
        plot_noise_scale(history, make_advice(80.0))


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning-wn\[plots\]"'):
        plot_noise_scale(make_history(), make_advice(80.0))


def test_the_library_leaves_the_backend_alone(tmp_path):
    backend = mpl.get_backend()
    plot_noise_scale(make_history(), make_advice(80.0))
    assert mpl.get_backend() == backend


def test_reads_back_what_the_csv_logger_wrote(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path)
    logger.log_metrics({"train/loss": 0.5}, step=0)
    logger.log_metrics({"gns/noise_scale": math.inf, "gns/batch_size": 32.0}, step=4)
    logger.log_metrics({"gns/noise_scale": 60.0, "gns/batch_size": 32.0, "gns/coverage": 0.5}, step=9)
    logger.save()
    history = read_csv_history(logger.log_dir)
    assert history["step"] == [4, 9]
    assert history["gns/noise_scale"] == [math.inf, 60]
    assert math.isnan(history["gns/coverage"][0])
    assert "train/loss" not in history
    with pytest.raises(ValueError, match="no key that starts with 'other/'"):
        read_csv_history(logger.log_dir, prefix="other")
    with pytest.raises(FileNotFoundError):
        read_csv_history(tmp_path / "elsewhere")
