"""What vLLM makes of a dense checkpoint while it loads it (its option --quantization).

Source: vLLM 0.32, vllm.config.quantization. `fp8` has one scale to a weight, `fp8_per_channel` one to an output, both
with activations in FP8; `fp8_per_block` one to 128 x 128 weights; `mxfp8` and `mxfp4` one to 32 weights of a row.
`int8_per_channel_weight_only` is for the experts of mixtures alone. On a CPU vLLM 0.32 runs `fp8_per_channel` and
refuses the others. What vLLM takes but leaves every layer as it is by (as the last type, of a model without experts) is
refused by the engine's process, and so not measured under this name.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from compression.methods.base import OnLoadMethod, method

Type = Literal["fp8", "fp8_per_channel", "fp8_per_block", "mxfp8", "mxfp4", "int8_per_channel_weight_only"]


@method("vllm", leaves=None)
@dataclass(frozen=True, kw_only=True)
class VLLM(OnLoadMethod):
    """Have vLLM quantize the exported model while it loads it; measured with --runtime vllm."""

    engine: ClassVar[str] = "vllm"

    type: Type = "fp8"  # how vLLM calls what it makes

    @property
    def needs_gpu(self) -> bool:
        return self.type != "fp8_per_channel"

    @property
    def quantization(self) -> str:
        return self.type
