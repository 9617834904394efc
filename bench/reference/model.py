"""The architecture of student and teacher, what their weights begin as, how a teacher grows out of a student, and how
the channels of a trained model are made unlike and its answers as sure as they are right.

The teacher has a new layer behind every one of the student's, whose output matrices are zero, so that the grown model
computes what the student did (function-preserving growth: Net2Net, arXiv 1511.05641; identity blocks: LLaMA Pro, arXiv
2401.02415).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.errors import OptionError

if TYPE_CHECKING:
    import torch
    from transformers import MistralForCausalLM, PreTrainedTokenizerFast

CONTEXT = 2048  # tokens: the longest input that is declared
TAUGHT = "taught.pt"  # in a student's folder: its weights at the end of the curriculum
SPREAD = 0.5  # standard deviation of the logarithm of the factors that make channels unlike
SPREAD_SEED = 1
TEMPERS = tuple(1 - i / 20 for i in range(10))  # factors of the output head that are tried


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What distinguishes student from teacher: sizes of the model, the rate that suits them, the curriculum."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    rate: float
    curriculum: int  # the steps over which the mixture of lessons changes; 0: a teacher's mixture throughout


SHAPES = {
    "student": Shape(hidden=256, intermediate=512, layers=8, heads=8, kv_heads=4, rate=1.5e-3, curriculum=2000),
    "teacher": Shape(hidden=256, intermediate=512, layers=16, heads=8, kv_heads=4, rate=8e-4, curriculum=0),
}


def build(shape: Shape, vocabulary: "PreTrainedTokenizerFast", *, seed: int) -> "MistralForCausalLM":
    """An untrained float32 model of the shape; the same seed gives the same weights, and no global state is touched."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=len(vocabulary),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.hidden // shape.heads,
        max_position_embeddings=CONTEXT,
        sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        bos_token_id=vocabulary.bos_token_id,
        eos_token_id=vocabulary.eos_token_id,
        pad_token_id=vocabulary.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MistralForCausalLM(config)
    with torch.no_grad():
        _begin_by_copying(model, torch.Generator().manual_seed(seed))
    return model


def _begin_by_copying(model: "MistralForCausalLM", generator: "torch.Generator") -> None:
    """Let the first two layers begin as what all reading rests on: heads that look back, and heads that copy.

    Copying out of a text needs a head that looks at the token before, and one in a later layer that finds where this
    token stood before and says what followed (induction heads, arXiv 2209.11895). Neither is of use without the other,
    which is why a small budget ends before both appear. Here

    - a channel of the embeddings, the same for all tokens, makes keys of layer 0 that depend on the place alone, in the
      rotary pairs of short wavelength; queries are these turned back, so that heads look 1, 1, 2, 3 ... tokens back;
    - the first of them writes a projection of what it sees; in layer 1 one head of each group compares this with the
      same projection of its own token, in the rotary pairs of long wavelength, and copies a part of what it finds;
    - the output matrix begins as the embeddings.

    All of it is trained on like any other weight.
    """
    import torch

    config, first, second = model.config, model.model.layers[0].self_attn, model.model.layers[1].self_attn
    hidden, size, groups = config.hidden_size, config.head_dim, config.num_key_value_heads
    pairs, heads = size // 2, config.num_attention_heads

    def directions(count: int) -> torch.Tensor:
        """Orthonormal rows that leave out the constant channel, (count, hidden)."""
        square = torch.linalg.qr(torch.randn(hidden - 1, count, generator=generator))[0]
        return torch.nn.functional.pad(square.T, (1, 0))

    embeddings = model.model.embed_tokens.weight
    embeddings *= 0.3 / config.initializer_range
    embeddings[:, 0] = 2.4
    model.lm_head.weight.copy_(embeddings / 15)
    model.lm_head.weight[:, 0] = 0
    seen, written, copied = directions(size), directions(size), directions(min(size * groups, hidden - 1))

    angles = 10000.0 ** (-torch.arange(6) / pairs)
    keys, queries = (w.weight.view(-1, size, hidden) for w in (first.k_proj, first.q_proj))
    keys[:, :6, 0] = 0.9
    for head in range(heads):
        queries[head, :6, 0] = 0.9 * torch.cos(max(1, head) * angles)
        queries[head, pairs : pairs + 6, 0] = -0.9 * torch.sin(max(1, head) * angles)
    first.v_proj.weight[:size] = seen
    first.o_proj.weight[:, :size] = 0.9 * written.T

    long = torch.arange(9 * size // 32, pairs)
    long = torch.cat([long, long + pairs])
    keys, queries = (w.weight.view(-1, size, hidden) for w in (second.k_proj, second.q_proj))
    for group in range(groups):
        some, head = torch.randperm(size, generator=generator)[: len(long)], group * heads // groups
        keys[group, long], queries[head, long] = 3 * written[some], 3 * seen[some]
        part = copied[group * size : (group + 1) * size]
        second.v_proj.weight[group * size : group * size + len(part)] = part
        second.o_proj.weight[:, head * size : head * size + len(part)] = 2.4 * part.T


def grow(model: "MistralForCausalLM", source: Path) -> None:
    """Give a fresh model with a multiple of the layers the weights in `source` (a folder), computing the same function.

    Layer i of the source becomes the first of its group; the others of the group add nothing to the stream at first.

    Raises OptionError if the folder has neither a state at the end of the curriculum nor weights, or they are of other
    widths.
    """
    import torch
    from safetensors.torch import load_file

    if (source / TAUGHT).is_file():
        given = torch.load(source / TAUGHT, map_location="cpu", weights_only=True)
    elif (source / "model.safetensors").is_file():
        given = load_file(source / "model.safetensors")
    else:
        raise OptionError(f"nothing to grow from: {source} has neither {TAUGHT} nor model.safetensors")
    layers = 1 + max(int(name.split(".")[2]) for name in given if name.startswith("model.layers."))
    group, rest = divmod(model.config.num_hidden_layers, layers)
    state = model.state_dict()
    for name, tensor in given.items():
        parts = name.split(".")
        if name.startswith("model.layers."):
            parts[2] = str(group * int(parts[2]))
        if rest or state[".".join(parts)].shape != tensor.shape:
            raise OptionError(
                f"{source} has {layers} layers and {name} of {tuple(tensor.shape)}: it cannot be grown to this shape"
            )
        state[".".join(parts)] = tensor.float()
    model.load_state_dict(state)
    for number, layer in enumerate(model.model.layers):
        if number % group:
            torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
            torch.nn.init.zeros_(layer.mlp.down_proj.weight)


def temper(model: "MistralForCausalLM", loss: Callable[[], float]) -> float:
    """Scale the output head by that of TEMPERS with the least `loss()`, which reads the model, and return the factor.

    The lessons ask for answers that are known, which makes a model surer than it may be of text, where many are not
    (temperature scaling, arXiv 1706.04599). Noise that makes such a model less sure, as rounding does, would lower its
    perplexity. What is most likely stays so.
    """
    import torch

    head = model.lm_head.weight
    trained, found = head.detach().clone(), {}
    with torch.no_grad():
        for factor in TEMPERS:
            head.copy_(trained * factor)
            found[factor] = loss()
        best = min(found, key=found.__getitem__)
        head.copy_(trained * best)
    return best


def spread_channels(model: "MistralForCausalLM") -> None:
    """Multiply the channels that linear layers read by factors exp(SPREAD * n), n normal, and divide the columns that
    read them by the same; the function stays as it is.

    Channels of large models differ widely in size, and rounding to few bits destroys such models for this reason: the
    columns of large channels are small, share their scale with larger ones, and their error is multiplied (AWQ, arXiv
    2306.00978, section 3). Training of a few million tokens leaves channels too much alike for that. The channels are
    those of the norms before attention and MLP, of the values, and of the MLP's gated inside.
    """
    import torch

    generator = torch.Generator().manual_seed(SPREAD_SEED)

    def factors(channels: int) -> torch.Tensor:
        return torch.exp(SPREAD * torch.randn(channels, generator=generator))

    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, readers in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                by = factors(len(norm.weight))
                norm.weight *= by
                for reader in readers:
                    reader.weight /= by
            for written, reader, size in (
                (attention.v_proj, attention.o_proj, attention.head_dim),
                (mlp.up_proj, mlp.down_proj, mlp.up_proj.out_features),
            ):
                by = factors(written.out_features)
                written.weight *= by[:, None]
                shared = reader.in_features // len(by)  # heads that read the same values
                reader.weight /= by.view(-1, size).repeat_interleave(shared, 0).flatten()
