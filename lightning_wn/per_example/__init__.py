"""Exact squared gradient norms of single examples: one rule per layer type, in the ordinary backward pass."""

from lightning_wn.per_example.engine.norms import PerExampleNorms
from lightning_wn.per_example.mixing.report import Mixing, MixingReport
from lightning_wn.per_example.mixing.search import find_mixing
from lightning_wn.per_example.rules import convolution, embedding, linear, normalization
from lightning_wn.per_example.rules.errors import PerExampleError, batch_dependent_layers
from lightning_wn.per_example.rules.gradients import Dense, Form, Outer, Rows
from lightning_wn.per_example.rules.registry import Seen, measure_as_one, register_per_example_rule

__all__ = [
    "Dense",
    "Form",
    "Mixing",
    "MixingReport",
    "Outer",
    "PerExampleError",
    "PerExampleNorms",
    "Rows",
    "Seen",
    "batch_dependent_layers",
    "find_mixing",
    "measure_as_one",
    "register_per_example_rule",
]

# importing a file of rules registers them
del convolution, embedding, linear, normalization
