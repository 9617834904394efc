"""What a folder that is written block by block says of itself until it is finished."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compression.checkpoints.artefact import STATE
from compression.cost import Cost
from compression.errors import CheckpointError
from compression.files.sealed_folder import Seal, SealedFolder
from compression.files.strict_json import check_signature, exact_fields, whole_field
from compression.layers.report import LayerReport
from compression.layers.stored import check_all


def unfinished(folder: Path) -> int | None:
    """How many blocks are done in a folder that is not finished; None if it is no such folder.

    Raises:
        CheckpointError: its state is damaged.
    """
    found = SealedFolder.read(folder, SEAL)
    return None if found is None else State.of(found).done


def identity_of(folder: Path) -> dict[str, Any]:
    """What a folder that is not finished is made from, by name; empty if it is no such folder.

    Raises:
        CheckpointError: its state is damaged.
    """
    found = SealedFolder.read(folder, SEAL)
    return {} if found is None else found.identity


@dataclass
class State:
    """What an unfinished folder says of itself, beside which run it is of and which files count.

    Attributes:
        done: blocks that are finished.
        layers: how those that are not dense are stored.
        reports: of each step.
        cost: of what is done.
    """

    done: int = 0
    layers: dict[str, Any] = field(default_factory=dict)
    reports: list[list[LayerReport]] = field(default_factory=list)
    cost: Cost = field(default_factory=lambda: Cost(seconds=0.0, peak_bytes=0))

    @classmethod
    def of(cls, folder: SealedFolder) -> "State":
        """The state that is in a seal.

        Raises:
            CheckpointError: it says what cannot be.
        """
        try:
            table = exact_fields(folder.facts, {each.name for each in dataclasses.fields(cls)})
            reports = [[LayerReport.from_json(entry) for entry in report] for report in table["reports"]]
            if not isinstance(table["layers"], dict):
                raise TypeError("layers must be a table of names and values")
            check_all(table["layers"])
            return cls(
                whole_field(table, "done", 0, 2**31), table["layers"], reports, Cost.from_json(table["cost"])
            )  # fmt: skip
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise folder.damaged(error) from error


def _of_schema_1(folder: Path, table: dict[str, Any]) -> dict[str, Any]:
    """A state that names no schema is signed and laid out as today."""
    check_signature(table)
    return table


SEAL = Seal(
    STATE, CheckpointError, again="start again", other="repeat that command, or give another folder",
    earlier=_of_schema_1,
)  # fmt: skip
