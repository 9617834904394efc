"""What a decoder is made of, as data: halves of a block, what reads and writes what, experts, fused layers.

    x + after(writer(between(readers(norm(x)))))        attention, then the MLP

What lies between readers and writer (attention, the activated gate) passes a factor of each *producer* channel on to
the writer's inputs unchanged, which is what makes `SiteRow`s. Imports no torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

NORMS = "norms"  # all of them, where reports name parts of a model

Kind = Literal["norm", "stream", "latent", "values", "neurons"]


@dataclass(frozen=True)
class SiteRow:
    """A producer of activations and the linear layers of a block that read exactly these, by their path in the block.

    Channel c of the producer, divided by a number, reaches the readers divided by that number.

    Attributes:
        producer: a norm, or a linear layer; None where the readers read the residual stream as it is.
        readers: linear layers; they all read what the producer makes.
        of: "norm", "stream" (no producer), "latent" (a norm inside of attention), "values" (grouped heads share a
            channel) or "neurons".
        stacks: the readers by what reaches them at run time: experts see the tokens that are routed to them.
        routers: what reads it too, and decides by it: edits make up for themselves there, methods leave it alone.
        gate: the linear layer whose activated output multiplies the producer's; None without.
        fixed: why its channels cannot be divided; None where they can.
        unshifted: why values cannot be shifted; None where they can.
    """

    producer: str | None
    readers: tuple[str, ...]
    of: Kind
    stacks: tuple[tuple[str, ...], ...] = ()
    routers: tuple[str, ...] = ()
    gate: str | None = None
    fixed: str | None = None
    unshifted: str | None = None

    def __post_init__(self) -> None:
        if not self.stacks:
            object.__setattr__(self, "stacks", (self.readers,))


@dataclass(frozen=True)
class ExpertsRow:
    """A mixture of experts in the place of an MLP, by paths in the block.

    Attributes:
        path: the experts, each an MLP under its number.
        router: what sends tokens to them.
        shared: an MLP that all tokens pass; None without.
        shared_gate: what scales the output of `shared` for each token; None without.
        count: experts of this block; 0 in the table.
    """

    path: str = "mlp.experts"
    router: str = "mlp.gate"
    shared: str | None = None
    shared_gate: str | None = None
    count: int = 0

    @property
    def mlps(self) -> tuple[str, ...]:
        """Paths of all MLPs, the shared one the last."""
        routed = tuple(f"{self.path}.{number}" for number in range(self.count))
        return routed if self.shared is None else (*routed, self.shared)


@dataclass(frozen=True, kw_only=True)
class Half:
    """One half of a block, x + after(writer(between(readers(norm(x))))), by paths in the block.

    Attributes:
        name: "attention" or "mlp".
        module: what holds readers and writer.
        norm: reads the residual stream; None where the readers do.
        after: a norm behind the writer; None without.
        readers: linear layers that read the norm.
        producer: the linear layer whose output channels the writer's inputs are multiples of.
        writer: the linear layer that writes the residual stream; of experts the first one.
        gate: the linear layer whose activated output multiplies the producer's; None without.
        queries, keys: of attention; no keys where they are not made by a layer of their own.
        latents: sites inside of attention: a norm, and the layers that read it.
        head_size: what the module of attention calls the size of a head of values.
        experts: of a mixture; readers, producer and writer are those of an expert then, by paths in it.
        fixed: why channels of the producer cannot be divided; None where they can.
        unshifted: why values cannot be shifted; None where they can.
        uncut: why heads or neurons cannot be taken out; None where they can.
    """

    name: Literal["attention", "mlp"]
    module: str
    norm: str | None
    readers: tuple[str, ...]
    producer: str
    writer: str
    after: str | None = None
    gate: str | None = None
    queries: str | None = None
    keys: str | None = None
    latents: tuple[SiteRow, ...] = ()
    head_size: str = "head_dim"
    experts: ExpertsRow | None = None
    fixed: str | None = None
    unshifted: str | None = None
    uncut: str | None = None

    @property
    def writers(self) -> tuple[str, ...]:
        """Linear layers whose outputs add up to what the half puts out."""
        return (self.writer,) if self.experts is None else tuple(f"{mlp}.{self.writer}" for mlp in self.experts.mlps)

    @property
    def site(self) -> SiteRow:
        """That of the norm."""
        of: Kind = "stream" if self.norm is None else "norm"
        fixed = "it reads the residual stream itself" if self.norm is None else None
        if self.experts is None:
            return SiteRow(self.norm, self.readers, of, fixed=fixed)
        stacks = tuple(tuple(f"{mlp}.{path}" for path in self.readers) for mlp in self.experts.mlps)
        routers = tuple(filter(None, (self.experts.router, self.experts.shared_gate)))
        return SiteRow(self.norm, sum(stacks, ()), of, stacks, routers, fixed=fixed)

    @property
    def inner(self) -> tuple[SiteRow, ...]:
        """Sites between readers and writers."""
        of: Kind = "values" if self.name == "attention" else "neurons"
        if self.experts is None:
            return *self.latents, SiteRow(self.producer, (self.writer,), of, gate=self.gate, fixed=self.fixed,
                                          unshifted=self.unshifted)  # fmt: skip
        return tuple(
            SiteRow(
                f"{mlp}.{self.producer}", (f"{mlp}.{self.writer}",), of, gate=f"{mlp}.{self.gate}", fixed=self.fixed
            )
            for mlp in self.experts.mlps
        )


@dataclass(frozen=True)
class FusedRow:
    """A linear layer of transformers that holds several, which are opened apart: `path.name` for each of `names`.

    Attributes:
        path: in the block.
        names: of the parts, in their order.
        sizes: outputs of each part, of one head if `by_head`, from the configuration of transformers.
        by_head: whether the outputs are ordered by head, and within a head by part.
    """

    path: str
    names: tuple[str, ...]
    sizes: Callable[[Any], tuple[int, ...]]
    by_head: bool = False


LLAMA_ATTENTION = Half(
    name="attention", module="self_attn", norm="input_layernorm",
    readers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), producer="self_attn.v_proj",
    writer="self_attn.o_proj", queries="self_attn.q_proj", keys="self_attn.k_proj",
)  # fmt: skip
LLAMA_MLP = Half(
    name="mlp", module="mlp", norm="post_attention_layernorm", readers=("mlp.gate_proj", "mlp.up_proj"),
    producer="mlp.up_proj", writer="mlp.down_proj", gate="mlp.gate_proj",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder: paths in the model, then paths in a block.

    Attributes:
        name: transformers' class, as config.json names it under `architectures`.
        model_type: as config.json has it.
        embeddings, blocks, norm, head: paths in the model.
        rotary: the module of rotary positions; None where positions are learned.
        attentions, mlps: what the halves of a block can be; of each block the first whose modules are all there.
        query_norm, key_norm: norms of queries and keys in front of RoPE; None without.
        norm_kind: the function of all norms: "rms", x / sqrt(mean x^2 + epsilon) * (weight + norm_offset), or "layer",
            the same of x less its mean, with a bias.
        norm_offset: what is added to the stored weight of a norm.
        epsilon, config_epsilon: what a norm calls its epsilon, and what the configuration calls it.
        biases: linear layers of a block that have one: always, or where the configuration says so under that name.
        fused: linear layers of transformers that are opened apart.
        renamed: parts of names that published checkpoints spell otherwise, as (theirs, ours).
        stacked_experts: whether published checkpoints hold all experts in one tensor, as gpt-oss.
        parallel: the flag of the configuration under which both halves read what reaches the block; None without.
        residual_scale: what the configuration calls the factor of what halves add to the stream; None without.
        logits_divisor, logits_cap: what the configuration calls what logits are divided by, and the cap c of
            c tanh(logits / c); None without.
        embeddings_scaled: whether the module of the embeddings multiplies what it looks up.
        neurons: what the configuration calls the number of neurons of the MLP.
        sdpa: whether transformers has it with torch's attention.
        in_float32: ends of names of tensors that keep fp32 in a checkpoint of 16 bits, as transformers has it.
        required: values of the configuration without which the anatomy is another; a text that begins with "=" names
            another key whose value it must have.
    """

    name: str
    model_type: str
    embeddings: str = "model.embed_tokens"
    blocks: str = "model.layers"
    norm: str = "model.norm"
    head: str = "lm_head"
    rotary: str | None = "model.rotary_emb"
    attentions: tuple[Half, ...] = (LLAMA_ATTENTION,)
    mlps: tuple[Half, ...] = (LLAMA_MLP,)
    query_norm: str | None = None
    key_norm: str | None = None
    norm_kind: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    epsilon: str = "variance_epsilon"
    config_epsilon: str = "rms_norm_eps"
    biases: Mapping[str, bool | str] = field(default_factory=dict)
    fused: tuple[FusedRow, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    stacked_experts: bool = False
    parallel: str | None = None
    residual_scale: str | None = None
    logits_divisor: str | None = None
    logits_cap: str | None = None
    embeddings_scaled: bool = False
    neurons: str = "intermediate_size"
    sdpa: bool = True
    in_float32: tuple[str, ...] = ()
    required: Mapping[str, Any] = field(default_factory=dict)

    def halves(self, has: Callable[[str], bool], experts: Callable[[str], int]) -> tuple[Half, Half]:
        """Attention and MLP of a block, of which `has` tells whether a path is there, `experts` how many at a path."""
        attention, mlp = (next(half for half in each if _is(half, has)) for each in (self.attentions, self.mlps))
        if mlp.experts is not None:
            mlp = replace(mlp, experts=replace(mlp.experts, count=experts(mlp.experts.path)))
        return attention, mlp

    def kept_in_float32(self, name: str) -> bool:
        """Whether a tensor of that name keeps fp32."""
        return bool(self.in_float32) and name.endswith(self.in_float32)

    def is_parallel(self, config: Any) -> bool:
        """Whether both halves of a block read what reaches it."""
        return self.parallel is not None and bool(getattr(config, self.parallel))

    @property
    def unturned(self) -> str | None:
        """Why the residual stream cannot be turned; None where it can."""
        if self.norm_kind == "layer":
            return "its norms subtract the mean, which a rotation changes"
        halves = (*self.attentions, *self.mlps)
        if any(half.norm is None or half.after is not None for half in halves):
            return "norms behind its sublayers write what a rotation would mix"
        return None if self.parallel is None else "both halves of a block read it at once"

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


def sites(halves: tuple[Half, ...]) -> tuple[SiteRow, ...]:
    """All sites of a block, in the order of computation; halves that read one norm have one site of it."""
    found: list[SiteRow] = []
    for half in halves:
        first = half.site
        same = [n for n, site in enumerate(found) if site.producer == first.producer is not None]
        if same:
            both = found[same[0]].readers + first.readers
            found[same[0]] = replace(found[same[0]], readers=both, stacks=(both,))
        else:
            found.append(first)
        found += half.inner
    return tuple(found)


def _is(half: Half, has: Callable[[str], bool]) -> bool:
    """Whether a block has the modules of a half."""
    paths = [half.norm, half.after] + ([half.experts.path, half.experts.router] if half.experts else [*half.readers])
    return all(has(path) for path in paths if path is not None)
