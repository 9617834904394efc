"""Escaping of untrusted text: one function per kind of output, used by everything that writes it.

What comes from outside is every name (of a base's folder, a recipe's layers, a task, a file, a device) and every reason
that an error gave. None of it may end a cell, a line or an element, become markup, or be computed by a spreadsheet. For
terminals and logs there is `compression.files.terminal`.
"""

import html as _html
import json
import re
import shlex
from typing import Any

from compression.files.terminal import HIDDEN, printable, terminal

__all__ = [
    "code", "csv_cell", "html", "json_in_html", "latex", "markdown", "printable", "shell", "terminal", "words_of",
]  # fmt: skip

_LATEX = {"\\": r"\textbackslash{}", "→": r"$\rightarrow$", "±": r"$\pm$", "~": r"\textasciitilde{}",
          "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
          "`": r"\textasciigrave{}"} | {sign: "\\" + sign for sign in "&%$#_{}"}  # fmt: skip
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\N{FULLWIDTH EQUALS SIGN}", "\N{FULLWIDTH PLUS SIGN}",
            "\N{FULLWIDTH HYPHEN-MINUS}", "\N{FULLWIDTH COMMERCIAL AT}")  # fmt: skip


def line(text: object) -> str:
    """Text in one printable line, white space as single spaces."""
    return printable(" ".join(str(text).split()))


def markdown(text: object) -> str:
    """Text as Markdown shows it, in a line or a cell: no emphasis, code, link, element, heading; nobody is named.

    >>> markdown("a | *b* <i> [c](d)")
    'a \\\\| \\\\*b\\\\* &lt;i> [c]\\\\(d)'
    """
    shown = re.sub(r"[\\|*`]", r"\\\g<0>", line(text))
    shown = re.sub(r"&(?=#?\w+;)", "&amp;", shown).replace("<", "&lt;")
    shown = re.sub(r"\](?=[(\[])", r"]\\", shown)
    shown = re.sub(r"(?<!\w)@(?=\w)", "@\u200b", shown)
    return re.sub(r"^(?=[#>]|\[[^\]]*\]:)", r"\\", shown)


def code(text: object) -> str:
    """Text as code in a line of Markdown, whatever backticks it has.

    >>> code("pytest bench"), code("a`b")
    ('`pytest bench`', '``a`b``')
    """
    shown = line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    room = " " if not shown or shown[0] == "`" or shown[-1] == "`" else ""
    return fence + room + shown + room + fence


def latex(text: object) -> str:
    r"""Text as LaTeX shows it; hyphens as they are, and nothing that `\\` before it would take for its argument.

    >>> print(latex("50 % of $x_1$"))
    50 \% of \$x\_1\$
    """
    escaped = "".join(_LATEX.get(letter, letter) for letter in line(text)).replace("--", "-{}-")
    return "{}" + escaped if escaped.startswith(("[", "*")) else escaped


def html(text: object) -> str:
    """Text in an element or a quoted attribute of HTML or SVG.

    >>> html("<b title='x'>")
    '&lt;b title=&#x27;x&#x27;&gt;'
    """
    return _html.escape(printable(text))


def json_in_html(data: Any) -> str:
    """JSON that no text within can end the `<script>` of."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    text = HIDDEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def csv_cell(value: Any) -> Any:
    """A cell that no spreadsheet computes: a text that begins as a formula does gets an apostrophe before it.

    >>> csv_cell("=1+1"), csv_cell(-1.5)
    ("'=1+1", -1.5)
    """
    return "'" + value if isinstance(value, str) and value.lstrip(" ").startswith(_FORMULA) else value


def shell(words: list[str]) -> str:
    r"""A command in one printable line, without backticks, that runs as it is shown.

    >>> print(shell(["echo", "my model", "a`b"]))
    echo 'my model' $'a\x60b'
    """
    return " ".join(map(_word, words))


def words_of(command: str) -> list[str]:
    r"""The words of a command that `shell` made. Raises ValueError for one whose quotation does not end.

    >>> words_of(r"echo 'my model' $'a\x60b'")
    ['echo', 'my model', 'a`b']
    """
    plain = re.sub(r"(?<!\S)\$'((?:[^'\\]|\\.)*)'(?!\S)", lambda found: shlex.quote(_decoded(found[1])), command)
    return shlex.split(plain)


def _decoded(text: str) -> str:
    """What bash reads between $' and '."""
    letters = re.sub(
        rb"\\(x[0-9a-f]{2}|.)",
        lambda found: bytes.fromhex(found[1][1:].decode()) if len(found[1]) == 3 else found[1],
        text.encode("utf-8", "surrogateescape"),
    )
    return letters.decode("utf-8", "surrogateescape")


def _word(word: str) -> str:
    if printable(word) == word and "`" not in word:
        return shlex.quote(word)
    escaped = word.replace("\\", "\\\\").replace("'", "\\'").replace("`", "\\x60")
    return "$'" + re.sub(r"[^ -~]", _ansi_c, escaped) + "'"


def _ansi_c(found: re.Match[str]) -> str:
    """A character as bash's $'...' has it: the bytes that it is in a file's name."""
    letter = found[0]
    return letter if printable(letter) == letter else "".join(f"\\x{byte:02x}" for byte in _bytes(letter))


def _bytes(letter: str) -> bytes:
    return letter.encode("utf-8", "surrogateescape" if "\udc80" <= letter <= "\udcff" else "surrogatepass")
