"""The page of the architectures, made from their table."""

from collections.abc import Iterator

from compression.architectures.anatomy import Architecture
from compression.architectures.random_shapes import SHAPES
from compression.architectures.table import ARCHITECTURES
from generator.markdown import page, table


def architectures_page() -> str:
    """Every architecture: what its blocks are made of, its `random:` shapes, and what cannot be done to it."""
    lines = [
        [f"`{row.name}`", ", ".join(_anatomy(row)) or "that of Llama", ", ".join(_shapes(row.name)),
         "; ".join(_refused(row)) or "nothing"]
        for row in ARCHITECTURES.values()
    ]  # fmt: skip
    return page(
        "Architectures",
        "Checkpoints of these classes of transformers can be a base, as a folder or from the hub. Every method runs on "
        "each of them, but for what the last column names: that is refused with the reason before any work. "
        "[Add an architecture](../extend/an-architecture.md) tells what a row is.",
        "Fused layers and experts are opened apart: `self_attn.qkv_proj.q_proj` is a layer of its own to methods, "
        "reports and patterns of recipes. What is saved is fused again.",
        table(["architecture", "anatomy", "`random:` shapes", "refused"], lines),
    )


def _shapes(name: str) -> Iterator[str]:
    for shape, config in SHAPES.items():
        if name in config["architectures"]:
            yield f"`{shape}`"


def _anatomy(row: Architecture) -> Iterator[str]:
    halves = (*row.attentions, *row.mlps)
    if row.norm_kind == "layer":
        yield "layer norms"
    if row.norm_offset:
        yield f"norms of {row.norm_offset:g} + weight"
    if any(half.after for half in halves):
        yield "norms behind attention and MLP" + ("" if all(half.norm for half in halves) else ", none before")
    if row.query_norm:
        yield "norms of queries and keys"
    if row.fused:
        yield "fused " + " and ".join(f"`{each.path.rpartition('.')[2]}`" for each in row.fused)
    if any(half.latents for half in halves):
        yield "multi-head latent attention"
    if any(half.gate is None for half in row.mlps):
        yield "MLP without a gate"
    if any(half.experts for half in row.mlps):
        shared = any(half.experts and half.experts.shared for half in row.mlps)
        yield "mixture of experts" + (", one of them shared" if shared else "")
    if row.parallel:
        yield f"attention beside the MLP where `{row.parallel}`"
    if row.residual_scale or row.logits_divisor:
        yield "scaled residuals and logits"
    if row.logits_cap:
        yield f"capped logits where `{row.logits_cap}`"
    if row.rotary is None:
        yield "learned positions"


def _refused(row: Architecture) -> Iterator[str]:
    halves = (*row.attentions, *row.mlps)
    if row.unturned:
        yield f"`slicegpt`, `quarot` and `spinquant`: {row.unturned}"
    elif any(half.experts for half in halves):
        yield "`slicegpt`: experts put out as many channels as they read"
    for what, some in (("heads (`structured`)", row.attentions), ("neurons (`p`)", row.mlps)):
        if reason := next((half.uncut for half in some if half.uncut), None):
            yield f"cutting {what}: {reason}"
    if any(half.latents for half in halves):
        yield "`kvquant`, `kv_int`, `kv_fp8`, `kivi`: its cache holds a latent"
    if row.embeddings_scaled:
        yield "`embeddings=8`: they are scaled"
    if row.logits_cap:
        yield "training with capped logits"
    if row.stacked_experts:
        yield "`--format gptq` and `awq`: its checkpoints hold all experts in one tensor"
    for key, value in row.required.items():
        yield f"`{key}` other than `{value[1:] if isinstance(value, str) and value.startswith('=') else value}`"
