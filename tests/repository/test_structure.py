"""The layout of both packages: who may import whom, and sizes that may only shrink."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import completed

import bench

LINT = str(Path(sys.executable).with_name("lint-imports"))
ROOT = Path(bench.__file__).parents[1]
PACKAGES = ("bench", "compression")
MODULES = sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
LINES = 350
FUNCTION = 60
LATE = 15  # imports of project modules inside functions
AT_THE_TOP = {"__init__.py", "__main__.py", "errors.py", "files.py"}


def tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def late_imports(source: ast.AST) -> Iterator[int]:
    """Lines of imports of project modules inside functions."""
    for function in ast.walk(source):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PACKAGES:
                    yield node.lineno
                if isinstance(node, ast.Import) and any(a.name.partition(".")[0] in PACKAGES for a in node.names):
                    yield node.lineno


def test_layers_look_down():
    """The contracts of import-linter in pyproject.toml; it names each import that runs against them."""
    done = completed([LINT, "--no-cache"], cwd=ROOT)

    assert done.returncode == 0, done.stdout + done.stderr


def test_a_layer_that_looks_up_is_found(tmp_path):
    (tmp_path / "low").mkdir()
    for name, text in {"__init__": "", "errors": "from low import engine", "engine": ""}.items():
        (tmp_path / "low" / f"{name}.py").write_text(text)
    (tmp_path / "pyproject.toml").write_text(
        '[tool.importlinter]\nroot_package = "low"\n[[tool.importlinter.contracts]]\nname = "down"\ntype = "layers"\n'
        'containers = ["low"]\nlayers = ["engine", "errors"]\n'
    )

    done = completed([LINT, "--no-cache"], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})

    assert done.returncode == 1
    assert "low.errors -> low.engine" in done.stdout


def test_no_import_is_ignored_by_the_contracts():
    assert "ignore_imports" not in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_a_module_is_at_most_350_lines(path):
    assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) <= LINES


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_a_function_is_at_most_60_lines(path):
    assert [] == [
        f"{f.name}: {f.end_lineno - f.lineno + 1}" for f in functions(path) if f.end_lineno - f.lineno >= FUNCTION
    ]


def test_few_project_modules_are_imported_inside_functions():
    found = [f"{path}:{line}" for path in MODULES for line in sorted(set(late_imports(tree(path))))]

    assert len(found) <= LATE, "\n".join(found)


def test_late_imports_are_seen():
    assert [2] == list(late_imports(ast.parse("def f():\n    from bench.gate import words\n    import torch\n")))


def test_no_module_is_named_like_a_private_one():
    assert [] == [str(path) for path in MODULES if path.name.startswith("_") and not path.name.startswith("__")]


def test_the_top_of_bench_holds_two_modules_beside_its_tests():
    top = {path.name for path in MODULES if path.parent == Path("bench") and not path.name.startswith("test_")}

    assert top == AT_THE_TOP
