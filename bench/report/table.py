"""A table of the report, whatever it is written as."""

from dataclasses import dataclass

from bench.report.cells import Cell
from compression.recipes.recipe import slug

NOT_MEASURED = "not measured"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line: a recipe, or a model that a paper reports (`source` names the paper)."""

    name: str
    recipe: str
    cells: tuple[Cell, ...]
    source: str | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table of one family, for one base and device.

    Attributes:
        number: E14 for table 14 of [E], O1 for table 1 of [O]; "as E14" in the form of that table, S1 one of our own.
        title: in words.
        family: one of FAMILIES.
        columns: heads with units.
        lines: the uncompressed base first; a paper's own figures follow ours where the base is the same.
        elsewhere: what the paper reports of another base, never to be mixed with the lines.
        notes: numbered from 1, what cells refer to.
        remarks: what concerns the whole table: conditions, what is left out, of which base `elsewhere` is.
        findings: what it says, in words.
        command: measures all of it.
    """

    number: str
    title: str
    family: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    elsewhere: tuple[Line, ...] = ()
    notes: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    findings: tuple[str, ...] = ()
    command: str = ""

    @property
    def name(self) -> str:
        """Tells it apart from all others; part of a file name or an anchor."""
        return slug(f"{self.number}-{self.family}".lower().replace(" ", "-"))
