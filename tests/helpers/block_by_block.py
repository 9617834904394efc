"""Compressing a small checkpoint into a folder block by block, and stopping that on the way."""

import pytest
import torch
from checkpoints import transformers_model
from safetensors.torch import load_file

import compression

GPTQ = "gptq(group_size=8,samples=4,sequence_length=12)"
TWICE = f"{GPTQ}-gptq(bits=2,group_size=8,samples=2,sequence_length=8)"
STATE = "compression.state.json"
BLOCKS = 4


def deep_checkpoint(folder):
    """A checkpoint of four blocks."""
    transformers_model("LlamaForCausalLM", num_hidden_layers=BLOCKS).save_pretrained(folder)
    return folder


def write(folder, base, recipe=GPTQ, **options):
    return compression.compress_to(folder, str(base), recipe, **{"calibration": "random"} | options)


def tensors(folder):
    """Every tensor of a folder by name, whatever file it is in."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Stop(Exception):
    pass


def stop_after(blocks):
    def progress(done, total, what):
        if done == blocks:
            raise Stop

    return progress


def interrupt(folder, base, recipe=GPTQ, *, after=2):
    with pytest.raises(Stop):
        write(folder, base, recipe, progress=stop_after(after))
