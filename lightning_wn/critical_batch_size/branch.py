"""Finished branches on disk, so that none is ever trained twice."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from lightning_wn.critical_batch_size.loss_curve import SMOOTHING, LossCurve


class BranchFiles:
    """A folder of finished branches, all of the same experiment.

    Args:
        directory: The folder; made at once, so that one that cannot be written to is not found out after training.
        settings: What all branches have in common: names with numbers, texts or None. A folder that was begun with
            others is refused.

    Raises:
        ValueError: If the folder holds branches of another experiment or a damaged file, or is none.
    """

    def __init__(self, directory: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        self.directory = Path(directory).expanduser()
        self._settings = json.loads(json.dumps(settings))
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=self.directory):
                pass
        except OSError as error:
            raise ValueError(
                f"`directory` must be a folder that can be written to, got {str(self.directory)!r}: {error}."
            ) from error
        found = self._read(self._settings_file)
        if found is not None and not isinstance(found, dict):
            raise self._damaged(self._settings_file)
        if found is not None and found != self._settings:
            names = sorted(
                name for name in found.keys() | self._settings if found.get(name) != self._settings.get(name)
            )
            name = names[0]
            hints = {
                "weights": " (seed the random state before the model is made, or pass a function that makes it)",
                "base_batch_size": " (it is the smallest batch size unless you give it)",
            }
            raise ValueError(
                f"`directory` {str(self.directory)!r} holds branches of another experiment: `{name}` was "
                f"{found.get(name)!r} there and is {self._settings.get(name)!r} now"
                f"{hints.get(name, '')}; choose another directory, or remove it."
            )

    def load(self, plan: BranchPlan) -> Branch | None:
        """Return the finished branch of a plan, if there is one."""
        values = self._read(self._branch_file(plan))
        try:
            return None if values is None else Branch.from_dict(values)
        except (AttributeError, KeyError, TypeError) as error:
            raise self._damaged(self._branch_file(plan)) from error

    @rank_zero_only
    def keep(self, branch: Branch) -> None:
        """Write a finished branch, on the first rank; a file is there wholly or not at all."""
        self._write(self._settings_file, json.dumps(self._settings, indent=1))
        self._write(self._branch_file(branch.plan), json.dumps(branch.to_dict()))

    @rank_zero_only
    def write_table(self, text: str) -> None:
        """Write ``results.csv``, on the first rank."""
        self._write(self.directory / "results.csv", text)

    @property
    def _settings_file(self) -> Path:
        return self.directory / "settings.json"

    def _branch_file(self, plan: BranchPlan) -> Path:
        return self.directory / "branches" / f"{plan.name}.json"

    @staticmethod
    def _read(path: Path) -> Any:
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise BranchFiles._damaged(path) from error

    @staticmethod
    def _damaged(path: Path) -> ValueError:
        return ValueError(f"`directory` holds a damaged file, {str(path)!r}; remove it, and it will be made anew.")

    @staticmethod
    def _write(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)


@dataclass(frozen=True, kw_only=True)
class BranchPlan:
    """What tells a branch from the others.

    Attributes:
        batch_size: Examples in an optimizer step, over all ranks.
        learning_rate_factor: What the optimizer's learning rate is multiplied with, beside the rule's factor.
        seed: Of the order of the data, and of the weights where a function makes the model.
    """

    batch_size: int
    learning_rate_factor: float = 1.0
    seed: int = 0

    @property
    def name(self) -> str:
        """A name for people and for files."""
        return f"batch_{self.batch_size}_rate_{self.learning_rate_factor:.6g}_seed_{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Branch:
    """What became of a branch.

    Attributes:
        plan: What it was.
        curve: Its losses over its own optimizer steps; or the monitored values.
        smoothing: 0 where the curve is to be taken as it is.
        diverged: Whether a loss was not finite.
        noise_scales: (optimizer step, noise scale) at log steps, or at the end where there were none; empty without a
            noise-scale callback.
        given_up: Optimizer steps after which it was given up, as another learning rate is faster; None where it was
            trained to its end.
    """

    plan: BranchPlan
    curve: LossCurve
    smoothing: float = SMOOTHING
    diverged: bool = False
    noise_scales: tuple[tuple[int, float], ...] = ()
    given_up: int | None = None

    @property
    def mean_batch_size(self) -> float:
        """Examples in an optimizer step as they were: fewer where epochs end with short batches."""
        return self.curve.examples[-1] / self.curve.steps[-1] if self.curve.steps else math.nan

    def steps_to(self, target: float) -> float:
        """Return the optimizer steps to a loss; infinite where it was not reached."""
        return math.inf if self.diverged else self.curve.steps_to(target, self.smoothing)

    def to_dict(self) -> dict[str, Any]:
        """Return lists and numbers for a file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Branch:
        """Return what :meth:`to_dict` was made from."""
        return cls(
            plan=BranchPlan(**values["plan"]),
            curve=LossCurve(**{name: tuple(series) for name, series in values["curve"].items()}),
            smoothing=values["smoothing"],
            diverged=values["diverged"],
            noise_scales=tuple((step, noise_scale) for step, noise_scale in values["noise_scales"]),
            given_up=values.get("given_up"),
        )
