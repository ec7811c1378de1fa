"""Units that are parts of an example: simulated gradients through the metric, against brute force over all samples."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lightning_wn import GradientNoiseScale
from lightning_wn.noise_scale.parts import PartMeasurement, PartMoments
from lightning_wn.noise_scale.samples import GradientSamples, Rescaled, measurement_from_row

DIMENSION = 60


def population(
    cv: float, share: float, *, depends: float = 0.0, of_parts: float = 30.0, count: int = 4000, seed: int = 0
):
    """Sizes n, lognormal with this coefficient of variation, and mean gradients of the samples, with |G|² near 1.

    A sample's gradient is G, a topic that its parts share, and what parts have alone, of variance 1/n; with ``depends``
    also a direction that long samples have, partly along G.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    spread = math.sqrt(math.log(1.0 + cv * cv))
    z = normal(count)
    sizes = (z * spread + math.log(40.0) - spread * spread / 2).exp().round().clamp(min=1.0)
    mean = torch.full((DIMENSION,), 1.0 / math.sqrt(DIMENSION), dtype=torch.float64)
    noise = 4.0 * math.sqrt(share / DIMENSION) * normal(count, DIMENSION)
    noise += of_parts * math.sqrt((1.0 - share) / DIMENSION) * normal(count, DIMENSION) / sizes.sqrt()[:, None]
    long = depends * z.tanh()[:, None] * (0.8 * mean + 0.6 * normal(DIMENSION) / math.sqrt(DIMENSION))
    return sizes, mean + noise + long


def draw(sizes: Tensor, gradients: Tensor, samples: int, steps: int, *, by_sizes: bool, seed: int = 1):
    """Steps of independent samples: their sizes, raw weights, mean gradients, and the optimizer's gradient."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(sizes), (steps, samples), generator=generator)
    n, g = sizes[drawn], gradients[drawn]
    raw = n if by_sizes else torch.ones_like(n)
    return n, raw, g, ((raw / raw.sum(1, keepdim=True))[..., None] * g).sum(1)


def truth(sizes: Tensor, gradients: Tensor, samples: int, *, by_sizes: bool) -> tuple[float, float]:
    """|G|² and n V by brute force; G is the mean over all parts, or over all samples where they weigh alike."""
    weights = sizes if by_sizes else torch.ones_like(sizes)
    mean = (weights[:, None] * gradients).sum(0) / weights.sum()
    if not by_sizes:
        variance = float((gradients - mean).square().sum(1).mean()) / samples
        return float(mean @ mean), samples * float(sizes.mean()) * variance
    n, _, _, optimizers = draw(sizes, gradients, samples, 60_000 if samples < 32 else 15_000, by_sizes=True, seed=7)
    return float(mean @ mean), float(n.sum(1).mean() * (optimizers - mean).square().sum(1).mean())


def measure(n: Tensor, raw: Tensor, g: Tensor, optimizers: Tensor, decay: float = 1.0) -> GradientNoiseScale:
    metric = GradientNoiseScale(unit="tokens", ema_decay=decay)
    for step in zip(g.square().sum(2), n, optimizers.square().sum(1), raw, strict=True):
        metric.update(*step)
    metric.synchronize()
    return metric


def errors_of(metric: GradientNoiseScale) -> tuple[float, float]:
    var_x, _, var_y = PartMoments.from_list(metric.moments[0].tolist()).covariance_of_means()
    return math.sqrt(var_x), math.sqrt(var_y)


@pytest.mark.parametrize("by_sizes", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0])
def test_any_lengths_and_any_shared_share(cv, share, by_sizes):
    """Gradients that do not depend on lengths: three standard errors, and 5 % of what 2,000 steps can tell."""
    sizes, gradients = population(cv, share)
    expected = truth(sizes, gradients, 16, by_sizes=by_sizes)
    metric = measure(*draw(sizes, gradients, 16, 2000, by_sizes=by_sizes))
    estimate, errors = metric.estimate(), errors_of(metric)
    found = (estimate.grad_sq_norm, estimate.cov_trace)
    for value, true, error, limit in zip(found, expected, errors, (0.025, 0.012), strict=True):
        assert error < limit * true
        # a finite population of random gradients depends on lengths a little, too
        assert abs(value - true) < 3 * error + 0.01 * true
        assert abs(value / true - 1.0) < 0.05
    assert estimate.noise_scale == pytest.approx(estimate.cov_trace / estimate.grad_sq_norm)
    assert estimate.lower < expected[1] / expected[0] < estimate.upper
    assert estimate.batch_size == pytest.approx(16 * float(sizes.mean()), rel=0.03)


@pytest.mark.parametrize(
    ("samples", "share", "limit"), [(4, 0.0, 0.2), (16, 0.0, 0.06), (64, 0.0, 0.03), (16, 1.0, 0.02)]
)
def test_lengths_that_tell_of_the_gradient(samples, share, limit):
    """Long samples of another kind: |G|² has no bias, n V the rest that docs/statistics.md has."""
    sizes, gradients = population(1.0, share, depends=1.0, of_parts=5.0)
    expected = truth(sizes, gradients, samples, by_sizes=True)
    metric = measure(*draw(sizes, gradients, samples, 3000 if samples < 64 else 1000, by_sizes=True))
    estimate, errors = metric.estimate(), errors_of(metric)
    assert errors[0] < 0.02 * expected[0]
    assert errors[1] < 0.07 * expected[1]
    assert abs(estimate.grad_sq_norm - expected[0]) < 3 * errors[0]
    assert abs(estimate.cov_trace - expected[1]) < limit * expected[1] + 3 * errors[1]


def test_lengths_that_tell_of_the_gradient_under_equal_weights():
    """The optimizer then follows the mean over samples, without a bias."""
    sizes, gradients = population(1.0, 0.0, depends=1.0, of_parts=5.0)
    expected = truth(sizes, gradients, 4, by_sizes=False)
    metric = measure(*draw(sizes, gradients, 4, 3000, by_sizes=False))
    estimate, errors = metric.estimate(), errors_of(metric)
    assert abs(estimate.grad_sq_norm - expected[0]) < 3 * errors[0] < 0.06 * expected[0]
    assert abs(estimate.cov_trace - expected[1]) < 3 * errors[1] < 0.06 * expected[1]


def test_groups():
    """Each set of parameters is as if it were measured alone."""
    generator = torch.Generator().manual_seed(3)
    both = GradientNoiseScale(unit="nodes", groups=["head", "tail"])
    alone = [GradientNoiseScale(unit="nodes") for _ in range(3)]
    for _ in range(4):
        g = torch.randn(5, 9, generator=generator, dtype=torch.float64)
        n = torch.randint(1, 9, (5,), generator=generator).double()
        mean = (n[:, None] * g).sum(0) / n.sum()
        parts = [slice(None), slice(0, 2), slice(2, 9)]
        squares = [(g[:, part].square().sum(1), mean[part].square().sum()) for part in parts]
        both.update(torch.stack([a for a, _ in squares], 1), n, torch.stack([b for _, b in squares]), n)
        for metric, (small, big) in zip(alone, squares, strict=True):
            metric.update(small, n, big, n)
    for group, metric in zip((None, "head", "tail"), alone, strict=True):
        found, expected = both.estimate(group), metric.estimate()
        assert (found.grad_sq_norm, found.cov_trace) == pytest.approx((expected.grad_sq_norm, expected.cov_trace))


def test_one_step_by_the_loop_over_pairs():
    generator = torch.Generator().manual_seed(3)
    g = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    n = torch.tensor([3.0, 1.0, 8.0, 2.0, 5.0], dtype=torch.float64)
    weights = torch.tensor([0.5, 0.1, 1.0, 0.2, 0.4], dtype=torch.float64)
    w = weights / weights.sum()
    pairs = sum(float(w[j] * w[k] * (g[j] @ g[k])) for j in range(5) for k in range(5) if j != k)
    share = sum(float(w[j] * w[k]) for j in range(5) for k in range(5) if j != k)
    mean = (w[:, None] * g).sum(0)
    variance = float(mean @ mean) - pairs / share
    metric = GradientNoiseScale(unit="tokens")
    metric.update(g.square().sum(1), n, mean @ mean, weights)
    estimate = metric.estimate()
    assert estimate.grad_sq_norm == pytest.approx(pairs / share, rel=1e-12)
    # of one step: c (D - p |G|²) is zero
    assert estimate.cov_trace == pytest.approx(19.0 * variance, rel=1e-12)
    assert (estimate.batch_size, estimate.num_measurements) == (19.0, 1)


def test_equal_sizes_and_weights_are_the_two_equations():
    generator = torch.Generator().manual_seed(4)
    parts, examples = GradientNoiseScale(unit="frames", ema_decay=0.9), GradientNoiseScale(ema_decay=0.9)
    for _ in range(40):
        g = torch.randn(4, 9, generator=generator, dtype=torch.float64) + 0.3
        for metric in (parts, examples):
            metric.update(g.square().sum(1), [8, 8, 8, 8], g.mean(0).square().sum())
    found, expected = parts.estimate(), examples.estimate()
    for name in ("grad_sq_norm", "cov_trace", "noise_scale", "lower", "upper", "batch_size"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-9)


def test_samples_that_count_nothing_change_nothing():
    generator = torch.Generator().manual_seed(5)
    masked, without = GradientNoiseScale(unit="tokens"), GradientNoiseScale(unit="tokens")
    for _ in range(5):
        g = torch.randn(4, 9, generator=generator, dtype=torch.float64)
        n = torch.tensor([3.0, 4.0, 2.0, 1.0])
        mean = (n[:3, None] * g[:3]).sum(0) / 9.0
        weights = [3.0, 4.0, 2.0, 0.0]
        rows = [g.square().sum(1) * torch.tensor([1.0, 1.0, 1.0, 0.0]), g[:3].square().sum(1)]
        masked.add_samples(
            GradientSamples(
                sq_norms=rows[0], sizes=n, weights=weights, grad_sq_norm=mean @ mean, examples=9.0, micro_batches=1
            )
        )
        without.add_samples(
            GradientSamples(
                sq_norms=rows[1], sizes=n[:3], weights=weights[:3], grad_sq_norm=mean @ mean, micro_batches=1
            )
        )
    assert str(masked.estimate()) == str(without.estimate())
    assert masked.estimate().cov_trace == pytest.approx(without.estimate().cov_trace, rel=1e-12)


@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_moments_against_direct_sums(decay):
    torch.manual_seed(0)
    sizes, gradients = population(1.0, 0.5, count=50)
    n, raw, g, optimizers = draw(sizes, gradients, 6, 30, by_sizes=True)
    metric = measure(n, raw, g, optimizers, decay)
    weights = torch.tensor([decay ** (29 - i) for i in range(30)], dtype=torch.float64)
    w = raw / raw.sum(1, keepdim=True)
    own, squared = (w.square() * g.square().sum(2)).sum(1), w.square().sum(1)
    pairs, count = optimizers.square().sum(1) - own, n.sum(1)

    def both(weights: Tensor) -> Tensor:
        mean = lambda values: (weights * values).sum() / weights.sum()  # noqa: E731
        x = mean(count**2 * pairs) / mean(count**2 * (1 - squared))
        c = 0.5 - squared
        variance = mean(own + c * pairs) - x * mean(squared + c * (1 - squared))
        return torch.stack((x, mean(count) * variance))

    moments = PartMoments.from_list(metric.moments[0].tolist())
    assert moments.pair() == pytest.approx(tuple(both(weights).tolist()), rel=1e-9)
    # the delta method by autograd: d pair / d weight_i are the deviations that a step brings
    slopes = torch.autograd.functional.jacobian(both, weights)
    influence = slopes * weights.sum()
    mean_influence = (influence * weights).sum(1, keepdim=True) / weights.sum()
    assert mean_influence.abs().max() < 1e-9 * influence.abs().max()
    freedom = weights.sum() - weights.square().sum() / weights.sum()
    effective = weights.sum() ** 2 / weights.square().sum()
    expected = (influence * weights) @ influence.T / (freedom * effective)
    found = moments.covariance_of_means()
    assert found == pytest.approx(tuple(expected.flatten()[[0, 1, 3]].tolist()), rel=1e-8)
    assert PartMoments.from_list(moments.to_list()) == moments


@pytest.mark.parametrize("by_sizes", [False, True])
def test_the_interval_covers(by_sizes):
    """95 % of 300 runs with 60 steps each; the standard error of a coverage of 95 % is 1.3 %."""
    sizes, gradients = population(1.0, 0.5)
    expected = truth(sizes, gradients, 16, by_sizes=by_sizes)
    n, raw, g, optimizers = draw(sizes, gradients, 16, 300 * 60, by_sizes=by_sizes)
    sums = {
        "grad_sq_norm": optimizers.square().sum(1),
        "own_sq_norm": ((raw / raw.sum(1, keepdim=True)).square() * g.square().sum(2)).sum(1),
        "squared_weights": (raw / raw.sum(1, keepdim=True)).square().sum(1),
        "count": n.sum(1),
    }
    steps = [
        PartMeasurement(**dict(zip(sums, values, strict=True)), micro_batches=1.0, follows_sizes=by_sizes)
        for values in zip(*(column.tolist() for column in sums.values()), strict=True)
    ]
    covered = 0
    for start, end in pairwise(range(0, len(steps) + 1, 60)):
        moments = PartMoments()
        for step in steps[start:end]:
            moments = moments.updated(step, 1.0)
        lower, upper = moments.interval(0.95)
        covered += lower <= expected[1] / expected[0] <= upper
    assert 0.91 <= covered / 300 <= 0.99


def test_a_batch_that_grows_in_mid_average():
    """Four times the micro-batches: V falls to a quarter, n rises, and n V stays."""
    sizes, gradients = population(0.5, 0.5)
    expected = truth(sizes, gradients, 4, by_sizes=False)
    metric = GradientNoiseScale(unit="tokens", ema_decay=1.0)
    for samples in (4, 16):
        n, raw, g, optimizers = draw(sizes, gradients, samples, 1500, by_sizes=False)
        for step in zip(g.square().sum(2), n, optimizers.square().sum(1), raw, strict=True):
            metric.update(*step)
    estimate = metric.estimate()
    assert estimate.cov_trace == pytest.approx(expected[1], rel=0.05)
    assert estimate.batch_size == pytest.approx(16 * float(sizes.mean()), rel=0.03)


def test_batch_size_is_that_of_full_steps():
    metric = GradientNoiseScale(unit="tokens", ema_decay=1.0)
    for sizes, full in (([4.0, 8.0], True), ([10.0, 2.0, 6.0], True), ([1.0, 1.0], False)):
        metric.add_samples(
            GradientSamples(
                sq_norms=torch.ones(len(sizes)) + torch.arange(len(sizes)),
                sizes=sizes,
                weights=[1.0] * len(sizes),
                grad_sq_norm=torch.tensor(1.0),
                micro_batches=1,
                full=full,
            )
        )
    assert metric.estimate().batch_size == (12 + 18) / 2


def ranks_rows(loss: str, n: Tensor, g: Tensor) -> tuple[list[Tensor], Tensor]:
    """Rows of two ranks that each saw half of the samples, and ḡ, as DDP leaves them under a loss of this kind."""
    total, ranks = float(n.sum()), 2
    factor = ranks / total if loss == "window" else 1.0
    seen = n[:, None] * g * factor
    averaged = seen.sum(0) / ranks
    checks = torch.randn(g.shape[1], 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rows = []
    for own in (slice(0, 2), slice(2, 5)):
        count = len(n[own])
        samples = GradientSamples(
            sq_norms=seen[own].square().sum(1),
            sizes=n[own],
            weights=[1.0] * count,
            grad_sq_norm=averaged.square().sum() / count**2,
            checksums=seen[own] @ checks,
            grad_checksums=averaged @ checks / count,
        )
        rows.append(samples.weighted_by_sizes(Rescaled.SAMPLES if loss == "window" else Rescaled.MEAN).to_row())
    return rows, (n[:, None] * g).sum(0) / total


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("loss", ["window", "sum"])
def test_ranks_under_losses_that_are_no_means(loss, parts):
    """The same as means with the weights told; the checksums agree, and find what is not so."""
    generator = torch.Generator().manual_seed(6)
    g = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    n = torch.tensor([3.0, 1.0, 8.0, 2.0, 5.0], dtype=torch.float64)
    rows, mean = ranks_rows(loss, n, g)
    plain = GradientSamples(sq_norms=g.square().sum(1), sizes=n, weights=n, grad_sq_norm=mean @ mean).to_row()
    found = measurement_from_row(sum(rows).tolist(), 1e-9, parts=parts)
    expected = measurement_from_row(plain.tolist(), 1e-9, parts=parts)
    if parts:
        (found_part,), (expected_part,) = found.part_measurements, expected.part_measurements
        for name in ("grad_sq_norm", "own_sq_norm", "squared_weights", "count"):
            assert getattr(found_part, name) == pytest.approx(getattr(expected_part, name), rel=1e-12)
        assert found_part.follows_sizes
    else:
        assert found.pairs[0] == pytest.approx(expected.pairs[0], rel=1e-9)


@pytest.mark.parametrize(
    ("by_sizes", "share", "depends"), [(False, 0.0, 0.0), (False, 1.0, 0.0), (True, 0.0, 0.0), (True, 1.0, 1.0)]
)
def test_guessed_weights_are_found_out(by_sizes, share, depends):
    """Equal weights were told, and the gradients w_k g_k are what they are."""
    sizes, gradients = population(1.0, share, depends=depends)
    n, raw, g, optimizers = draw(sizes, gradients, 8, 2000, by_sizes=by_sizes)
    seen = 8 * (raw / raw.sum(1, keepdim=True))[..., None] * g
    metric = GradientNoiseScale(unit="tokens", ema_decay=1.0)
    for sq_norms, size, grad_sq_norm in zip(seen.square().sum(2), n, optimizers.square().sum(1), strict=True):
        metric.add_samples(
            GradientSamples(
                sq_norms=sq_norms, sizes=size, weights=[1.0] * 8, grad_sq_norm=grad_sq_norm, weights_guessed=True
            )
        )
    expected = truth(sizes, gradients, 8, by_sizes=by_sizes)
    estimate, errors = metric.estimate(), errors_of(metric)
    assert metric.weights_follow_sizes == by_sizes
    assert abs(estimate.grad_sq_norm - expected[0]) < 3 * errors[0] + 0.01 * expected[0]
    assert estimate.cov_trace == pytest.approx(expected[1], rel=0.05)
    # what was measured under another guess is dropped
    assert (estimate.num_measurements == 2000) != by_sizes
    assert estimate.num_measurements > 1900


def test_lengths_that_are_all_the_same_tell_nothing_of_weights():
    metric = GradientNoiseScale(unit="tokens")
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        g = torch.randn(4, 9, generator=generator, dtype=torch.float64)
        metric.add_samples(
            GradientSamples(
                sq_norms=g.square().sum(1),
                sizes=[7.0] * 4,
                weights=[1.0] * 4,
                grad_sq_norm=g.mean(0).square().sum(),
                weights_guessed=True,
            )
        )
    metric.synchronize()
    assert not metric.weights_follow_sizes
