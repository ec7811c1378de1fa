"""Figures, histories read back from loggers, and the HTML page.

matplotlib is imported when something is drawn.
"""

from lightning_wn.reports.history import read_csv_history, read_history
from lightning_wn.reports.noise_scale_figure import plot_noise_scale
from lightning_wn.reports.page import write_report
from lightning_wn.reports.run_figure import plot_run

__all__ = ["plot_noise_scale", "plot_run", "read_csv_history", "read_history", "write_report"]
