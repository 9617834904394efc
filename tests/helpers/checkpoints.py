"""Tiny checkpoints on disk, made by transformers alone, and ways to spoil them."""

import json
import re

import torch
from families import FAMILIES, TINY
from safetensors.torch import load_file, save_file

from compression.architectures.table import ARCHITECTURES
from compression.files.strict_json import signed

TOKENS = torch.arange(20).view(2, 10) * 5 % 48


def transformers_model(architecture, *, tied=False, dtype=torch.float32, **sizes):
    """A tiny model of that architecture with seeded weights, made by transformers alone."""
    import transformers

    row = ARCHITECTURES.get(architecture)
    known = getattr(transformers, architecture.replace("ForCausalLM", "Config"), None)
    kind = known.model_type if row is None else row.model_type
    sizes = TINY | FAMILIES.get(architecture, {}) | sizes | {"tie_word_embeddings": tied}
    config = transformers.AutoConfig.for_model(kind, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, architecture)(config).to(dtype)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_(0, 0.02)
            elif name.endswith(("router.weight", "mlp.gate.weight")):  # some begin with zeros
                parameter.data.normal_(0, 0.2)
    return model


def rewrite(path, **changes):
    """A JSON file with keys changed, and signed anew if it was; those set to ... are removed."""
    value = json.loads(path.read_text()) | changes
    value = {key: v for key, v in value.items() if v is not ...}
    path.write_text(json.dumps(signed(value) if "digest" in value else value))


def leaves(value, path=()):
    """The places in a value of JSON, each as the keys that lead to it."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield (*path, key)
        yield from leaves(each, (*path, key))


def change_tensors(folder, change):
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def says(*words):
    """A pattern for `pytest.raises`: the message holds all of the words."""
    return "(?s)" + "".join(f"(?=.*{re.escape(word)})" for word in words)


def logits(model):
    return model(TOKENS, use_cache=False).logits
