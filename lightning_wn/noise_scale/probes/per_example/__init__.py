"""Exact per-example squared gradient norms from the ordinary backward pass: one rule per layer type."""

from lightning_wn.noise_scale.probes.per_example import convolution, embedding, linear, normalization
from lightning_wn.noise_scale.probes.per_example.engine import PerExampleNorms
from lightning_wn.noise_scale.probes.per_example.forms import Dense, Form, Outer, Rows
from lightning_wn.noise_scale.probes.per_example.refusals import PerExampleError, batch_dependent_layers
from lightning_wn.noise_scale.probes.per_example.registry import Seen, measure_as_one, register_per_example_rule

__all__ = [
    "Dense",
    "Form",
    "Outer",
    "PerExampleError",
    "PerExampleNorms",
    "Rows",
    "Seen",
    "batch_dependent_layers",
    "measure_as_one",
    "register_per_example_rule",
]

# importing a file of rules registers them
del convolution, embedding, linear, normalization
