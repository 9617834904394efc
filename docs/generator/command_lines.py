"""Pages made from the command lines: every option of every command, and the exit statuses."""

import argparse
import importlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from _pytest.config.argparsing import Parser

import compression.__main__ as compression_main
from bench import __main__ as bench_main
from bench.results.run_options import declare
from bench.session.exit_status import EXIT_STATUSES
from bench.session.plugin import MARKERS
from generator.markdown import page, plain, prose, table

VARIABLES = {
    "BENCH_DATA": "default of `--data`",
    "BENCH_JUDGE_KEY": "key of the judge's endpoint; read from the environment only, and written nowhere",
    "COMPRESSION_CACHE": "default of `--cache`; otherwise `compression-bench` in the user's cache folder",
    "COMPRESSION_NATIVE": "path of a compiled `lut4` kernel, or 0 to do without it",
    "COMPRESSION_TRANSFORMERS_PYTHON": "Python with transformers as an engine, unless the current one has it",
    "COMPRESSION_VLLM_PYTHON": "Python with vLLM, unless the current one has it",
    "COMPRESSION_LLAMA_CPP_LIBRARY": "shared library of llama.cpp (libllama) that you built; unset, that of xllamacpp",
    "COMPRESSION_LLAMA_CPP_PYTHON": "Python with xllamacpp, unless the current one has it",
    "CC": "C compiler for the `lut4` kernel",
    "OMP_NUM_THREADS": "threads of torch; part of the device's name in baselines",
}
SECTIONS = {  # heading: the first options of it, in the order in which they are declared
    "What is compressed and measured": "--model",
    "The gate and the results": "--gate",
    "Efficiency": "--batch-size",
    "Perplexity": "--protocol",
    "RAG": "--dataset-path",
    "Judging": "--judge-url",
    "Tasks": "--tasks",
}


def options_page() -> str:
    """The options of `pytest bench`, `python -m compression` and every `python -m bench` command."""
    commands = [_command(name, module) for name, (module, _) in bench_main.COMMANDS.items()]
    return page(
        "Options",
        "## pytest bench",
        "`pytest bench` takes every option of pytest, and these. A value can be given as `--option value` or "
        '`--option=value`. `pytest --help` lists them under "compression benchmarks".',
        "Select measurements with `-m`:",
        table(("Marker", "Measures"), [(f"`{name}`", what) for name, what in MARKERS.items()]),
        *_sections(),
        "## python -m compression",
        "`python -m compression RECIPE` writes a compressed model; `python -m compression list` lists the methods.",
        _options(parser_of(compression_main.main)._actions),
        "## python -m bench",
        "What is done with results after they were measured.",
        table(("Command", "Purpose"), [(f"`{name}`", what) for name, (_, what) in bench_main.COMMANDS.items()]),
        *commands,
        "## Environment variables",
        table(("Variable", "Purpose"), [(f"`{name}`", what) for name, what in VARIABLES.items()]),
    )


def _sections() -> Iterator[str]:
    """The options of the plugin, a section each."""
    parser = Parser(_ispytest=True)
    declare(parser)
    starts = {option: heading for heading, option in SECTIONS.items()}
    found: dict[str, list[tuple[str, str]]] = {}
    heading = ""
    for option in parser.getgroup("compression benchmarks").options:
        name, attributes = option.names()[0], option.attrs()
        heading = starts.get(name, heading)
        found.setdefault(heading, []).append(_row([name], attributes))
    for heading, rows in found.items():
        yield f"### {heading}"
        yield table(("Option", "Meaning"), rows)


def _row(names: Sequence[str], attributes: dict[str, Any]) -> tuple[str, str]:
    """One option, from the attributes of its argparse action."""
    value = attributes.get("metavar")
    if attributes.get("choices"):
        value = "|".join(map(str, attributes["choices"]))
    elif attributes.get("nargs") == 0 or not names[0].startswith("-"):
        value = None
    elif value is None:
        value = names[0].lstrip("-").replace("-", "_").upper()
    text, default = plain(str(attributes.get("help") or "").replace("%%", "%")), attributes.get("default")
    if isinstance(default, str | int | float | Path) and default is not False and "default" not in text:
        text += f"{'; ' if text else ''}default `{default}`"
    return f"`{', '.join(names)}{f' {value}' if value else ''}`", text


def _command(name: str, module: str) -> str:
    """One command of `python -m bench`, with those below it."""
    parser = parser_of(importlib.import_module(module).main)
    parts = [f"### bench {name}"]
    below = next((each for each in parser._actions if isinstance(each, argparse._SubParsersAction)), None)
    if below is None:
        return "\n\n".join([*parts, prose(parser.description), _options(parser._actions)])
    parts.append(prose(re.sub(r"(?m)^ {4}(\w[\w \[\]]*?) {2,}(?=\S)", r"- `\1`: ", parser.description or "")))
    for word, each in below.choices.items():
        parts += [f"#### bench {name} {word}", _options(each._actions)]
    return "\n\n".join(parts)


def _options(actions: Sequence[argparse.Action]) -> str:
    rows = [
        _row(action.option_strings or [str(action.metavar or action.dest)], vars(action))
        for action in actions
        if action.dest != "help"
    ]
    return table(("Option", "Meaning"), rows) if rows else "It has no options."


class _Caught(Exception):
    pass


def parser_of(main: Callable[..., object]) -> argparse.ArgumentParser:
    """The parser that a command makes for itself."""

    def catch(parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        raise _Caught(parser)

    with mock.patch.object(argparse.ArgumentParser, "parse_args", catch):
        try:
            main([])
        except _Caught as caught:
            return caught.args[0]  # type: ignore[no-any-return]
    raise RuntimeError(f"{main.__module__} parses no arguments")


def exit_status_page() -> str:
    """What the exit status of every command means."""
    rows = [(str(status), means.pytest, means.module) for status, means in EXIT_STATUSES.items()]
    return page(
        "Exit status",
        table(("Status", "`pytest bench`, `.ci/run`", "`python -m bench`, `python -m compression`"), rows),
        "`.ci/run` exits with the status of the first part that fails.",
    )
