"""Weight normalization: reparametrize modules as w = g · v / ‖v‖ and fold them back."""

from lightning_wn.weight_norm.cache import cached_weight_norm
from lightning_wn.weight_norm.callback import WeightNormCallback
from lightning_wn.weight_norm.initialization import DataDependentInitialization
from lightning_wn.weight_norm.mean_only_batch_norm import MeanOnlyBatchNorm, add_mean_only_batch_norm
from lightning_wn.weight_norm.parameter_groups import weight_norm_parameter_groups
from lightning_wn.weight_norm.reparametrization import apply_weight_norm, fold_weight_norm

__all__ = [
    "DataDependentInitialization",
    "MeanOnlyBatchNorm",
    "WeightNormCallback",
    "add_mean_only_batch_norm",
    "apply_weight_norm",
    "cached_weight_norm",
    "fold_weight_norm",
    "weight_norm_parameter_groups",
]
