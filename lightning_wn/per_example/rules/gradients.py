"""In what form a layer knows its per-example gradients, and how to square each form cheaply.

The gradient of one weight by example i is a sum over positions t (tokens, pixels). Kept as factors it is
small, and its squared norm needs no (B, *weight) tensor: that is the trick of Goodfellow (arXiv 1510.01799),
extended to several positions by the Gram matrices of both factors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_wn.noise_scale.preconditioning import divide

# writing and reading back an element that was materialised costs about this many multiplications in a matrix
# product; measured on a CPU, and about the ratio of an H100's float32 and memory throughput
_MEMORY_COST = 64

# how many elements of gradients are materialised at a time, or one example's, where that is more
_CHUNK = 2**21

# from so many positions on, examples are worth a matrix product each
_LONG = 32

# on a CPU, a materialised product is squared while it lies in the cache; elsewhere a few large steps are better
_CACHED = 2**18


def examples_at_once(elements: int, device: torch.device) -> int:
    """Return how many examples to materialise at a time, where one has that many elements."""
    return max(1, (_CACHED if device.type == "cpu" else 16 * _CHUNK) // max(1, elements))


def _square_each(grad: Tensor) -> Tensor:
    # of a complex gradient, both parts: z² is not |z|²
    real = torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad
    return real.square().reshape(len(grad), -1).sum(1)


@dataclass(frozen=True)
class Block:
    """Some rows and columns of a parameter that is viewed as a matrix; a vector is one row.

    Attributes:
        shape: How many rows and columns the parameter has.
        rows: Which of them.
        columns: Which of them.
    """

    shape: tuple[int, int]
    rows: slice
    columns: slice

    def of(self, gradient: Tensor) -> Tensor:
        r"""Cut the block out of (\*shape)."""
        return gradient.reshape(self.shape)[self.rows, self.columns]


def _folded(tensor: Tensor, fold: int) -> Tensor:
    return tensor.reshape(-1, fold, *tensor.shape[1:])


@dataclass(frozen=True)
class Form:
    """Per-example gradients of one parameter, in the form that its layer knows them: tensors with the batch first."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What it consists of; the last one holds values, not indices."""
        return tuple(vars(self).values())

    @property
    def batch_size(self) -> int:
        """B."""
        return len(self.tensors[0])

    @property
    def dtype(self) -> torch.dtype:
        """The type of the gradients."""
        return self.tensors[-1].dtype

    def examples(self, some: slice) -> Form:
        """Keep some examples."""
        return replace(self, **{name: tensor[some] for name, tensor in vars(self).items()})

    def compact(self, shape: torch.Size) -> Form:
        """Return a form fit to be kept until the other uses of its parameter arrive."""
        return self

    def merge(self, fold: int) -> Form:
        """Add each ``fold`` successive examples."""
        raise NotImplementedError

    def dense(self, shape: torch.Size) -> Tensor:
        """Materialise: shape (B, *shape)."""
        raise NotImplementedError

    def squared(self) -> Tensor:
        """Return the squared norms, shape (B,)."""
        raise NotImplementedError

    def summed(self, shape: torch.Size, block: Block) -> Tensor:
        """Return a block of Σ_i gradient_i, shape (rows, columns)."""
        some = max(1, _CHUNK // max(1, shape.numel()))
        parts = [self.examples(slice(n, n + some)).dense(shape).sum(0) for n in range(0, self.batch_size, some)]
        return block.of(torch.stack(parts).sum(0))


@dataclass(frozen=True)
class Dense(Form):
    """Per-example gradients as they are, shape (B, *weight)."""

    grad: Tensor

    def merge(self, fold: int) -> Dense:
        """Add each ``fold`` successive examples."""
        return Dense(_folded(self.grad, fold).sum(1))

    def dense(self, shape: torch.Size) -> Tensor:
        """Materialise: shape (B, *shape)."""
        return self.grad.reshape(-1, *shape)

    def squared(self) -> Tensor:
        """Return the squared norms, shape (B,)."""
        return _square_each(self.grad)

    def summed(self, shape: torch.Size, block: Block) -> Tensor:
        """Return a block of Σ_i gradient_i, shape (rows, columns)."""
        return self.grad.reshape(-1, *block.shape)[:, block.rows, block.columns].sum(0)


@dataclass(frozen=True)
class Outer(Form):
    """Per-example gradients Σ_t left_t ⊗ right_t of a weight viewed as (groups, L, R).

    Attributes:
        left: Shape (B, groups, T, L).
        right: Shape (B, groups, T, R).
    """

    left: Tensor
    right: Tensor

    def merge(self, fold: int) -> Outer:
        """Add each ``fold`` successive examples: their positions lie side by side."""

        def merged(factor: Tensor) -> Tensor:
            return _folded(factor, fold).transpose(1, 2).flatten(2, 3)

        return Outer(merged(self.left), merged(self.right))

    def dense(self, shape: torch.Size) -> Tensor:
        """Materialise: shape (B, *shape)."""
        return (self.left.mT @ self.right).reshape(-1, *shape)

    def compact(self, shape: torch.Size) -> Outer | Dense:
        """Return the smaller of both forms."""
        if self.left.shape[2] * (self.left.shape[3] + self.right.shape[3]) > self.left.shape[3] * self.right.shape[3]:
            return Dense(self.dense(shape))
        return self

    def gram_is_cheaper(self, *, with_along: bool = False) -> bool:
        """Whether the Gram matrices of both factors cost less than the materialised gradient."""
        _, _, length, left = self.left.shape
        return gram_is_cheaper(length, left, self.right.shape[3], with_along=with_along)

    def squared(self) -> Tensor:
        """Return the squared norms, shape (B,)."""
        if self.gram_is_cheaper():
            # <Σ_t l_t ⊗ r_t, Σ_s l_s ⊗ r_s> = Σ_ts <l_t, l_s> <r_t, r_s>; written in place, as new memory is slow
            total: Tensor = (self.left @ self.left.mH).mul_(self.right @ self.right.mH).sum((1, 2, 3))
            return total.real if total.is_complex() else total
        if self.left.is_complex():
            return torch.cat([_square_each(grad) for grad in self._products()])
        return torch.cat([grad.square_().sum((1, 2, 3)) for grad in self._products()])

    def summed(self, shape: torch.Size, block: Block) -> Tensor:
        """Return a block of Σ_i gradient_i, shape (rows, columns)."""
        _, groups, length, rows = self.left.shape
        if (groups * rows, self.right.shape[3]) != block.shape:
            return super().summed(shape, block)
        if groups > 1:
            return (self.left.mT @ self.right[..., block.columns]).sum(0).flatten(0, 1)[block.rows]
        left, right = self.left[:, 0, :, block.rows], self.right[:, 0, :, block.columns]
        if length < _LONG:
            return left.flatten(0, 1).mT @ right.flatten(0, 1)
        return torch.bmm(left.mT, right).sum(0)  # without copies

    def by_row(self, direction: Tensor) -> tuple[Tensor, Tensor]:
        """Return each row's squared norm and its product with the row of ``direction``, both (B, groups·L).

        Args:
            direction: Shape (groups, L, R).
        """
        if self.gram_is_cheaper(with_along=True):
            gram = self.right @ self.right.mT
            row_sq = (gram @ self.left).mul_(self.left).sum(2)
            along = (self.right @ direction.mT).mul_(self.left).sum(2)
            return row_sq.flatten(1), along.flatten(1)
        both = [((grad * direction).sum(3), grad.square_().sum(3)) for grad in self._products()]
        return torch.cat([row_sq for _, row_sq in both]).flatten(1), torch.cat([along for along, _ in both]).flatten(1)

    def _products(self) -> Iterator[Tensor]:
        """Materialise some examples after the other, each (some of B, groups, L, R)."""
        elements = self.left.shape[1] * self.left.shape[3] * self.right.shape[3]
        some = examples_at_once(elements, self.left.device)
        for left, right in zip(torch.split(self.left, some), torch.split(self.right, some), strict=True):
            yield left.mT @ right


def gram_is_cheaper(length: int, left: int, right: int, *, with_along: bool = False) -> bool:
    """Compare T²(L + R) with T·L·R and the memory traffic of the materialised gradient."""
    gram = length * length * (left + right + _MEMORY_COST)
    direct = left * right * (length + _MEMORY_COST)
    if with_along:
        gram += length * left * right
        direct += left * right * _MEMORY_COST
    return gram < direct


@dataclass(frozen=True)
class Rows(Form):
    """Per-example gradients Σ_t e_(index_t) ⊗ values_t of a table: only the rows that were looked up.

    Attributes:
        index: Shape (B, T).
        values: Shape (B, T, R).
    """

    index: Tensor
    values: Tensor

    def merge(self, fold: int) -> Rows:
        """Add each ``fold`` successive examples."""
        return Rows(_folded(self.index, fold).flatten(1, 2), _folded(self.values, fold).flatten(1, 2))

    def dense(self, shape: torch.Size) -> Tensor:
        """Materialise: shape (B, *shape)."""
        index = self.index.unsqueeze(-1).expand_as(self.values)
        return self.values.new_zeros(len(self.index), *shape).scatter_add_(1, index, self.values)

    def distinct(self) -> Rows:
        """Add the values of repeated rows; shapes stay, unused places are zero.

        Sorting brings repeats together. The result has as many places as there were positions, so that no
        size has to be read back from the device.
        """
        index, order = self.index.sort(dim=1)
        values = self.values.gather(1, order.unsqueeze(-1).expand_as(self.values))
        place = torch.zeros_like(index)
        place[:, 1:] = (index[:, 1:] != index[:, :-1]).cumsum(1)
        sums = torch.zeros_like(values).scatter_add_(1, place.unsqueeze(-1).expand_as(values), values)
        return Rows(torch.zeros_like(index).scatter_(1, place, index), sums)

    def squared(self) -> Tensor:
        """Return the squared norms, shape (B,)."""
        return _square_each(self.distinct().values)

    def summed(self, shape: torch.Size, block: Block) -> Tensor:
        """Return a block of Σ_i gradient_i, shape (rows, columns)."""
        values = self.values[..., block.columns].flatten(0, 1)
        return values.new_zeros(block.shape[0], values.shape[1]).index_add_(0, self.index.flatten(), values)[block.rows]

    def product(self, other: Outer) -> Tensor:
        """Return each example's inner product with a gradient of the same table, shape (B,)."""
        left, right = other.left[:, 0], other.right[:, 0]  # (B, S, L), (B, S, R)
        picked = left.gather(2, self.index.unsqueeze(1).expand(-1, left.shape[1], -1))
        return (picked * (right @ self.values.mH)).sum((1, 2))


@dataclass(frozen=True)
class Common(Form):
    """A gradient that all examples have in common, each in its share: shares_i · grad.

    Attributes:
        shares: Shape (B,).
        grad: Shape (*weight).
    """

    shares: Tensor
    grad: Tensor

    def examples(self, some: slice) -> Common:
        """Keep some examples."""
        return replace(self, shares=self.shares[some])

    def dense(self, shape: torch.Size) -> Tensor:
        """Materialise: shape (B, *shape)."""
        return self.shares.reshape(-1, *[1] * len(shape)) * self.grad

    def squared(self) -> Tensor:
        """Return the squared norms, shape (B,)."""
        return self.shares.square() * _square_each(self.grad.unsqueeze(0))

    def summed(self, shape: torch.Size, block: Block) -> Tensor:
        """Return a block of Σ_i gradient_i, shape (rows, columns)."""
        return block.of(self.grad) * self.shares.sum()

    def product(self, other: Form, shape: torch.Size) -> Tensor:
        """Return each example's inner product with another gradient, shape (B,)."""
        conjugate = self.grad.conj().resolve_conj()
        if isinstance(other, Outer):
            _, groups, _, rows = other.left.shape
            product = ((other.left @ conjugate.reshape(groups, rows, -1)) * other.right).sum((1, 2, 3))
        elif isinstance(other, Rows):
            product = (other.values * conjugate[other.index]).sum((1, 2))
        else:
            some = max(1, _CHUNK // max(1, shape.numel()))
            parts = [other.examples(slice(n, n + some)).dense(shape) for n in range(0, other.batch_size, some)]
            product = torch.cat(
                [(part * conjugate).flatten(1).sum(1) for part in (p.reshape(len(p), *shape) for p in parts)]
            )
        return self.shares * (product.real if product.is_complex() else product)


def add_forms(forms: Sequence[Form], shape: torch.Size) -> list[Form]:
    """Add several uses of one parameter, as far as their forms allow without materialising."""
    outers = [form for form in forms if isinstance(form, Outer)]
    rows = [form for form in forms if isinstance(form, Rows)]
    if len(forms) == 1:
        return list(forms)
    if len(outers) + len(rows) < len(forms) or (rows and outers and outers[0].left.shape[1] > 1):
        return [Dense(add_dense(forms, shape))]
    added: list[Form] = []
    if outers:
        added.append(Outer(torch.cat([f.left for f in outers], 2), torch.cat([f.right for f in outers], 2)))
    if rows:
        added.append(Rows(torch.cat([f.index for f in rows], 1), torch.cat([f.values for f in rows], 1)))
    return added


def squared_norms(forms: Sequence[Form], shape: torch.Size) -> Tensor:
    """Return |Σ_uses gradient|² per example, shape (B,); a parameter's uses are added before squaring."""
    common = [form for form in forms if isinstance(form, Common)]
    if common and len(forms) > 1:
        # |a + b|² = |a|² + |b|² + 2<a, b>, and b is a whole tensor
        others = [form for form in forms if not isinstance(form, Common)]
        products = torch.stack([common[0].product(form, shape) for form in others]).sum(0)
        return squared_norms(others, shape) + common[0].squared() + 2 * products
    added = add_forms(forms, shape)
    total = added[0].squared()
    if len(added) == 2:
        # a table that is also a projection: |a + b|² = |a|² + |b|² + 2<a, b>
        outer, rows = added
        assert isinstance(outer, Outer)
        assert isinstance(rows, Rows)
        product = rows.product(outer)
        total = total + rows.squared() + 2 * (product.real if product.is_complex() else product)
    return total


def add_dense(forms: Sequence[Form], shape: torch.Size) -> Tensor:
    """Materialise the sum of several uses, shape (B, *shape)."""
    total = forms[0].dense(shape)
    for form in forms[1:]:
        total = total + form.dense(shape)
    return total


def dense_chunks(forms: Sequence[Form], shape: torch.Size) -> Iterator[Tensor]:
    """Materialise the sum of several uses for a few examples after the other, each (some of B, *shape)."""
    some = max(1, _CHUNK // max(1, shape.numel()))
    for start in range(0, forms[0].batch_size, some):
        yield add_dense([form.examples(slice(start, start + some)) for form in forms], shape)


def preconditioned_sq_norms(forms: Sequence[Form], shape: torch.Size, denominator: Tensor) -> Tensor:
    """Return |Σ_uses gradient / denominator|² per example, shape (B,).

    A division element by element breaks the factors up: every example's gradient is materialised, a few at a
    time.

    Args:
        forms: The gradients of the uses.
        shape: The parameter's shape.
        denominator: Of this shape.
    """
    added = add_forms(forms, shape)
    if len(added) == 1 and isinstance(added[0], Rows):
        rows = added[0].distinct()
        return _square_each(divide(rows.values, denominator[rows.index]))
    return torch.cat([_square_each(divide(g, denominator)) for g in dense_chunks(added, shape)])
