"""How a batch is made of micro-batches and ranks."""

from __future__ import annotations

import pytest

from lightning_wn.critical_batch_size.experiment import window_shape


@pytest.mark.parametrize(
    ("size", "micro_batch", "ranks", "room", "shape"),
    [
        (64, 16, 1, None, (16, 4)),
        (64, 16, 2, None, (16, 2)),
        (64, None, 1, None, (64, 1)),
        (64, None, 2, None, (32, 1)),
        (64, None, 1, 64, (64, 1)),
        (64, None, 1, 20, (16, 4)),  # three micro-batches of 20 are too few
        (60, None, 2, 8, (6, 5)),
        (7, None, 1, 3, (1, 7)),
    ],
)
def test_shape(size, micro_batch, ranks, room, shape):
    found = window_shape(size, micro_batch, ranks, room)
    assert found == shape
    assert found[0] * found[1] * ranks == size


@pytest.mark.parametrize(
    ("size", "micro_batch", "ranks", "match"),
    [
        (24, 16, 1, "multiples of 16, the micro-batch of 16 times 1 rank, got 24"),
        (16, 16, 2, "multiples of 32, the micro-batch of 16 times 2 ranks, got 16"),
        (15, None, 2, "multiples of the 2 ranks, got 15"),
    ],
)
def test_what_does_not_divide(size, micro_batch, ranks, match):
    with pytest.raises(ValueError, match=match):
        window_shape(size, micro_batch, ranks, None)
