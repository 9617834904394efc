"""What is pruned in the tests: a tiny base and its layers; weights, shares, patterns, and a mask by sorting."""

import torch
from hypothesis import strategies as st
from strategies import gaussian

import compression
from compression.architectures.decoder import decoder_blocks
from compression.architectures.random_shapes import SHAPES

TINY = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True, "dtype": "bfloat16",
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip
SMALL = "samples=4,sequence_length=24"
TOKENS = torch.arange(24).view(2, 12) * 7 % 256
PATTERNS = ((2, 4), (4, 8), (1, 4), (3, 4), (5, 16))
shares = st.one_of(st.sampled_from((0.0, 0.1, 0.29, 0.5, 0.7, 0.99)), st.floats(0, 1, exclude_max=True))


def tiny_base(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny-pruned", TINY)
    return compression.open_base("random:tiny-pruned")


def linears(model):
    return dict(pair for block in decoder_blocks(model) for pair in block.linears())


def with_ties(rows, cols, seed):
    """A weight of few values, as whole numbers of both signs and zero."""
    return gaussian(rows, cols, seed=seed, std=2).round()


def ranked(scores, count):
    """The mask of a list of scores, by sorting."""
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    return [i in set(order[:count]) for i in range(len(scores))]
