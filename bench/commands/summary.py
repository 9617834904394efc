"""`python -m bench summary`: the last run of a journal as a Markdown table."""

import argparse
from collections.abc import Sequence

from bench.commands.arguments import journal_option
from bench.errors import JournalError
from bench.report.escaping import code, markdown
from bench.results.bases import told_apart
from bench.results.journal import read
from bench.session.summary import table


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the last run of a journal as a Markdown table: `python -m bench summary`."""
    parser = argparse.ArgumentParser(prog="python -m bench summary", description=main.__doc__.split(":")[0])
    journal_option(parser)
    parser.add_argument("--metrics", help="names without their group, separated by commas; default all")
    options = parser.parse_args(arguments)
    try:
        rows = told_apart(read(options.journal)).rows_of()
    except JournalError as error:
        parser.error(str(error))
    if options.metrics:
        wanted = options.metrics.split(",")
        rows = [row for row in rows if row.metric.partition(".")[2] in wanted]
        if not rows:
            parser.error(f"--metrics {options.metrics}: the last run has none of these")
        rows.sort(key=lambda row: wanted.index(row.metric.partition(".")[2]))
    frame = table(rows, {})
    conditions = dict.fromkeys(row.key.partition("[")[2].rstrip("]") for row in rows if row.params)
    if len({row.metric for row in rows}) == len(frame):  # one load: said once instead of in every line
        frame.index = list(dict.fromkeys(f"{row.metric} ({row.unit})" for row in rows))
    frame = frame.map(markdown).rename(index=markdown, columns=markdown)
    print(f"Base {code(rows[0].base)} on {code(rows[0].device)}; {markdown('; '.join(conditions))}.\n")
    print(frame.to_markdown(disable_numparse=True))
