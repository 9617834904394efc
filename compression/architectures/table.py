"""One row per decoder architecture: where its blocks, norms and linear layers are, and what reads and writes what.

Nothing else in the package spells the name of a module. A row is data (`compression.architectures.anatomy`): capture,
edits, methods, streaming and the decode step of the benchmarks all read it. Imports no torch.
"""

from dataclasses import replace
from typing import Any

from compression.architectures.anatomy import (
    LLAMA_ATTENTION,
    LLAMA_MLP,
    NORMS,
    Architecture,
    ExpertsRow,
    FusedRow,
    Half,
    SiteRow,
)
from compression.errors import CheckpointError

__all__ = ["ARCHITECTURES", "NORMS", "Architecture", "architecture_of", "named"]

_QKV = LLAMA_ATTENTION.readers
_ATTENTION_BIAS = dict.fromkeys((*_QKV, LLAMA_ATTENTION.writer), "attention_bias")
_MLP_BIAS = dict.fromkeys((*LLAMA_MLP.readers, LLAMA_MLP.writer), "mlp_bias")
_HEAD_NORMS = {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}
_OF_THE_WIDTH = "transformers' class has heads for the whole width alone"

_PLAIN = Architecture(name="MistralForCausalLM", model_type="mistral")
_LLAMA = replace(_PLAIN, name="LlamaForCausalLM", model_type="llama", biases=_ATTENTION_BIAS | _MLP_BIAS)

# --- Norms behind the sublayers ---------------------------------------------------------------------------------------

_GEMMA2 = Architecture(
    name="Gemma2ForCausalLM", model_type="gemma2", biases=_ATTENTION_BIAS, norm_offset=1.0, epsilon="eps",
    attentions=(replace(LLAMA_ATTENTION, after="post_attention_layernorm"),),
    mlps=(replace(LLAMA_MLP, norm="pre_feedforward_layernorm", after="post_feedforward_layernorm"),),
    logits_cap="final_logit_softcapping", embeddings_scaled=True, sdpa=False,
)  # fmt: skip
_GEMMA3 = replace(_GEMMA2, name="Gemma3ForCausalLM", model_type="gemma3_text", sdpa=True, **_HEAD_NORMS)
_OLMO2 = Architecture(
    name="Olmo2ForCausalLM", model_type="olmo2", biases=_ATTENTION_BIAS, **_HEAD_NORMS,
    attentions=(replace(LLAMA_ATTENTION, norm=None, after="post_attention_layernorm",
                        uncut="its norms of queries and keys are over all heads"),),
    mlps=(replace(LLAMA_MLP, norm=None, after="post_feedforward_layernorm"),),
)  # fmt: skip

# --- Fused layers -----------------------------------------------------------------------------------------------------


def _grouped_heads(config: Any) -> tuple[int, int, int]:
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * size, *[config.num_key_value_heads * size] * 2


def _fused(half: Half, path: str, names: tuple[str, ...]) -> Half:
    """A half whose readers are parts of one layer; the last of them is the producer."""
    parts = tuple(f"{path}.{name}" for name in names)
    queries = {"queries": parts[0], "keys": parts[1]} if half.name == "attention" else {"gate": parts[0]}
    return replace(half, readers=parts, producer=parts[-1], **queries)


_PARTS, _GATED = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
_PHI3 = Architecture(
    name="Phi3ForCausalLM", model_type="phi3",
    attentions=(_fused(LLAMA_ATTENTION, "self_attn.qkv_proj", _PARTS),),
    mlps=(_fused(LLAMA_MLP, "mlp.gate_up_proj", _GATED),),
    fused=(FusedRow("self_attn.qkv_proj", _PARTS, _grouped_heads),
           FusedRow("mlp.gate_up_proj", _GATED, lambda config: (config.intermediate_size,) * 2)),
)  # fmt: skip

# --- Layer norms ------------------------------------------------------------------------------------------------------

_STABLELM = Architecture(
    name="StableLmForCausalLM", model_type="stablelm", norm_kind="layer", epsilon="eps",
    config_epsilon="layer_norm_eps", biases=dict.fromkeys(_QKV, "use_qkv_bias"), parallel="use_parallel_residual",
    attentions=(replace(LLAMA_ATTENTION, uncut=_OF_THE_WIDTH),),
    mlps=(LLAMA_MLP, replace(LLAMA_MLP, norm=LLAMA_ATTENTION.norm)),
)  # fmt: skip
_NOT_LINEAR = "what activates its producer is not linear, and there is no gate beside it"
_NEOX = Architecture(
    name="GPTNeoXForCausalLM", model_type="gpt_neox", embeddings="gpt_neox.embed_in", blocks="gpt_neox.layers",
    norm="gpt_neox.final_layer_norm", rotary="gpt_neox.rotary_emb", norm_kind="layer", epsilon="eps",
    config_epsilon="layer_norm_eps", parallel="use_parallel_residual",
    biases={f"attention.query_key_value.{part}": "attention_bias" for part in _PARTS}
    | {"attention.dense": "attention_bias", "mlp.dense_h_to_4h": True, "mlp.dense_4h_to_h": True},
    attentions=(replace(_fused(LLAMA_ATTENTION, "attention.query_key_value", _PARTS), module="attention",
                        writer="attention.dense", head_size="head_size", uncut=_OF_THE_WIDTH),),
    mlps=(replace(LLAMA_MLP, readers=("mlp.dense_h_to_4h",), producer="mlp.dense_h_to_4h",
                  writer="mlp.dense_4h_to_h", gate=None, fixed=_NOT_LINEAR),),
    fused=(FusedRow("attention.query_key_value", _PARTS,
                    lambda config: (config.hidden_size // config.num_attention_heads,) * 3, by_head=True),),
    renamed=(("embed_out.", "lm_head."),),
)  # fmt: skip
_OPT_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_OPT = Architecture(
    name="OPTForCausalLM", model_type="opt", embeddings="model.decoder.embed_tokens", blocks="model.decoder.layers",
    norm="model.decoder.final_layer_norm", rotary=None, norm_kind="layer", epsilon="eps", neurons="ffn_dim",
    biases=dict.fromkeys((*_OPT_QKV, "self_attn.out_proj", "fc1", "fc2"), "enable_bias"),
    attentions=(replace(LLAMA_ATTENTION, norm="self_attn_layer_norm", writer="self_attn.out_proj",
                        uncut=_OF_THE_WIDTH),),
    mlps=(replace(LLAMA_MLP, module="", norm="final_layer_norm", readers=("fc1",), producer="fc1", writer="fc2",
                  gate=None),),
    required={"do_layer_norm_before": True, "_remove_final_layer_norm": False, "layer_norm_elementwise_affine": True,
              "activation_function": "relu", "word_embed_proj_dim": "=hidden_size"},
)  # fmt: skip

# --- Mixtures of experts ----------------------------------------------------------------------------------------------


def _mixture(**paths: Any) -> Half:
    """An MLP of experts whose layers are called as those of Llama's."""
    return replace(
        LLAMA_MLP, readers=_GATED, producer="up_proj", writer="down_proj", gate="gate_proj",
        experts=ExpertsRow(**paths), uncut="it is a mixture of experts",
    )  # fmt: skip


def _latent(queries: tuple[str, ...], *latents: SiteRow) -> Half:
    """Multi-head latent attention, whose heads of keys and values are made from a narrow latent of each token."""
    parts = ("self_attn.kv_b_proj.k_proj", "self_attn.kv_b_proj.v_proj")
    return replace(
        LLAMA_ATTENTION, readers=(*queries, "self_attn.kv_a_proj_with_mqa"), producer=parts[1],
        latents=(*latents, SiteRow("self_attn.kv_a_layernorm", parts, "latent")),
        queries=latents[0].readers[0] if latents else queries[0], keys=None,
        head_size="v_head_dim", uncut="its heads of keys and values come out of one latent",
    )  # fmt: skip


_MIXTRAL = Architecture(
    name="MixtralForCausalLM", model_type="mixtral", mlps=(_mixture(),),
    renamed=((".block_sparse_moe.", ".mlp."), (".w1.", ".gate_proj."), (".w2.", ".down_proj."),
             (".w3.", ".up_proj.")),
)  # fmt: skip
_QWEN2_MOE = Architecture(
    name="Qwen2MoeForCausalLM", model_type="qwen2_moe", biases=dict.fromkeys(_QKV, "qkv_bias"),
    mlps=(_mixture(shared="mlp.shared_expert", shared_gate="mlp.shared_expert_gate"), LLAMA_MLP),
)  # fmt: skip
_QWEN3_MOE = Architecture(
    name="Qwen3MoeForCausalLM", model_type="qwen3_moe", biases=_ATTENTION_BIAS, mlps=(_mixture(), LLAMA_MLP),
    **_HEAD_NORMS,
)  # fmt: skip
_GPT_OSS = Architecture(
    name="GptOssForCausalLM", model_type="gpt_oss", biases=_ATTENTION_BIAS, sdpa=False, stacked_experts=True,
    attentions=(replace(LLAMA_ATTENTION, uncut="each of its heads has an attention sink",
                        unshifted="attention sinks take a part of its weights"),),
    mlps=(replace(_mixture(router="mlp.router"), fixed="its experts clamp what they multiply, and add 1 to it"),),
)  # fmt: skip
_DEEPSEEK = Architecture(
    name="DeepseekV3ForCausalLM", model_type="deepseek_v3",
    biases=dict.fromkeys(("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.o_proj"), "attention_bias"),
    attentions=(_latent(("self_attn.q_a_proj",), SiteRow("self_attn.q_a_layernorm", ("self_attn.q_b_proj",), "latent")),
                _latent(("self_attn.q_proj",))),
    mlps=(_mixture(shared="mlp.shared_experts"), LLAMA_MLP), in_float32=("e_score_correction_bias",),
    fused=(FusedRow("self_attn.kv_b_proj", ("k_proj", "v_proj"),
                    lambda config: (config.qk_nope_head_dim, config.v_head_dim), by_head=True),),
)  # fmt: skip

ARCHITECTURES: dict[str, Architecture] = {
    row.name: row
    for row in (
        _LLAMA,
        _PLAIN,
        replace(_PLAIN, name="Qwen2ForCausalLM", model_type="qwen2", biases=dict.fromkeys(_QKV, True)),
        replace(_PLAIN, name="Qwen3ForCausalLM", model_type="qwen3", biases=_ATTENTION_BIAS, **_HEAD_NORMS),
        replace(_LLAMA, name="GraniteForCausalLM", model_type="granite", residual_scale="residual_multiplier",
                logits_divisor="logits_scaling"),
        _GEMMA2, _GEMMA3, _OLMO2, _PHI3, _STABLELM, _NEOX, _OPT, _MIXTRAL, _QWEN2_MOE, _QWEN3_MOE, _GPT_OSS,
        replace(_DEEPSEEK, name="DeepseekV2ForCausalLM", model_type="deepseek_v2"),
        _DEEPSEEK,
    )
}  # fmt: skip


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
