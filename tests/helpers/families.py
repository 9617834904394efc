"""Of every architecture a configuration of a few thousand weights that has what is particular to it."""

from compression.architectures.table import ARCHITECTURES

TINY = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip

_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "head_dim": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8}
_LATENT = {
    "kv_lora_rank": 32, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "routed_scaling_factor": 1.0,
}  # fmt: skip

FAMILIES = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {},
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {"head_dim": 8},
    "GraniteForCausalLM": {"residual_multiplier": 0.5, "embedding_multiplier": 3.0, "attention_multiplier": 0.2,
                           "logits_scaling": 2.0},
    "Gemma2ForCausalLM": _ALTERNATING | {"pad_token_id": None, "final_logit_softcapping": 5.0,
                                         "attn_logit_softcapping": 2.0,
                                         "query_pre_attn_scalar": 16},
    "Gemma3ForCausalLM": _ALTERNATING | {"pad_token_id": None, "query_pre_attn_scalar": 16},
    "Olmo2ForCausalLM": {},
    "Phi3ForCausalLM": {"pad_token_id": None, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                                                "partial_rotary_factor": 0.5}},
    "StableLmForCausalLM": {"use_qkv_bias": True},
    "GPTNeoXForCausalLM": {},
    "OPTForCausalLM": {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0},
    "MixtralForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32},
    "Qwen2MoeForCausalLM": _EXPERTS | {"shared_expert_intermediate_size": 64},
    "Qwen3MoeForCausalLM": _EXPERTS | {"mlp_only_layers": [0], "norm_topk_prob": True},
    "GptOssForCausalLM": _ALTERNATING | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32,
                                         "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "DeepseekV2ForCausalLM": _LATENT | {"q_lora_rank": None},
    "DeepseekV3ForCausalLM": _LATENT | {"q_lora_rank": 32, "n_group": 2, "topk_group": 1},
}  # fmt: skip
SHAPES = {
    name: TINY | sizes | {
        "architectures": [name], "model_type": ARCHITECTURES[name].model_type, "dtype": "float32", "vocab_size": 64,
        "initializer_range": 0.2, "init_std": 0.2, "tie_word_embeddings": name.startswith(("Gemma", "OPT", "Qwen2F")),
    }
    for name, sizes in FAMILIES.items()
}  # fmt: skip
