"""Cost of compression: time, peak memory, calibration tokens, trained parameters."""

from typing import TYPE_CHECKING

from bench.metrics.registry import metric

if TYPE_CHECKING:
    from compression.cost import Cost


@metric("efficiency.compression_seconds", unit="s", better="lower", kind="timing", of="cost",
        rel=0.5, rel_absolute=1.0, floor=2.0)  # fmt: skip
def compression_seconds(cost: "Cost") -> float:
    """Wall time of the method itself; opening the base is not counted."""
    return cost.seconds


@metric("efficiency.compression_peak_mb", unit="MiB", better="lower", kind="memory", of="cost",
        rel=0.25, rel_absolute=0.5, floor=64.0)  # fmt: skip
def compression_peak_mb(cost: "Cost") -> float:
    """How far memory rose while compressing; MetricError where the system does not tell."""
    return cost.peak_bytes / 2**20 if cost.peak_bytes is not None else float("nan")


@metric("efficiency.calibration_tokens", unit="tokens", better="neither", kind="counted", of="cost")
def calibration_tokens(cost: "Cost") -> float:
    """Tokens of calibration text that the method read."""
    return cost.calibration_tokens


@metric("efficiency.trained_parameters", unit="weights", better="neither", kind="counted", of="cost")
def trained_parameters(cost: "Cost") -> float:
    """The most weights that a step trained, those of adapters included; 0 where nothing was ([E] table 19)."""
    return cost.trained_parameters
