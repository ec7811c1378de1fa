"""The metric on its own: equations in, statistics out, states that synchronise, reset, save and restore."""

from __future__ import annotations

import math

import matplotlib as mpl
import pytest
import torch
from helpers.frozen_digits import textbook_pair

from lightning_wn import GradientNoiseScale
from lightning_wn.noise_scale.samples import NUM_CHECKSUMS, GradientSamples, Rejection, measurement_from_row

mpl.use("Agg")


def norms(samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return samples.square().sum(1), samples.mean(0).square().sum()


def random_steps(count: int, sizes=(4, 4, 3), seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(len(sizes), 25, generator=generator, dtype=torch.float64) + 0.5 for _ in range(count)]


def test_mean_of_exact_pairs():
    sizes = (4, 4, 3)
    metric = GradientNoiseScale(ema_decay=1.0)
    pairs = []
    for samples in random_steps(6, sizes):
        small, big = norms(samples)
        metric.update(small, sizes, big)
        pairs.append(textbook_pair(samples, sizes))
    expected = torch.tensor(pairs, dtype=torch.float64).mean(0)
    result = metric.compute()
    assert float(result["grad_sq_norm"]) == pytest.approx(float(expected[0]), rel=1e-10)
    assert float(result["cov_trace"]) == pytest.approx(float(expected[1]), rel=1e-10)
    assert float(result["noise_scale"]) == pytest.approx(float(expected[1] / expected[0]), rel=1e-10)
    assert float(result["batch_size"]) == 11


def test_weights_are_those_of_the_mean():
    weights = [1.0, 2.0, 0.5]
    sizes = [4, 8, 2]
    generator = torch.Generator().manual_seed(0)
    mean = torch.full((40,), 0.4, dtype=torch.float64)
    metric = GradientNoiseScale(ema_decay=1.0)
    for _ in range(4000):
        noise = torch.randn(3, 40, generator=generator, dtype=torch.float64)
        samples = mean + noise / torch.tensor(sizes).sqrt()[:, None]
        big = (samples * torch.tensor(weights)[:, None]).sum(0) / sum(weights)
        metric.update(samples.square().sum(1), sizes, big.square().sum(), weights)
    result = metric.compute()
    errors = metric.moments[0].tolist()
    count = errors[0]
    assert abs(float(result["grad_sq_norm"]) - 6.4) < 3 * (errors[4] / count / count) ** 0.5
    assert abs(float(result["cov_trace"]) - 40) < 3 * (errors[6] / count / count) ** 0.5


def test_single_sample_counts_nowhere():
    metric = GradientNoiseScale()
    metric.update(torch.ones(1), [32], torch.ones(()))
    result = metric.compute()
    assert math.isnan(float(result["noise_scale"]))
    assert metric.rejected[Rejection.SINGLE_SAMPLE] == 1
    for samples in random_steps(3):
        small, big = norms(samples)
        metric.update(small, [4, 4, 3], big)
    assert math.isfinite(float(metric.compute()["cov_trace"]))
    assert metric.estimate().num_measurements == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_step_changes_nothing(bad):
    metric, clean = GradientNoiseScale(), GradientNoiseScale()
    for i, samples in enumerate(random_steps(4)):
        small, big = norms(samples)
        clean.update(small, [4, 4, 3], big)
        metric.update(small, [4, 4, 3], big)
        if i == 1:
            small[0] = bad
            metric.update(small, [4, 4, 3], big)
    assert metric.compute() == clean.compute()
    assert metric.rejected[Rejection.NON_FINITE] == 1


def test_checksums():
    samples = random_steps(1)[0]
    small, big = norms(samples)
    checks = torch.randn(3, NUM_CHECKSUMS, dtype=torch.float64)

    def outcome(grad_checks: torch.Tensor):
        row = GradientSamples(
            sq_norms=small,
            sizes=[4, 4, 3],
            weights=[0.5, 0.5, 0.5],
            grad_sq_norm=big,
            checksums=checks,
            grad_checksums=grad_checks,
        ).to_row()
        return measurement_from_row(row.tolist(), 0.01)

    assert outcome(checks.mean(0)).examples == 11
    for i in range(NUM_CHECKSUMS):
        wrong = checks.mean(0).clone()
        wrong[i] += 0.05
        assert outcome(wrong) is Rejection.MISMATCH


@pytest.mark.parametrize("full", [(True, True), (True, False), (False, False)])
def test_what_the_ranks_tell_of_the_batch_size_in_use(full):
    """Rank 0 had two samples of 4, rank 1 one of 3; one short window makes the step a short one."""
    samples = random_steps(1)[0]
    small, big = norms(samples)
    rows = [
        GradientSamples(
            sq_norms=small[own], sizes=[4, 4, 3][own], weights=[1.0] * len(small[own]), grad_sq_norm=big, full=rank_full
        ).to_row()
        for own, rank_full in zip((slice(0, 2), slice(2, 3)), full, strict=True)
    ]
    measured = measurement_from_row(sum(rows).tolist(), 0.01)
    assert (measured.examples, measured.micro_batches, measured.ranks, measured.full) == (11, 3, 2, all(full))


def test_sizes_may_be_a_tensor():
    numbers, tensors = GradientNoiseScale(), GradientNoiseScale()
    for samples in random_steps(3):
        small, big = norms(samples)
        numbers.update(small, [4, 4, 3], big)
        tensors.update(small, torch.tensor([4, 4, 3]), big)
    assert numbers.compute() == tensors.compute()


def test_state_dict_restores_exactly():
    whole, first, second = GradientNoiseScale(), GradientNoiseScale(), GradientNoiseScale()
    steps = random_steps(8)
    for i, samples in enumerate(steps):
        small, big = norms(samples)
        whole.update(small, [4, 4, 3], big)
        (first if i < 4 else second).update(small, [4, 4, 3], big)
        if i == 3:
            first.synchronize()
            second.load_state_dict(first.state_dict())
    assert second.compute() == whole.compute()


def test_reset():
    metric = GradientNoiseScale()
    for samples in random_steps(3):
        metric.update(*norms(samples)[:1], [4, 4, 3], norms(samples)[1])
    metric.compute()
    metric.reset()
    assert math.isnan(float(metric.compute()["noise_scale"]))
    assert metric.estimate().num_measurements == 0


def test_ranks_add_up_through_torchmetrics_own_synchronisation():
    """Two metrics, each with half of the samples, gathered as torchmetrics gathers ranks."""
    whole = GradientNoiseScale()
    halves = [GradientNoiseScale(distributed_available_fn=lambda: True) for _ in range(2)]
    for samples in random_steps(5, sizes=(4, 4, 4, 3)):
        small, big = norms(samples)
        whole.update(small, [4, 4, 4, 3], big)
        halves[0].update(small[:2], [4, 4], big)
        halves[1].update(small[2:], [4, 3], big)
    states = {id(getattr(halves[0], name)): [getattr(h, name) for h in halves] for name in halves[0]._reductions}
    halves[0].dist_sync_fn = lambda state, group: states[id(state)]
    result, expected = halves[0].compute(), whole.compute()
    for key, value in expected.items():
        torch.testing.assert_close(result[key], value, rtol=1e-12, atol=0)
    # what was local before is local again
    assert len(halves[0].pending) == 5
    assert float(halves[0].counts[0]) == 0


def test_one_rank_alone_refuses_to_compute(monkeypatch):
    metric = GradientNoiseScale(sync_on_compute=False)
    metric.update(torch.ones(2), [4, 4], torch.ones(()))
    monkeypatch.setattr("lightning_wn.noise_scale.metric._world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="one rank's gradient samples"):
        metric.compute()


def test_forward_leaves_the_running_state_right():
    forward, update = GradientNoiseScale(ema_decay=1.0), GradientNoiseScale(ema_decay=1.0)
    for samples in random_steps(4):
        small, big = norms(samples)
        value = forward(small, [4, 4, 3], big)
        update.update(small, [4, 4, 3], big)
        pair = textbook_pair(samples, (4, 4, 3))
        assert float(value["cov_trace"]) == pytest.approx(pair[1])
    assert forward.compute() == update.compute()


@pytest.mark.parametrize("decay", [-0.1, 1.1, math.nan])
def test_decay_out_of_range(decay):
    with pytest.raises(ValueError, match=r"`ema_decay` must lie in \[0, 1\], got"):
        GradientNoiseScale(ema_decay=decay)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95, math.nan])
def test_confidence_out_of_range(confidence):
    with pytest.raises(ValueError, match="`confidence` must lie between 0 and 1"):
        GradientNoiseScale(confidence=confidence)


def test_uneven_arguments():
    with pytest.raises(ValueError, match="one entry a sample, got 2, 3 and 2"):
        GradientNoiseScale().update(torch.ones(2), [1, 2, 3], torch.ones(()))


def test_plot():
    metric = GradientNoiseScale(ema_decay=1.0)
    results = []
    for samples in random_steps(6):
        small, big = norms(samples)
        metric.update(small, [4, 4, 3], big)
        results.append(metric.compute())
    _, ax = metric.plot(results)
    line = next(line for line in ax.get_lines() if line.get_label() == "noise scale")
    drawn = [float(y) for y in line.get_ydata()]
    expected = [float(result["noise_scale"]) for result in results]
    assert [y for y in drawn if not math.isnan(y)] == [y for y in expected if math.isfinite(y)]
    assert ax.get_yscale() == "log"
    assert metric.plot()[1] is not ax
    assert metric.plot(ax=ax)[1] is ax
    mpl.pyplot.close("all")


def test_a_checksum_that_cancels_is_not_taken_for_a_mismatch():
    """Rounding to 16 bits is in proportion to the terms of a checksum, not to what is left of them."""
    terms = torch.tensor([1.0, -0.999, 0.5, -0.5015], dtype=torch.float64)
    rounded = terms.bfloat16().double()
    size = float(terms.norm())

    def outcome(grad_check: float):
        row = GradientSamples(
            sq_norms=torch.ones(2, dtype=torch.float64),
            sizes=[4, 4],
            weights=[1.0, 1.0],
            grad_sq_norm=torch.tensor(0.8),
            checksums=torch.full((2, NUM_CHECKSUMS), float(terms.sum())),
            checksum_sizes=torch.full((2, NUM_CHECKSUMS), size),
            grad_checksums=torch.full((NUM_CHECKSUMS,), grad_check),
        ).to_row()
        return measurement_from_row(row.tolist(), 0.05)

    assert abs(float(rounded.sum() - terms.sum())) > 0.5 * abs(float(terms.sum()))
    assert outcome(float(rounded.sum())).examples == 8
    assert outcome(float(terms.sum()) + 0.1 * size) is Rejection.MISMATCH
