import pytest
import torch

from lightning_wn.batch_size.learning_rate import optimizer_family

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
