"""The critical batch size measured directly: branches of training at several batch sizes.

What is left on disk can be read again as a :class:`Branch`, and concluded from at other target losses.
"""

from lightning_wn.critical_batch_size.analysis import TradeoffFit, fit_tradeoff, mean_noise_scale
from lightning_wn.critical_batch_size.branch import Branch, BranchPlan
from lightning_wn.critical_batch_size.measure import measure_critical_batch_size
from lightning_wn.critical_batch_size.result import CriticalBatchSizeMeasurement, MeasuredBatchSize

__all__ = [
    "Branch",
    "BranchPlan",
    "CriticalBatchSizeMeasurement",
    "MeasuredBatchSize",
    "TradeoffFit",
    "fit_tradeoff",
    "mean_noise_scale",
    "measure_critical_batch_size",
]
