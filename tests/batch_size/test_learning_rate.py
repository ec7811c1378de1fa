import math
from typing import get_args

import pytest
import torch

from lightning_wn.batch_size.learning_rate import LEARNING_RATE_RULES, LearningRateRule, optimizer_family

WEIGHTS = [torch.nn.Parameter(torch.ones(2))]


@pytest.mark.parametrize(
    ("name", "rule"),
    [("SGD", "sgd"), ("ASGD", "sgd"), ("LBFGS", None), ("Rprop", None)]
    + [(name, "adam") for name in ("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop")],
)
def test_torchs_own(name, rule):
    assert optimizer_family(getattr(torch.optim, name)(WEIGHTS)) == rule


def test_what_derives_from_one_is_like_it():
    class Nesterov(torch.optim.SGD):
        pass

    assert optimizer_family(Nesterov(WEIGHTS)) == "sgd"


def test_what_keeps_a_second_moment_is_like_adam():
    class Mine(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

    optimizer = Mine(WEIGHTS)
    assert optimizer_family(optimizer) is None
    optimizer.state[WEIGHTS[0]] = {"exp_avg_sq": torch.ones(2)}
    assert optimizer_family(optimizer) == "adam"


def test_learning_rate_rules():
    assert LEARNING_RATE_RULES["sqrt"](16, 64, math.nan) == 2.0
    assert LEARNING_RATE_RULES["linear"](16, 64, math.nan) == 4.0
    assert LEARNING_RATE_RULES["none"](16, 64, math.nan) == 1.0
    # far below the noise scale linear and the root, far above it 1
    assert LEARNING_RATE_RULES["sgd"](16, 64, 1e9) == pytest.approx(4.0)
    assert LEARNING_RATE_RULES["adam"](16, 64, 1e9) == pytest.approx(2.0)
    assert LEARNING_RATE_RULES["sgd"](16, 64, 1e-9) == pytest.approx(1.0)
    assert LEARNING_RATE_RULES["sgd"](16, 64, 64.0) == pytest.approx((1 + 64 / 16) / (1 + 64 / 64))


def test_every_rule_has_a_name_that_users_may_give():
    assert list(LEARNING_RATE_RULES) == list(get_args(LearningRateRule))
