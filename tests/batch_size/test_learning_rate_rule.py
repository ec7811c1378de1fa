import pytest
import torch

from lightning_wn.batch_size.learning_rate_rule import learning_rate_rule

WEIGHTS = [torch.nn.Parameter(torch.ones(2))]


@pytest.mark.parametrize(
    ("name", "rule"),
    [("SGD", "sgd"), ("ASGD", "sgd"), ("LBFGS", None), ("Rprop", None)]
    + [(name, "adam") for name in ("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop")],
)
def test_torchs_own(name, rule):
    assert learning_rate_rule(getattr(torch.optim, name)(WEIGHTS)) == rule


def test_what_derives_from_one_is_like_it():
    class Nesterov(torch.optim.SGD):
        pass

    assert learning_rate_rule(Nesterov(WEIGHTS)) == "sgd"


def test_what_keeps_a_second_moment_is_like_adam():
    class Mine(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

    optimizer = Mine(WEIGHTS)
    assert learning_rate_rule(optimizer) is None
    optimizer.state[WEIGHTS[0]] = {"exp_avg_sq": torch.ones(2)}
    assert learning_rate_rule(optimizer) == "adam"
