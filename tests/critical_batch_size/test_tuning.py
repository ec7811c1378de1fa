"""The walk over learning rates finds the best one wherever it lies."""

from __future__ import annotations

import math

import pytest

from lightning_wn.critical_batch_size.tuning import tune


def attempts(cost):
    tried = []

    def attempt(exponent, best):
        tried.append(exponent)
        return cost(exponent), exponent

    return attempt, tried


@pytest.mark.parametrize("best", range(-6, 7))
def test_finds_the_valley(best):
    attempt, tried = attempts(lambda exponent: 1.0 + abs(exponent - best))
    found = tune(attempt, 0)
    assert (found.exponent, found.outcome, found.at_edge) == (best, best, False)
    assert len(tried) == len(set(tried)) <= abs(best) + 3


@pytest.mark.parametrize("best", [-4, -2, 2])
def test_looks_around_where_nothing_works(best):
    attempt, _ = attempts(lambda exponent: abs(exponent - best) if abs(exponent - best) <= 1 else math.inf)
    assert tune(attempt, 0).exponent == best


def test_gives_up():
    attempt, tried = attempts(lambda exponent: math.inf)
    found = tune(attempt, 0)
    assert found.at_edge
    assert len(tried) == 7


def test_says_when_it_fell_off_the_edge():
    attempt, tried = attempts(lambda exponent: -exponent)
    found = tune(attempt, 0)
    assert found.at_edge
    assert found.exponent == max(tried) == 8


def test_fixed():
    attempt, tried = attempts(lambda exponent: -exponent)
    assert tune(attempt, 3, fixed=True).exponent == 3
    assert tried == [3]


def test_the_best_so_far_is_told():
    told = []

    def attempt(exponent, best):
        told.append(best)
        return {0: 5.0, 1: 4.0, 2: 6.0}.get(exponent, 9.0), exponent

    tune(attempt, 0)
    assert told == [math.inf, 5.0, 4.0]
