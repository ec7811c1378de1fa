"""Handing a figure to the loggers that take one, each in its own words."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lightning_wn.noise_scale.drawing import import_pyplot

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def log_figure_to(loggers: Sequence[Logger], name: str, figure: Figure, *, step: int) -> list[Logger]:
    """Log a figure to TensorBoard, W&B and MLflow, where it is a file of this name; close it, and return who took it.

    Loggers of other kinds take no figure and are passed over.
    """
    took: list[Logger] = []
    for logger in loggers:
        experiment: Any = logger.experiment if isinstance(logger, TensorBoardLogger | MLFlowLogger) else None
        if isinstance(logger, TensorBoardLogger):
            experiment.add_figure(name, figure, global_step=step, close=False)
        elif isinstance(logger, WandbLogger):
            logger.log_image(key=name, images=[_as_image(figure)], step=step)
        elif isinstance(logger, MLFlowLogger):
            experiment.log_figure(logger.run_id, figure, f"{name}.png")
        else:
            continue
        took.append(logger)
    import_pyplot().close(figure)
    return took


def add_margin_chart(loggers: Sequence[Logger], prefixes: Sequence[str]) -> None:
    """Give TensorBoard's tab of custom scalars a chart of each noise scale with its interval as a margin.

    TensorBoard keeps one layout a run: one of the user's own, written before or after, shares the tab with this one or
    replaces it, as TensorBoard decides.
    """
    layout = {
        prefix: {
            "noise scale and its interval": [
                "Margin",
                [f"{prefix}/noise_scale", f"{prefix}/noise_scale_lower", f"{prefix}/noise_scale_upper"],
            ],
            "noise scale and batch size": ["Multiline", [f"{prefix}/noise_scale$", f"{prefix}/batch_size$"]],
        }
        for prefix in prefixes
    }
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            experiment: Any = logger.experiment
            experiment.add_custom_scalars(layout)


def _as_image(figure: Figure) -> Any:
    """Return the figure as a picture of the kind that W&B takes."""
    from PIL import Image  # noqa: PLC0415 - comes with matplotlib

    data = BytesIO()
    figure.savefig(data, format="png", dpi=100)
    return Image.open(data)
