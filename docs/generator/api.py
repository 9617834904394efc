"""The page of the Python interface: every public name with its signature and docstring, read from the source."""

import ast
import importlib
import inspect
import textwrap
from collections.abc import Iterator

from generator.markdown import joined, page, prose

MODULES = ("compression", "bench.metrics")


def python_page() -> str:
    """What `__all__` of the public modules names."""
    parts = []
    for name in MODULES:
        module = importlib.import_module(name)
        parts += [f"## {name}", prose(inspect.getdoc(module))]
        parts += [_entry(each, getattr(module, each)) for each in sorted(module.__all__, key=str.casefold)]
    return page(
        "Python",
        "Names that are not on this page are private: they may change without notice.",
        *parts,
    )


def _entry(name: str, value: object) -> str:
    if inspect.isclass(value):
        return joined([f"### {name}", *_class(name, value)])
    if inspect.isfunction(inspect.unwrap(value)):  # type: ignore[arg-type]
        return joined([f"### {name}", *_function(_node(value))])
    return f"### {name}\n\n{prose(inspect.getdoc(value))}"


def _node(value: object) -> ast.ClassDef | ast.FunctionDef:
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(value)))  # type: ignore[arg-type]
    return ast.parse(source).body[0]  # type: ignore[return-value]


def _class(name: str, cls: type) -> Iterator[str]:
    node = _node(cls)
    bases = [each.__name__ for each in cls.__bases__ if each is not object]
    yield f"```python\nclass {name}{f'({chr(44).join(bases)})' if bases else ''}\n```".replace(",", ", ")
    yield prose(ast.get_docstring(node))
    fields = [each for each in node.body if isinstance(each, ast.AnnAssign) and "ClassVar" not in ast.unparse(each)]
    if fields:
        yield "```python\n" + "\n".join(map(ast.unparse, fields)) + "\n```"
    for each in node.body:
        if isinstance(each, ast.FunctionDef) and not each.name.startswith("_"):
            yield f"#### {name}.{each.name}"
            yield from _function(each)


def _function(node: ast.ClassDef | ast.FunctionDef) -> Iterator[str]:
    assert isinstance(node, ast.FunctionDef)
    marks = [ast.unparse(each) for each in node.decorator_list]
    kept = [f"@{mark}" for mark in marks if mark in ("property", "classmethod", "staticmethod")]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    yield "```python\n" + "\n".join([*kept, f"def {node.name}({_arguments(node)}){returns}"]) + "\n```"
    yield prose(ast.get_docstring(node))


def _arguments(node: ast.FunctionDef) -> str:
    """The parameters, one to a line where they are long."""
    text = ast.unparse(node.args)
    if len(text) < 80:
        return text
    lines, depth, start = [], 0, 0
    for at, letter in enumerate(text):
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            lines.append(text[start:at].strip())
            start = at + 1
    return "\n    " + ",\n    ".join([*lines, text[start:].strip()]) + ",\n"
