"""What a change is checked with: ``nox`` runs all of it, ``nox -s lint`` a part; ``nox -l`` lists the parts.

Each session makes an environment of its own. ``nox --no-venv --no-install -s lint types imports`` uses the one that it
runs in.
"""

from __future__ import annotations

import nox

nox.options.sessions = ["lint", "types", "imports", "tests"]
nox.options.default_venv_backend = "venv"


@nox.session
def lint(session: nox.Session) -> None:
    """Style of the code, and its format."""
    session.install("ruff>=0.11")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Types of the package, strictly."""
    session.install(".", "mypy>=1.15")
    session.run("mypy")


@nox.session
def imports(session: nox.Session) -> None:
    """Imports go down only, and the picture of them in docs/architecture.md is true."""
    session.install(".[dev]")
    session.run("lint-imports")
    session.run("python", "docs/draw_floors.py", "--check")


@nox.session
def tests(session: nox.Session) -> None:
    """All tests with the newest torch; what follows ``--`` goes to pytest."""
    session.install(".[test]")
    session.run("pytest", *session.posargs)


@nox.session
def torch_2_13(session: nox.Session) -> None:
    """All tests with torch 2.13.0."""
    session.install("torch==2.13.0")
    session.install(".[test]")
    session.run("pytest", *session.posargs)


@nox.session(python="3.10")
def lower_bounds(session: nox.Session) -> None:
    """All tests with the oldest versions that pyproject.toml admits."""
    session.install("torch==2.6.0", "lightning==2.6.0", "torchmetrics==1.6.0", "numpy<2.3")
    session.install(".[test]")
    session.run("pytest", *session.posargs)
