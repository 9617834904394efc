"""Small GGUF files of a Llama, written by the library `gguf` as llama.cpp's converter would."""

import numpy as np
import torch
from checkpoints import TINY, transformers_model

from compression.architectures import skeleton
from compression.checkpoints import weights
from compression.checkpoints.formats import gguf, gguf_tokenizer

SIZES = TINY | {"hidden_size": 64, "intermediate_size": 96}  # rows of whole blocks of 32
TEXT = "It's 2024, isn't it? Ünïcode - naïve; the 1,234,567 cats' tails\n\n   sat.\tYOU'LL see <s>x</s>"
_PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def in_pairs(weight, heads):
    """Rows of transformers' order in that of ggml: channel i of a head and i + half become neighbours."""
    found = np.empty_like(weight)
    size = len(weight) // heads
    for head in range(heads):
        for i in range(size // 2):
            found[head * size + 2 * i] = weight[head * size + i]
            found[head * size + 2 * i + 1] = weight[head * size + size // 2 + i]
    return found


def ggml_name(name):
    stem, _, suffix = name.rpartition(".")
    if stem in _OUTSIDE:
        return f"{_OUTSIDE[stem]}.{suffix}"
    _, _, number, part = stem.split(".", 3)
    return f"blk.{number}.{_PARTS[part]}.{suffix}"


def opened_model(path):
    """The model of a file in fp32."""
    opened = gguf.open_file(path)
    model = skeleton.build(opened.config, torch.float32, device="meta")
    tensors = {name: torch.from_numpy(values.copy()) for name, values in opened.tensors()}
    weights.fill(model, tensors, where=str(path))
    return skeleton.finish(model, "cpu", None)


def write(path, kind="Q4_1", tied=True, change=lambda writer: None, tensors=lambda found: found, endian=None):
    """A file of a tiny Llama with matrices of that type, norms in F32; the model that it is of.

    `change` adds to the writer, `tensors` changes {name: fp32 values} before they are stored.
    """
    import gguf as library

    model = transformers_model("LlamaForCausalLM", tied=tied, **SIZES)
    writer = library.GGUFWriter(path, "llama", endianess=endian or library.GGUFEndian.LITTLE)
    writer.add_context_length(64)
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_block_count(2)
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_vocab_size(SIZES["vocab_size"])
    writer.add_rope_freq_base(10000.0)
    change(writer)
    found = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        values = tensor.numpy()
        for part, heads in (("q_proj", 4), ("k_proj", 2)):
            values = in_pairs(values, heads) if part in name else values
        found[ggml_name(name)] = values
    for name, values in tensors(found).items():
        if values.ndim == 1 or kind == "F32":
            writer.add_tensor(name, values)
        else:
            stored = library.GGMLQuantizationType[kind]
            writer.add_tensor(name, library.quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def tokenizer_of(name, **changes):
    """A small tokenizer that cuts text as llama.cpp does under a name."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    cuts = {
        "bytes": lambda regex: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex),
        "split": lambda pattern: pre_tokenizers.Split(Regex(pattern), "isolated"),
        "digits": lambda alone: pre_tokenizers.Digits(individual_digits=alone),
    }
    made = Tokenizer(models.BPE(ignore_merges=name in gguf_tokenizer.WHOLE_WORDS))
    steps = gguf_tokenizer.STEPS[name]
    made.pre_tokenizer = pre_tokenizers.Sequence([cuts[step](argument) for step, argument in steps])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([TEXT * 3], trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    ))  # fmt: skip
    made.add_tokens(["YOU'LL"])
    for key, value in changes.items():
        setattr(made, key, value)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>",
                                   chat_template="{{ messages }}")  # fmt: skip
