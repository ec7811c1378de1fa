"""Two progress bars: batch sizes, and the examples of the branch under way."""

from __future__ import annotations

from collections.abc import Callable

from lightning.pytorch.utilities import rank_zero_only
from tqdm.auto import tqdm


class MeasurementProgress:
    """Shows how far a measurement is, on the first rank.

    Args:
        num_sizes: Batch sizes.
        num_examples: Most examples of a branch.
        shown: Whether at all.
    """

    def __init__(self, num_sizes: int, num_examples: int, *, shown: bool) -> None:
        hidden = not shown or rank_zero_only.rank != 0  # type: ignore[attr-defined]  # set by Lightning
        self._sizes = tqdm(total=num_sizes, desc="batch sizes", disable=hidden)
        self._branch = tqdm(total=num_examples, unit="ex", unit_scale=True, leave=False, disable=hidden)

    def __enter__(self) -> MeasurementProgress:
        """Begin."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the bars."""
        self._branch.close()
        self._sizes.close()

    def branch(self, name: str) -> Callable[[float, float], None]:
        """Begin a branch, and return what to call as it goes on."""
        self._branch.reset()
        self._branch.set_description(name.replace("_", " "))

        def show(examples: float, loss: float) -> None:
            self._branch.set_postfix(loss=f"{loss:.4g}", refresh=False)
            self._branch.update(examples - self._branch.n)

        return show

    def size_done(self) -> None:
        """Count a batch size."""
        self._sizes.update()
