"""One row per decoder architecture: where its blocks, norms and linear layers are, and what reads and writes what.

Nothing else in the package spells the name of a module. A row is data: capture, edits, methods, streaming and the
decode step of the benchmarks all read it, and a new architecture of the same anatomy is a new row. Imports no torch.

The anatomy: token embeddings write the residual stream; each block reads it twice, in two *halves*

    x + writer(between(readers(norm(x))))        attention, then the MLP

and the head reads what the last norm leaves. What lies between readers and writer (attention, the activated gate)
passes a factor of each *producer* channel on to the writer's inputs unchanged, which is what makes `Site`s.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from compression.errors import CheckpointError

NORMS = "norms"  # all of them, where reports name parts of a model


@dataclass(frozen=True)
class SiteRow:
    """A producer of activations and the linear layers of a block that read exactly these, by their path in the block.

    Channel c of the producer, divided by a number, reaches the readers divided by that number.

    Attributes:
        producer: a norm, or a linear layer.
        readers: linear layers; they all read the same input.
        of: "norm", "values" (grouped heads share a channel) or "neurons" (gated by another linear of as many outputs).
    """

    producer: str
    readers: tuple[str, ...]
    of: Literal["norm", "values", "neurons"]


@dataclass(frozen=True)
class Half:
    """One half of a block, x + writer(between(readers(norm(x)))), by paths in the block.

    Attributes:
        name: "attention" or "mlp".
        module: what holds readers and writer.
        norm: reads the residual stream.
        readers: linear layers that read the norm.
        producer: the reader whose output channels the writer's inputs are multiples of.
        writer: the linear layer that writes the residual stream.
    """

    name: Literal["attention", "mlp"]
    module: str
    norm: str
    readers: tuple[str, ...]
    producer: str
    writer: str

    @property
    def sites(self) -> tuple[SiteRow, SiteRow]:
        of: Literal["values", "neurons"] = "values" if self.name == "attention" else "neurons"
        return SiteRow(self.norm, self.readers, "norm"), SiteRow(self.producer, (self.writer,), of)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder: paths in the model, then paths in a block.

    Attributes:
        name: transformers' class, as config.json names it under `architectures`.
        model_type: as config.json has it.
        embeddings, blocks, norm, head, rotary: paths in the model.
        queries, keys, values: linear layers of a block.
        query_norm, key_norm: norms of each head of queries and keys in front of RoPE; None without.
        gate: the linear layer of the MLP whose activated output multiplies the producer.
        halves: attention, then the MLP.
        norm_kind: the function of all norms, "rms": x / sqrt(mean x^2 + epsilon) * (weight + norm_offset).
        norm_offset: what is added to the stored weight of a norm.
        epsilon, config_epsilon: what a norm calls its epsilon, and what the configuration calls it.
        biases: linear layers of a block that have one: always, or where the configuration says so under that name.
        fused: linear layers of a published checkpoint that hold several of the row's, and these in their order.
    """

    name: str
    model_type: str
    embeddings: str = "model.embed_tokens"
    blocks: str = "model.layers"
    norm: str = "model.norm"
    head: str = "lm_head"
    rotary: str = "model.rotary_emb"
    queries: str = "self_attn.q_proj"
    keys: str = "self_attn.k_proj"
    values: str = "self_attn.v_proj"
    query_norm: str | None = None
    key_norm: str | None = None
    gate: str = "mlp.gate_proj"
    halves: tuple[Half, Half] = (
        Half(
            "attention", "self_attn", "input_layernorm",
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.v_proj", "self_attn.o_proj",
        ),
        Half(
            "mlp", "mlp", "post_attention_layernorm",
            ("mlp.gate_proj", "mlp.up_proj"), "mlp.up_proj", "mlp.down_proj",
        ),
    )  # fmt: skip
    norm_kind: Literal["rms"] = "rms"
    norm_offset: float = 0.0
    epsilon: str = "variance_epsilon"
    config_epsilon: str = "rms_norm_eps"
    biases: Mapping[str, bool | str] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def attention(self) -> Half:
        return self.halves[0]

    @property
    def mlp(self) -> Half:
        return self.halves[1]

    @property
    def sites(self) -> tuple[SiteRow, ...]:
        """All sites of a block, in the order of computation."""
        return tuple(site for half in self.halves for site in half.sites)

    def block(self, number: int) -> str:
        """The path of a block in the model."""
        return f"{self.blocks}.{number}"

    def inside(self, name: str) -> bool:
        """Whether a module or a tensor of that full name is in a block."""
        return name.startswith(f"{self.blocks}.")

    @property
    def embeddings_weight(self) -> str:
        return f"{self.embeddings}.weight"

    @property
    def head_weight(self) -> str:
        return f"{self.head}.weight"

    @property
    def around(self) -> tuple[str, str, str]:
        """What reports call the parts of the model outside its blocks, and the norms."""
        return self.embeddings, self.head, NORMS


_PLAIN = Architecture(name="MistralForCausalLM", model_type="mistral")
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_ATTENTION_BIAS = dict.fromkeys((*_QKV, "self_attn.o_proj"), "attention_bias")
_MLP_BIAS = dict.fromkeys(("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), "mlp_bias")
_HEAD_NORMS = {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}

ARCHITECTURES: dict[str, Architecture] = {
    row.name: row
    for row in (
        replace(_PLAIN, name="LlamaForCausalLM", model_type="llama", biases=_ATTENTION_BIAS | _MLP_BIAS),
        _PLAIN,
        replace(_PLAIN, name="Qwen2ForCausalLM", model_type="qwen2", biases=dict.fromkeys(_QKV, True)),
        replace(_PLAIN, name="Qwen3ForCausalLM", model_type="qwen3", biases=_ATTENTION_BIAS, **_HEAD_NORMS),
    )
}


def architecture_of(model: Any) -> Architecture:
    """The row of a model of transformers.

    Raises:
        CheckpointError: it has none.
    """
    return named(type(model).__name__)


def named(name: object, where: str = "the model") -> Architecture:
    """The row of an architecture by its name in config.json.

    Raises:
        CheckpointError: it has none; the message names those that have.
    """
    row = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if row is None:
        raise CheckpointError(
            f"{where}: architecture {name!r:.200} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    return row
