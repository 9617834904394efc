"""Published configurations of real decoders, for `random:<shape>` bases. Figures from each model's config.json."""

from typing import Any

_LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
_MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "tie_word_embeddings": False}
_QWEN2 = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
}

SHAPES: dict[str, dict[str, Any]] = {
    "mistral-7b": _MISTRAL | {  # mistralai/Mistral-7B-v0.1
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "sliding_window": 4096, "dtype": "bfloat16",
    },
    "llama-2-7b": _LLAMA | {  # meta-llama/Llama-2-7b-hf
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "dtype": "float16",
    },
    "tinyllama-1.1b": _LLAMA | {  # TinyLlama/TinyLlama-1.1B-Chat-v1.0
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "dtype": "bfloat16",
    },
    "qwen2.5-0.5b": _QWEN2 | {  # Qwen/Qwen2.5-0.5B
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True, "dtype": "bfloat16",
    },
    "qwen2.5-3b": _QWEN2 | {  # Qwen/Qwen2.5-3B
        "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True, "dtype": "bfloat16",
    },
    "qwen2.5-7b": _QWEN2 | {  # Qwen/Qwen2.5-7B
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 131072,
        "tie_word_embeddings": False, "dtype": "bfloat16",
    },
}  # fmt: skip
