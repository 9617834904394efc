"""A small Llama far from uniform, a tokenizer of bytes, and texts to read with them: fixtures of several files."""

import json

import pytest
import torch

from bench.data.sources import open_data

VOCABULARY = 258  # 256 bytes, <s>, </s>
TEXTS = [f"Row {i} says: " + "the quick brown fox jumps over the lazy dog. " * (1 + i % 5) for i in range(40)]


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=2, max_position_embeddings=1024, **sizes)
    config.initializer_range = 0.3  # far from uniform, so that a wrong shift or mask shows
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokenizer():
    """One token per byte; puts <s> first where special tokens are wanted."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "<s>", "</s>"])}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    bytewise.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, bos_token="<s>", eos_token="</s>")


def data_of(place, texts, chats=()):
    lines = (json.dumps(row) + "\n" for row in ({"text": text} for text in texts))
    (place / "test.jsonl").write_text("".join(lines), encoding="utf-8")
    if chats:
        (place / "chat-test.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return open_data(str(place), base="a-folder")


@pytest.fixture
def data(tmp_path):
    return data_of(tmp_path, TEXTS)
