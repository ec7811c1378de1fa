"""The noise scale where what is counted is a part of an example: tokens, nodes, frames.

Parts of one example share a topic, so that a sample's mean gradient over n_k of them does not vary by tr(Σ)/n_k, and
the two equations of :mod:`~lightning_wn.noise_scale.statistics` do not hold. What holds without a word about sizes is
that different samples are independent: the mean over pairs of them is |G|², and what the optimizer's gradient has
beyond it is its variance. Pure mathematics on Python floats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, permutations

from lightning_wn.noise_scale.statistics import Moments, standardized_skewness

# what is averaged over optimizer steps, in this order; see PartMoments
_PAIRS, _PAIRS_WEIGHT, _OWN, _OWN_WEIGHT, _COUNT, _MICRO_BATCHES = range(6)
_SIZE = 6
_PRODUCTS = tuple(combinations_with_replacement(range(_SIZE), 2))
_TRIPLES = tuple(combinations_with_replacement(range(_SIZE), 3))
_PLACE = {pair: place for place, pair in enumerate(_PRODUCTS)}
# how often a product of two, or of three, stands in a square, or a cube, of a sum
_TWICE = tuple(len(set(permutations(pair))) for pair in _PRODUCTS)
_TIMES = tuple(len(set(permutations(triple))) for triple in _TRIPLES)


@dataclass(frozen=True, kw_only=True)
class PartMeasurement:
    """The sums of one optimizer step over its samples of all ranks, with Σ w_k = 1.

    Attributes:
        grad_sq_norm: |ḡ|², ḡ = Σ w_k g_k.
        own_sq_norm: Σ w_k² |g_k|², what ḡ has from each sample alone.
        squared_weights: Σ w_k², 1 or less.
        count: N, parts (tokens) in ḡ.
        micro_batches: Micro-batches in ḡ.
        follows_sizes: Whether the weights are in proportion to what the samples count.
    """

    grad_sq_norm: float
    own_sq_norm: float
    squared_weights: float
    count: float
    micro_batches: float
    follows_sizes: bool


@dataclass(frozen=True)
class PartMoments(Moments):
    """Exponentially weighted means, with their covariances, of what :class:`PartMeasurement` gives step by step.

    With D = |ḡ|² - Σ w_k²|g_k|², the sum over pairs of different samples, and p = 1 - Σ w_k²:

    - E D = p |G|², whatever the sizes, as long as a sample's mean gradient does not depend on its size. Where it does
      and w_k = n_k/N, Σ N² D / Σ N² p over steps still is |G|², with G the mean over all parts. Steps weigh N² there,
      and elsewhere the square of what a step of as many micro-batches holds on average.
    - V = E|ḡ|² - |G|², the variance of the optimizer's gradient, is Σ w_k²|g_k|² - (1 - p)|G|² + c (D - p |G|²). The
      last term is zero on average where gradients do not depend on sizes, for any c. Where they do, E ḡ ≠ G, and
      c = 1/2 - Σ w_k² removes what that adds to V, to first order in one over the number of samples.
    - N V of a step of N parts in M micro-batches is the mean of M V, times that of N over that of M: the same at a
      fixed M, and right where M changes while the moments look back.

    Attributes:
        weight: Σ weights.
        squared_weight: Σ weights².
        count: Measurements so far.
        means: Weighted means of (step weight · D, step weight · p, M (Σ w²|g|² + c D), M (Σ w² + c p), N, M).
        scatter: Weighted sums of the products of two of their deviations, each pair once.
        cubes: Weighted sums of the products of three of them, each triple once.
    """

    weight: float = 0.0
    squared_weight: float = 0.0
    count: float = 0.0
    means: tuple[float, ...] = (0.0,) * _SIZE
    scatter: tuple[float, ...] = (0.0,) * len(_PRODUCTS)
    cubes: tuple[float, ...] = (0.0,) * len(_TRIPLES)

    def updated(self, step: PartMeasurement, decay: float) -> PartMoments:
        """Return the moments after one more step of weight 1, all earlier ones decayed."""
        count = step.count
        if not step.follows_sizes and self.weight:
            count = self.means[_COUNT] / self.means[_MICRO_BATCHES] * step.micro_batches
        pairs = step.grad_sq_norm - step.own_sq_norm
        share = 1.0 - step.squared_weights
        correction = 0.5 - step.squared_weights
        values = (
            count * count * pairs,
            count * count * share,
            step.micro_batches * (step.own_sq_norm + correction * pairs),
            step.micro_batches * (step.squared_weights + correction * share),
            step.count,
            step.micro_batches,
        )
        weight = decay * self.weight + 1.0
        carried = decay * self.weight / weight
        cubed = carried * (carried - 1.0 / weight)
        d = [value - mean for value, mean in zip(values, self.means, strict=True)]
        old = [decay * product for product in self.scatter]
        return PartMoments(
            weight=weight,
            squared_weight=decay * decay * self.squared_weight + 1.0,
            count=self.count + 1.0,
            means=tuple(mean + deviation / weight for mean, deviation in zip(self.means, d, strict=True)),
            scatter=tuple(product + carried * d[i] * d[j] for product, (i, j) in zip(old, _PRODUCTS, strict=True)),
            cubes=tuple(
                decay * cube
                + cubed * d[i] * d[j] * d[k]
                - (d[i] * old[_PLACE[j, k]] + d[j] * old[_PLACE[i, k]] + d[k] * old[_PLACE[i, j]]) / weight
                for cube, (i, j, k) in zip(self.cubes, _TRIPLES, strict=True)
            ),
        )

    def pair(self) -> tuple[float, float]:
        """Return |G|² and N V: the variance of the optimizer's gradient times the parts in it."""
        pairs, pairs_weight, own, own_weight, count, micro_batches = self.means
        grad_sq_norm = pairs / pairs_weight
        return grad_sq_norm, count / micro_batches * (own - grad_sq_norm * own_weight)

    def covariance_of_means(self) -> tuple[float, float, float]:
        """Return the covariance of :meth:`pair`, linear in the deviations of the means (the delta method)."""
        of_x, of_y = self._slopes()
        scale = self.scale_of_covariance()
        var_x = cov_xy = var_y = 0.0
        for product, (i, j) in zip(self.scatter, _PRODUCTS, strict=True):
            once = product * scale
            twice = once if i == j else 2.0 * once
            var_x += twice * of_x[i] * of_x[j]
            var_y += twice * of_y[i] * of_y[j]
            cov_xy += once * (of_x[i] * of_y[j] + (0.0 if i == j else of_x[j] * of_y[i]))
        # rounding may leave a little less than nothing
        return max(var_x, 0.0), cov_xy, max(var_y, 0.0)

    def skewness(self) -> float:
        """Return the skewness of what a step adds to y - r x, at the noise scale r; 0 where it is not known."""
        x, y = self.pair()
        if x <= 0.0:
            return 0.0
        slopes = [of_y - y / x * of_x for of_x, of_y in zip(*self._slopes(), strict=True)]
        squares = sum(
            times * product * slopes[i] * slopes[j]
            for times, product, (i, j) in zip(_TWICE, self.scatter, _PRODUCTS, strict=True)
        )
        cubes = sum(
            times * cube * slopes[i] * slopes[j] * slopes[k]
            for times, cube, (i, j, k) in zip(_TIMES, self.cubes, _TRIPLES, strict=True)
        )
        return standardized_skewness(cubes, squares, self.weight)

    def _slopes(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return the derivatives of both of :meth:`pair` by the means."""
        _, pairs_weight, _, own_weight, count, micro_batches = self.means
        x, y = self.pair()
        size = count / micro_batches
        of_x = (1.0 / pairs_weight, -x / pairs_weight, 0.0, 0.0, 0.0, 0.0)
        by_x = -size * own_weight
        return of_x, (by_x * of_x[0], by_x * of_x[1], size, -size * x, y / count, -y / micro_batches)

    def to_list(self) -> list[float]:
        """Return the moments as plain numbers."""
        return [self.weight, self.squared_weight, self.count, *self.means, *self.scatter, *self.cubes]

    @classmethod
    def from_list(cls, values: Sequence[float]) -> PartMoments:
        """Rebuild the moments from :meth:`to_list`."""
        weight, squared_weight, count, *others = values
        means, products = others[:_SIZE], others[_SIZE:]
        scatter, cubes = products[: len(_PRODUCTS)], products[len(_PRODUCTS) :]
        return cls(weight, squared_weight, count, tuple(means), tuple(scatter), tuple(cubes))
