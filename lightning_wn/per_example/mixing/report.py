"""What a search for mixing found: a find, nothing, or that it could not look."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

MixingTest = Literal["finite swap", "second derivative", "alone"]


class Mixing(enum.Enum):
    """The three outcomes."""

    MIXES = "mixes"
    SEPARATE = "separate"
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class MixingReport:
    """The outcome of :func:`~.search.find_mixing`.

    Attributes:
        outcome: MIXES if a test found it. SEPARATE if the finite swap, which needs least of the model, found nothing
            and no other test did. UNKNOWN if the swap could not be made.
        test: The test that found it, empty if none did.
        where: The module at which it shows, empty if none does.
        why: A sentence's end: what shows there, or why nothing can be said.
        skipped: The tests that could not be made, with the reason.
    """

    outcome: Mixing
    test: MixingTest | Literal[""] = ""
    where: str = ""
    why: str = ""
    skipped: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Find:
    """What one test saw.

    Attributes:
        where: How messages call the module.
        what: What of an example depends on the others there.
    """

    where: str
    what: str

    @property
    def sentence(self) -> str:
        """What is wrong, for an error message."""
        return f"{self.what} {self.where} depends on the other examples of the batch"


class CannotLookError(Exception):
    """A test cannot be made; the message says why."""
