"""Keys and values of the cache in FP8 (E4M3).

As vLLM's `kv_cache_dtype=fp8`, which by default has no scales, and cuts off what is beyond 448. A scale of each token
and head, or of each token, needs no calibration text, and is stored in 16 bits.
Departures: no scales of whole tensors or heads found on text, as llm-compressor stores them in checkpoints.
Limits: as `kv_int`; values are given back to attention in the dtype of the model, and no FP8 product is used.
"""

from typing import TYPE_CHECKING, Literal

from compression import caches, numeric
from compression.methods.cached import CacheMethod, method

if TYPE_CHECKING:
    from compression.caches.policy import Policy


@method("kv_fp8", takes=("dense", "packed", "sparse"), leaves=None)
class KVFp8(CacheMethod):
    """Keys and values of the cache in FP8, with a scale to each token and head, to each token, or without."""

    scales: Literal["head", "token", "unit"] = "head"  # what has a scale of its own
    residual: int = 0  # newest tokens that stay as they are; 0: a query sees its own key quantized too
    keep_first: int = 0  # tokens at the start of a sequence that stay as they are

    @property
    def policy(self) -> "Policy":
        grid = numeric.cache_grids.Float8Grid(by=self.scales)
        return caches.policy.Policy(keys=grid, values=grid, residual=self.residual, keep_first=self.keep_first)
