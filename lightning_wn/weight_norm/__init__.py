"""Weight normalization: reparametrize modules as w = g · v / ‖v‖ and fold them back."""

from lightning_wn.weight_norm.apply_and_fold import apply_weight_norm, fold_weight_norm
from lightning_wn.weight_norm.core.cache import cached_weight_norm
from lightning_wn.weight_norm.core.mean_only_batch_norm import MeanOnlyBatchNorm, add_mean_only_batch_norm
from lightning_wn.weight_norm.initialization import DataDependentInitialization
from lightning_wn.weight_norm.parameter_groups import weight_norm_parameter_groups

__all__ = [
    "DataDependentInitialization",
    "MeanOnlyBatchNorm",
    "add_mean_only_batch_norm",
    "apply_weight_norm",
    "cached_weight_norm",
    "fold_weight_norm",
    "weight_norm_parameter_groups",
]
