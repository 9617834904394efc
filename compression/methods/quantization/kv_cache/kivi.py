"""KIVI: keys by channel in groups of tokens, values by token, and the newest tokens as they are.

Paper: arXiv 2402.02750, section 3.2 (keys have channels of outliers, values do not) and algorithm 1 (groups, residual).
Asymmetric rounding to nearest with a real minimum, as its public code has it. The paper's settings are 2 or 4 bits,
groups of 32 and a residual of 32 or 128; its prompt reads itself unquantized, and so it does here.
Departures: keys and values leave the residual together, a group of tokens at a time, so that it holds from `residual`
to `residual + group_size - 1` tokens; in the paper keys leave it all at once whenever it is full, and values one by
one. Groups of values do not cross heads.
Its claim, keys by channel before keys by token, holds on the reference at 4, 3 and 2 bits and on SmolLM2 at 4 and 3
(`python benchmarks/kv_cache.py`). The residual of 128 gains little on the reference at 2 bits.
Limits: as `kv_int`; keys are stored behind RoPE, as in the paper.
"""

from typing import TYPE_CHECKING, Literal

from compression import caches, numeric
from compression.methods.cached import CacheMethod, method

if TYPE_CHECKING:
    from compression.caches.policy import Policy


@method("kivi", takes=("dense", "packed", "sparse"), leaves=None, paper="arXiv:2402.02750")
class KIVI(CacheMethod):
    """Keys of the cache by channel, values by token, in few bits; the newest tokens as they are (KIVI)."""

    bits: Literal[2, 4] = 2  # of a key or value, scales and minima aside
    group_size: int = 32  # tokens in a group of keys, and channels in a group of values
    residual: int = 128  # newest tokens that stay as they are

    @property
    def policy(self) -> "Policy":
        grid = numeric.cache_grids.IntGrid
        return caches.policy.Policy(
            keys=grid(bits=self.bits, by="channel", group_size=self.group_size),
            values=grid(bits=self.bits, group_size=self.group_size), residual=self.residual,
        )  # fmt: skip
