"""What is public, and that README, docs, examples and benchmarks need no more."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

import lightning_wn
from lightning_wn.__main__ import main

ROOT = Path(__file__).parents[1]
PUBLIC = ["lightning_wn", *re.findall(r"^- ``(lightning_wn\.\w+)``: ", lightning_wn.__doc__, re.MULTILINE)]
USERS = [
    *(ROOT / "examples").glob("*.py"),
    *(ROOT / "benchmarks").glob("*.py"),
    *(ROOT / "docs").glob("*.md"),
    ROOT / "README.md",
]


def sources_of(path):
    text = path.read_text(encoding="utf-8")
    return [text] if path.suffix == ".py" else re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def imports_of(source):
    """Yield module and name of everything of this package that a source imports; the name is None for a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lightning_wn":
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((a.name, None) for a in node.names if a.name.split(".")[0] == "lightning_wn")


def test_the_docstring_names_public_packages():
    assert len(PUBLIC) == 7


def test_imports_are_found():
    source = "import lightning_wn.a\ndef f():\n    from lightning_wn.b import c\nimport torch"
    assert set(imports_of(source)) == {("lightning_wn.a", None), ("lightning_wn.b", "c")}
    assert sum(bool(list(imports_of(source))) for path in USERS for source in sources_of(path)) > 20


@pytest.mark.parametrize("path", USERS, ids=lambda path: path.name)
def test_users_import_public_names_only(path):
    for source in sources_of(path):
        for module, name in imports_of(source):
            assert module in PUBLIC, f"{module} is not public"
            assert name is None or name in importlib.import_module(module).__all__, f"{module}.{name} is not public"


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_there_sorted_and_documented(module):
    package = importlib.import_module(module)
    assert package.__doc__
    assert len(set(package.__all__)) == len(package.__all__)
    for name in package.__all__:
        found = getattr(package, name)
        # the alias of a type has the docstring of its own type
        assert found.__doc__, f"{module}.{name} has no docstring"


@pytest.mark.parametrize("path", (ROOT / "lightning_wn" / "reports").glob("*.py"), ids=lambda path: path.name)
def test_matplotlib_is_imported_to_draw_only(path):
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not any(name.split(".")[0] == "matplotlib" for name in names)


def test_the_command_line_tells_the_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.strip() == lightning_wn.__version__
