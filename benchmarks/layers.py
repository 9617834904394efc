"""The layers of both packages, from the import rules in pyproject.toml and the docstrings of the folders.

python benchmarks/layers.py        # writes figures/layers.md; benchmarks/splice.py copies the tables into the page
"""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE = ROOT / "benchmarks" / "figures" / "layers.md"


def layers(root: Path = ROOT) -> Iterator[tuple[str, list[list[str]]]]:
    """Each package with its layers, the highest first; a layer has one or several folders or modules.

    Raises SystemExit where pyproject.toml has no contract of that kind.
    """
    table = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = [
        each for each in table["tool"].get("importlinter", {}).get("contracts", []) if each["type"] == "layers"
    ]
    if not contracts:
        raise SystemExit("pyproject.toml must have contracts of type layers under tool.importlinter")
    for contract in contracts:
        named = [[name.strip("() ") for name in layer.replace(":", "|").split("|")] for layer in contract["layers"]]
        yield contract["containers"][0], named


def purpose(package: str, name: str, root: Path = ROOT) -> str:
    """The first sentence of the docstring of a module or folder; nothing where it has none."""
    for path in (root / package / name / "__init__.py", root / package / f"{name}.py"):
        if path.exists():
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            return re.split(r"(?<=\.) |:$", docstring.split("\n\n")[0].replace("\n", " "))[0]
    return ""


def text(root: Path = ROOT) -> str:
    """Both pictures as Markdown."""
    parts = ["# Layers\n"]
    for package, named in layers(root):
        rows = [f"| {level} | `{name}` | {purpose(package, name, root)} |"
                for level, names in enumerate(named, 1) for name in names]  # fmt: skip
        parts.append("\n".join([f"## Layers of {package}\n", "Made by `python benchmarks/layers.py`.\n",
                                "| layer | module | what it is |", "|---:|:---|:---|", *rows, ""]))  # fmt: skip
    return "\n".join(parts)


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
