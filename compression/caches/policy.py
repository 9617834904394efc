"""How the keys and values of a model are stored: on which grids, and which tokens stay as they are.

After n tokens of a sequence, those from `keep_first` to `stored_until(n)` are on the grids, and the others, the first
ones and at least the `residual` newest ones, are in the dtype of the model. A query sees what is stored once its own
token is there: with `residual=0` it sees its own key quantized too, with 1 that of its past alone. Keys and values move
together, as many at a time as a group by channel has: what is beyond `residual` and fills no group waits.
"""

from dataclasses import dataclass
from typing import Any

from compression.errors import LayerError
from compression.files.strict_json import exact_fields
from compression.numeric import cache_grids
from compression.numeric.cache_grids import Grid
from compression.numeric.checks import check_size


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What a cache stores.

    Attributes:
        keys: their grid; they are stored behind RoPE, as attention reads them.
        values: theirs.
        residual: newest tokens that stay as they are, at least; those that fill no group stay too.
        keep_first: tokens at the beginning of a sequence that stay as they are.
    """

    keys: Grid
    values: Grid
    residual: int = 0
    keep_first: int = 0

    def __post_init__(self) -> None:
        for name in ("residual", "keep_first"):
            check_size(name, getattr(self, name), least=0)
        sizes = {self.keys.tokens, self.values.tokens} - {1}
        if len(sizes) > 1:
            raise LayerError(f"keys in groups of {self.keys.tokens} tokens and values in groups of "
                             f"{self.values.tokens} cannot move together; give both one size")  # fmt: skip

    @property
    def block(self) -> int:
        """How many tokens move at a time."""
        return max(self.keys.tokens, self.values.tokens)

    @property
    def needs_alignment(self) -> bool:
        """Whether it matters where in its row a sequence begins."""
        return self.block > 1 or self.keep_first > 0

    def stored_until(self, tokens: int) -> int:
        """The first token behind those on the grids, of so many; no less than `keep_first`."""
        return self.keep_first + max(0, tokens - self.residual - self.keep_first) // self.block * self.block

    @property
    def words(self) -> str:
        kept = [f"the {self.residual} newest tokens" * bool(self.residual),
                f"the first {self.keep_first}" * bool(self.keep_first)]  # fmt: skip
        stay = " and ".join(filter(None, kept))
        return f"keys in {self.keys.words}, values in {self.values.words}" + (f", {stay} as they are" if stay else "")

    def to_json(self) -> dict[str, Any]:
        return {"keys": self.keys.to_json(), "values": self.values.to_json(), "residual": self.residual,
                "keep_first": self.keep_first}  # fmt: skip

    @staticmethod
    def from_json(entry: Any) -> "Policy":
        """Raises LayerError: it is none."""
        try:
            fields = exact_fields(entry, {"keys", "values", "residual", "keep_first"})
        except ValueError as error:
            raise LayerError(f"a cache policy cannot be: {error}") from None
        return Policy(
            keys=cache_grids.from_json(fields["keys"]), values=cache_grids.from_json(fields["values"]),
            residual=fields["residual"], keep_first=fields["keep_first"],
        )  # fmt: skip
