"""Groups for optimizers: g and v without weight decay, all else with it."""

import pytest
from torch import nn

from lightning_wn.weight_norm import apply_weight_norm, weight_norm_parameter_groups


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        ({}, [(3, 0.1), (2, 0.0)]),
        ({"decay_g": True}, [(4, 0.1), (1, 0.0)]),
        ({"decay_v": True}, [(4, 0.1), (1, 0.0)]),
        ({"decay_g": True, "decay_v": True}, [(5, 0.1)]),
    ],
)
def test_groups_hold_every_trainable_parameter_once(arguments, sizes):
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 3, bias=False).requires_grad_(False))
    apply_weight_norm(model, "0")
    groups = weight_norm_parameter_groups(model, 0.1, **arguments)
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == sizes
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    if not arguments:
        assert {id(p) for p in groups[1]["params"]} == {id(p) for p in model[0].parametrizations.parameters()}


def test_a_negative_decay_is_refused():
    with pytest.raises(ValueError, match="`weight_decay` must be a number of at least 0, got -1"):
        weight_norm_parameter_groups(nn.Linear(2, 2), -1)
