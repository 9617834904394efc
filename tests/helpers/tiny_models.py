"""Shapes of a few hundred thousand weights, of which the fixture `tiny_shapes` makes bases `random:NAME`."""

import functools

import torch

import compression
from compression.architectures.decoder import decoder_blocks
from compression.training.downstream import Downstream, Texts

COMMON = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip
TINY = {
    "tiny-llama": COMMON | {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False, "dtype": "bfloat16",
    },
    "tiny-qwen2": COMMON | {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True, "dtype": "float32",
    },
    "tiny-odd": COMMON | {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False, "dtype": "float32",
        "intermediate_size": 200,  # which down_proj reads, the last layer of a block
    },
}  # fmt: skip
TINY["tiny-qwen2-bf16"] = TINY["tiny-qwen2"] | {"dtype": "bfloat16"}
TINY["tiny-qwen2-one-layer"] = TINY["tiny-qwen2-bf16"] | {"num_hidden_layers": 1}
TINY["tiny-llama-fp32"] = TINY["tiny-llama"] | {"dtype": "float32"}


class Numbered(Downstream):
    """A task in token ids: the tokenizer of bytes has more than the vocabulary of the tiny shapes."""

    def texts(self, tokenizer, *, samples, length, seed):
        ids = torch.randint(64, (8, 16), generator=torch.Generator().manual_seed(seed))
        every = torch.ones_like(ids, dtype=torch.bool)
        return Texts(ids, every, every, len(ids))


TASK = Numbered("numbered", lambda: [("numbers", "numbers")])
TOKENS = torch.arange(24).view(2, 12) * 7 % 64


@functools.cache
def fresh_base(shape):
    base = compression.open_base(f"random:{shape}")
    generator = torch.Generator().manual_seed(1)
    for name, parameter in base.model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.02, generator=generator)
    return base, {name: tensor.clone() for name, tensor in base.model.state_dict().items()}


def linears(model):
    return dict(pair for block in decoder_blocks(model) for pair in block.linears())


def logits(model):
    return model(TOKENS, use_cache=False).logits
