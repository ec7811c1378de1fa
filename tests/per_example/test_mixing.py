"""Every way to mix is found by the tests that are to see it, and nothing is found where examples are apart."""

import pytest
import torch
from helpers.mixing_models import MIXING, SEPARATE

from lightning_wn.per_example.mixing.report import Mixing
from lightning_wn.per_example.mixing.search import find_mixing


def look(make, **options):
    torch.manual_seed(0)
    case = make()
    return find_mixing(case.model, case.loss_fn, case.batch, case.batch_size, **case.options, **options)


SEEN_BY = [(name, test) for name, (_, tests) in MIXING.items() for test in tests]


@pytest.mark.parametrize("name", MIXING)
def test_mixing_is_found(name):
    report = look(MIXING[name][0])
    assert report.outcome is Mixing.MIXES
    assert report.where
    assert report.where in report.why


@pytest.mark.parametrize(("name", "test"), SEEN_BY)
def test_each_test_finds_what_it_is_to_see(name, test):
    report = look(MIXING[name][0], tests=[test])
    assert (report.outcome, report.test) == (Mixing.MIXES, test), report.skipped


@pytest.mark.parametrize("name", SEPARATE)
def test_no_false_alarm(name):
    report = look(SEPARATE[name])
    assert report.outcome is Mixing.SEPARATE, report
