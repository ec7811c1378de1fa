"""Finished branches on disk, so that none is ever trained twice."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_wn.batch_size.measurement.branch import Branch, BranchPlan


class BranchFiles:
    """A folder of finished branches, all of the same experiment.

    Args:
        directory: The folder; made when the first branch is kept.
        settings: What all branches have in common: names with numbers, texts or None. A folder that was begun with
            others is refused.

    Raises:
        ValueError: If the folder holds branches of another experiment.
    """

    def __init__(self, directory: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        self.directory = Path(directory)
        self._settings = json.loads(json.dumps(settings))
        found = self._read(self._settings_file)
        if found is not None and found != self._settings:
            names = sorted(
                name for name in found.keys() | self._settings if found.get(name) != self._settings.get(name)
            )
            name = names[0]
            seeding = " (seed the random state before the model is made, or pass a function that makes it)"
            raise ValueError(
                f"`directory` {str(self.directory)!r} holds branches of another experiment: `{name}` was "
                f"{found.get(name)!r} there and is {self._settings.get(name)!r} now"
                f"{seeding if name == 'weights' else ''}; choose another directory, or remove it."
            )

    def load(self, plan: BranchPlan) -> Branch | None:
        """Return the finished branch of a plan, if there is one."""
        values = self._read(self._branch_file(plan))
        return None if values is None else Branch.from_dict(values)

    def keep(self, branch: Branch) -> None:
        """Write a finished branch; a file is there wholly or not at all."""
        self._write(self._settings_file, json.dumps(self._settings, indent=1))
        self._write(self._branch_file(branch.plan), json.dumps(branch.to_dict()))

    def write_table(self, text: str) -> None:
        """Write ``results.csv``."""
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

    @staticmethod
    def _write(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
