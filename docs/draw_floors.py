"""Draws the floors of the package, from its imports, into docs/architecture.md.

    python docs/draw_floors.py          # write
    python docs/draw_floors.py --check  # say whether what is written is still true
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import grimp

PACKAGE = "lightning_wn"
ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
GROUND = "the ground"


def purpose(folder: str) -> str:
    """Return the first sentence of what a folder says of itself."""
    text = ast.get_docstring(ast.parse((ROOT / PACKAGE / folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    return re.split(r"[.:] |\.$", text.splitlines()[0].replace("`", ""))[0]


def drawing() -> str:
    """Return the picture in Mermaid's language: an arrow wherever one floor imports another, detours left out."""
    graph = grimp.build_graph(PACKAGE)
    children = {name.rpartition(".")[2] for name in graph.find_children(PACKAGE)} - {"__main__"}
    folders = sorted(name for name in children if (ROOT / PACKAGE / name).is_dir())
    files = sorted(children - set(folders))
    imports = {
        folder: {
            other if other in folders else GROUND
            for module in graph.find_descendants(f"{PACKAGE}.{folder}") | {f"{PACKAGE}.{folder}"}
            for found in graph.find_modules_directly_imported_by(module)
            if (other := found.split(".")[1] if "." in found else "") and other != folder
        }
        for folder in folders
    }
    reached = {GROUND: set[str]()}

    def below(folder: str) -> set[str]:
        if folder not in reached:
            reached[folder] = imports[folder].union(*(below(other) for other in imports[folder]))
        return reached[folder]

    lines = ["```mermaid", "flowchart TD"]
    lines += [f'    {folder}["<b>{folder}/</b><br>{purpose(folder)}"]' for folder in folders]
    lines.append(f'    ground["<b>{GROUND}</b><br>{", ".join(files)}"]')
    for folder in folders:
        direct = {other for other in imports[folder] if not any(other in below(o) for o in imports[folder] - {other})}
        lines += [f"    {folder} --> {'ground' if other == GROUND else other}" for other in sorted(direct)]
    return "\n".join([*lines, "```"])


def main() -> int:
    """Write the picture, or compare it."""
    text = PAGE.read_text(encoding="utf-8")
    new = re.sub(r"```mermaid\n.*?```", lambda found: drawing(), text, count=1, flags=re.DOTALL)
    if "--check" in sys.argv[1:]:
        if new != text:
            print(f"{PAGE.relative_to(ROOT)} does not show the imports as they are: run python docs/draw_floors.py")
        return int(new != text)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
