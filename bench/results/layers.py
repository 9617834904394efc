"""The result of each layer under a recipe: a record beside the rows, for the report.

A journal has a `layers` record for each recipe that a run compressed: what was executed and the seconds of each step,
what has to be known of it (`notes`, sentences), how many layers have which kernel, and for each layer of the compressed
model's report its stored bits and its error.
"""

import re
from typing import TYPE_CHECKING, Any

from compression import checkpoints

if TYPE_CHECKING:
    from torch import nn

    from compression import Compressed

_SAID = re.compile(r"\b(output|weight) error ([0-9.e+-]+)")


def describe(compressed: "Compressed", base: "nn.Module") -> dict[str, Any]:
    """`executed`, `seconds`, `kernels`, `notes` and `layers` of a compressed model, ready for JSON.

    A layer has `name`, `outcome` and `detail` as in the report (the details of several steps joined); `bits`, stored
    bits for each weight that the base's layer has, None for what is no single layer; `error`, a share, and `of`, what
    it is the error of: that which the method reports, the last one, else the change of the weight |W' - W| / |W|, as
    pruners report it. None where neither is known: the shape changed, layers were removed, or the weight is scaled,
    which no difference of weights would say anything about.
    """
    said: dict[str, list[Any]] = {}
    for entry in compressed.report:
        said.setdefault(entry.name, []).append(entry)
    comparable = not any(entry.outcome == "removed" for entry in compressed.report) and all(
        entry.outcome == "kept" for entry in said.get("norms", ())
    )
    modules, before = dict(compressed.model.named_modules()), dict(base.named_modules())
    layers = []
    for name, entries in said.items():
        layer, old = modules.get(name), before.get(name)
        outcome = next((each.outcome for each in reversed(entries) if each.outcome != "kept"), "kept")
        detail = "; ".join(dict.fromkeys(each.detail for each in entries))
        error, of = _error(detail)
        if error is None and comparable and outcome != "kept":
            error, of = _change(layer, old), "weight"
        layers.append({
            "name": name, "outcome": outcome, "detail": detail, "bits": _bits(layer, old),
            "error": error, "of": None if error is None else of,
        })  # fmt: skip
    return {
        "executed": list(compressed.executed),
        "seconds": list(compressed.seconds),
        "kernels": compressed.kernels(),
        "notes": list(compressed.notes),
        "layers": layers,
    }


def _error(detail: str) -> tuple[float | None, str | None]:
    """The last error that a text tells.

    >>> _error("gptq(bits=3), kernel dequantize, output error 0.013 (nearest: 0.045)"), _error("nf4, kernel lut4")
    ((0.013, 'output'), (None, None))
    """
    found = _SAID.findall(detail)
    return (float(found[-1][1]), found[-1][0]) if found else (None, None)


def _bits(layer: Any, old: Any) -> float | None:
    weight = getattr(old, "weight", None)
    layer = getattr(layer, "table", layer)  # of packed embeddings, which are the head where the two are tied
    return None if layer is None or weight is None else 8 * checkpoints.size.stored_bytes(layer) / weight.numel()


def _change(layer: Any, old: Any) -> float | None:
    """|W' - W| / |W| of layers of one shape, by Frobenius norms; None for others and for a weight of zeros."""
    from torch import nn

    if layer is None or not isinstance(old, nn.Linear | nn.Embedding):
        return None
    layer = getattr(layer, "table", layer)
    dense = layer if isinstance(layer, nn.Linear | nn.Embedding) else layer.to_linear()
    weight, other = dense.weight.detach().float(), old.weight.detach().float()
    if weight.shape != other.shape or not (whole := float(other.norm())):
        return None
    return float((weight - other).norm()) / whole
