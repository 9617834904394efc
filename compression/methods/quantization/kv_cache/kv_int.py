"""Keys and values of the cache in 8 to 2 bits, by token or, of keys, by channel.

The plain quantizer of a cache, as LLM engines have it: each token and head, or each group of its channels, has a scale
and a minimum (asymmetric rounding to nearest). It is packed where transformers keeps its cache, and the newest and the
first tokens stay in the dtype of the model, if so asked. Keys are stored behind RoPE; no text is read.
Limits: the cache is unpacked for every token, in plain torch; no kernel multiplies packed keys. Sliding windows are
kept by masks alone, so that tokens beyond them stay in memory.
"""

from typing import TYPE_CHECKING, Literal

from compression import caches, numeric
from compression.methods.cached import CacheMethod, method

if TYPE_CHECKING:
    from compression.caches.policy import Policy


@method("kv_int", takes=("dense", "packed", "sparse"), leaves=None)
class KVInt(CacheMethod):
    """Keys and values of the cache in integers of few bits, packed, by token or by channel."""

    bits: Literal[2, 3, 4, 8] = 8  # of a key or value, scales and minima aside
    group_size: int = -1  # channels of a token and head that share a scale; -1: all of them
    keys: Literal["token", "channel"] = "token"  # by channel, `tokens` of them share a scale
    tokens: int = 32  # in a group of keys by channel
    residual: int = 0  # newest tokens that stay as they are; 0: a query sees its own key quantized too
    keep_first: int = 0  # tokens at the start of a sequence that stay as they are

    @property
    def policy(self) -> "Policy":
        by_token = numeric.cache_grids.IntGrid(bits=self.bits, group_size=self.group_size)
        by_channel = numeric.cache_grids.IntGrid(bits=self.bits, by="channel", group_size=self.tokens)
        return caches.policy.Policy(
            keys=by_channel if self.keys == "channel" else by_token, values=by_token, residual=self.residual,
            keep_first=self.keep_first,
        )  # fmt: skip
