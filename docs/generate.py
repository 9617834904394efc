"""Write the pages of docs/reference/ that are made from the code.

python docs/generate.py            # write them
python docs/generate.py --check    # change nothing; status 1 where a page is out of date
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from generator import api, architectures, command_lines, picture, registries

DOCS = Path(__file__).parent
MADE: dict[str, Callable[[], str]] = {
    "reference/options.md": command_lines.options_page,
    "reference/methods.md": registries.methods_page,
    "reference/metrics.md": registries.metrics_page,
    "reference/architectures.md": architectures.architectures_page,
    "reference/python.md": api.python_page,
    "reference/exit-status.md": command_lines.exit_status_page,
    "images/methods.svg": picture.drawn,
}


def main() -> None:
    """Write or check all generated files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 where a page is out of date")
    check = parser.parse_args().check
    outdated = []
    for name, make in MADE.items():
        path, text = DOCS / name, make()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            outdated.append(path)
            if not check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
    for path in outdated:
        print(f"{path}: {'out of date; run python docs/generate.py' if check else 'written'}")
    sys.exit(bool(outdated) and check)


if __name__ == "__main__":
    main()
