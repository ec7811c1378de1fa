"""PyTorch Lightning callbacks: the gradient noise scale while you train, and weight normalization.

Public is what ``__all__`` names here and in these packages; the rest may change at any time.

- ``lightning_wn.batch_size``: advice on the batch size from any estimate
- ``lightning_wn.critical_batch_size``: the critical batch size measured, and its files read again
- ``lightning_wn.reports``: figures, logs read back, the HTML page
- ``lightning_wn.probes``: the probes by hand, without a Trainer
- ``lightning_wn.per_example``: per-example gradient norms, and rules for layers of your own
- ``lightning_wn.weight_norm``: weight normalization without the callback
"""

from lightning_wn.batch_size.advice import BatchSizeAdvice
from lightning_wn.callbacks.adaptive_batch_size.callback import AdaptiveBatchSizeCallback
from lightning_wn.callbacks.noise_scale.callback import GradientNoiseScaleCallback
from lightning_wn.callbacks.weight_norm.callback import WeightNormCallback
from lightning_wn.critical_batch_size.measure import measure_critical_batch_size
from lightning_wn.critical_batch_size.result import CriticalBatchSizeMeasurement
from lightning_wn.noise_scale.estimate import NoiseScaleEstimate
from lightning_wn.noise_scale.metric import GradientNoiseScale
from lightning_wn.probes.measure import measure_noise_scale
from lightning_wn.weight_norm import apply_weight_norm, cached_weight_norm, fold_weight_norm

__version__ = "0.1.0"

__all__ = [
    "AdaptiveBatchSizeCallback",
    "BatchSizeAdvice",
    "CriticalBatchSizeMeasurement",
    "GradientNoiseScale",
    "GradientNoiseScaleCallback",
    "NoiseScaleEstimate",
    "WeightNormCallback",
    "apply_weight_norm",
    "cached_weight_norm",
    "fold_weight_norm",
    "measure_critical_batch_size",
    "measure_noise_scale",
]
