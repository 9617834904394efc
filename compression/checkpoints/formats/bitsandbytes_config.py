"""What config.json says of a checkpoint that bitsandbytes quantized, as transformers writes it. Needs no torch.

Source: transformers 5.23, `BitsAndBytesConfig`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compression.errors import CheckpointError

METHOD = "bitsandbytes"
DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True, kw_only=True)
class BitsAndBytes:
    """How linear layers are stored; which of them are quantized, their tensors tell.

    Attributes:
        bits: 4 (NF4) or 8 (LLM.int8()).
        double_quant: whether the scales of NF4 are themselves in 8 bits.
        threshold: from which a feature is an outlier of LLM.int8().
        recipe: what a checkpoint of our own says that it was made by: a recipe in JSON.
    """

    bits: int
    double_quant: bool = False
    threshold: float = 6.0
    recipe: Any = None
    quant_method: str = METHOD


def parse(fields: Mapping[str, Any], where: str) -> BitsAndBytes:
    """What a `quantization_config` says.

    Raises:
        CheckpointError: it is of a kind that is not read, or says nothing.
    """
    four, eight = (fields.get(f"load_in_{bits}bit", fields.get(f"_load_in_{bits}bit", False)) for bits in (4, 8))
    if type(four) is not bool or type(eight) is not bool or four == eight:
        raise CheckpointError(f"{where}: one of load_in_4bit and load_in_8bit must be true, not {four!r} and {eight!r}")
    meta = fields.get("meta")
    recipe = meta.get("recipe") if isinstance(meta, Mapping) else None
    if eight:
        threshold = fields.get("llm_int8_threshold", 6.0)
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 < threshold < float("inf"):
            raise CheckpointError(f"{where}: llm_int8_threshold={threshold!r:.80} must be a finite number above 0")
        return BitsAndBytes(bits=8, threshold=float(threshold), recipe=recipe)
    if (kind := fields.get("bnb_4bit_quant_type", "fp4")) != "nf4":
        raise CheckpointError(f"{where}: bnb_4bit_quant_type={kind!r:.80} is not read; it must be nf4")
    if (storage := fields.get("bnb_4bit_quant_storage", "uint8")) != "uint8":
        raise CheckpointError(f"{where}: bnb_4bit_quant_storage={storage!r:.80} is not read; it must be uint8")
    double = fields.get("bnb_4bit_use_double_quant", False)
    if type(double) is not bool:
        raise CheckpointError(f"{where}: bnb_4bit_use_double_quant={double!r:.80} must be true or false")
    return BitsAndBytes(bits=4, double_quant=double, recipe=recipe)
