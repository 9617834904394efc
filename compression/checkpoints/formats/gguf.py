"""GGUF files, as llama.cpp keeps models in (ggml's docs/gguf.md): configuration, tensors and tokenizer of one file.

Needs the library `gguf` (extra `smollm2`), which takes files apart and dequantizes blocks. Names and shapes are those
of transformers, by the row of the architecture; the order of rows within the heads of queries and keys, which the
converter of llama.cpp changes for Llama because it rotates pairs of neighbours, is changed back.
Limits: one file, little-endian, of the architectures in `ROWS`; positions scaled as `gguf_rope` has it, and none that
are partly rotary. Tokenizers are
those of `_TOKENIZERS`, as transformers converts them, and of `gguf_tokenizer`.
"""

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compression.architectures import table
from compression.checkpoints import config as checks
from compression.checkpoints.formats import gguf_header, gguf_rope, gguf_tokenizer
from compression.errors import CheckpointError, install_command
from compression.files.libraries import failures_as

ROWS = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
PERMUTED = ("llama",)  # whose queries and keys the converter puts in another order
_NEUTRAL = {"expert_count": 0}  # as if they were not there
_CHANGING = ("scale", "scaling", "sliding_window", "expert", "softcap")  # in names of values that change the function
_TOKENIZERS = {("gpt2", "smollm")}  # model and pre-tokenizer
_SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}


@dataclass(frozen=True)
class GGUFile:
    """An opened file.

    Attributes:
        path: the file.
        config: what config.json would say, without a dtype.
        types: the storage type of each tensor, such as Q4_1, by its name in transformers.
    """

    path: Path
    config: Mapping[str, Any]
    types: Mapping[str, str]
    _reader: Any
    _names: Mapping[str, str]

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every tensor by its name in transformers, dequantized to fp32 one after the other.

        Raises:
            CheckpointError: a tensor is of a type that is not read.
        """
        import gguf

        for tensor in self._tensors:
            name = self._names[tensor.name]
            with failures_as(self._unread(tensor)):
                values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            values = values.reshape(tuple(int(size) for size in reversed(tensor.shape)))
            heads = self._rotated().get(part_of(name))
            yield name, values if heads is None else rotated_by_halves(values, heads)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor by its name in transformers."""
        return {self._names[each.name]: tuple(int(size) for size in reversed(each.shape)) for each in self._tensors}

    @property
    def _tensors(self) -> list[Any]:
        """Those of the library that the model has."""
        return [each for each in self._reader.tensors if each.name in self._names]

    def stored(self, names: Container[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Tensors by these names, those in transformers: the bytes, uint8 (rows, row_bytes) or (row_bytes,).

        The order of rows is that of transformers.
        """
        for tensor in self._tensors:
            name = self._names[tensor.name]
            if name not in names:
                continue
            shape = self.shapes[name]
            raw = np.ascontiguousarray(tensor.data).reshape(*shape[:-1], -1).view(np.uint8)
            heads = self._rotated().get(part_of(name))
            if heads is not None:
                raw = rotated_by_halves(raw if len(shape) > 1 else raw.reshape(shape[0], -1), heads)
            yield name, raw.reshape(*shape[:-1], -1)

    def _rotated(self) -> dict[str, int]:
        """Heads of the layers whose rows the converter put in another order, by path in a block."""
        if self._reader.get_field("general.architecture").contents() not in PERMUTED:
            return {}
        attention = table.named(self.config["architectures"][0]).attentions[0]
        return {str(attention.queries): self.config["num_attention_heads"],
                str(attention.keys): self.config["num_key_value_heads"]}  # fmt: skip

    def value(self, key: str) -> Any:
        """What the file says under a key, None if it has no such key."""
        field = self._reader.get_field(key)
        return None if field is None else field.contents()

    def _unread(self, tensor: Any) -> Callable[[str], CheckpointError]:
        what = f"{self.path}: {tensor.name} is stored as {tensor.tensor_type.name}, which is not read"
        return lambda why: CheckpointError(f"{what}: {why}")

    def tokenizer(self) -> Any:
        """The tokenizer that the file describes, its chat template included; None if it describes none. Digits are
        split as llama.cpp splits them for the pre-tokenizer that the file names, which transformers passes over.

        Raises:
            CheckpointError: it is of another kind, or cannot be read.
        """
        from tokenizers import pre_tokenizers
        from transformers import AutoTokenizer

        kind = tuple(_text(self._reader, f"tokenizer.ggml.{key}") for key in ("model", "pre"))
        if kind[0] == "none":
            return None
        if kind in gguf_tokenizer.READ:
            with failures_as(lambda why: CheckpointError(f"{self.path}: the tokenizer cannot be read: {why}")):
                return gguf_tokenizer.built(self.value)
        if kind not in _TOKENIZERS:
            raise CheckpointError(f"{self.path}: a tokenizer of the kind {kind[0]}, {kind[1]} is not read from GGUF; "
                                  "take that of the checkpoint that the file was made of")  # fmt: skip
        with failures_as(lambda why: CheckpointError(f"{self.path}: the tokenizer cannot be read: {why}")):
            found = AutoTokenizer.from_pretrained(
                self.path.parent, gguf_file=self.path.name, local_files_only=True, trust_remote_code=False
            )
            inner = found.backend_tokenizer
            split = pre_tokenizers.Digits(individual_digits=True)
            inner.pre_tokenizer = pre_tokenizers.Sequence([split, inner.pre_tokenizer])
        return found


def library() -> Any:
    """The library `gguf`. Raises CheckpointError where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(f"GGUF files are read with the library gguf: {install_command('gguf')}") from error
    return gguf


def open_file(path: Path) -> GGUFile:
    """Look into a file; tensors are read when they are asked for.

    Raises:
        CheckpointError: no such file, the library is missing, or the file is damaged, of another byte order or
            architecture, one of several, or lacks something.
    """
    gguf = library()
    if not path.is_file():
        raise CheckpointError(f"{path} is no file")
    gguf_header.check(path)
    with failures_as(lambda why: CheckpointError(f"{path} is no GGUF file, or is damaged: {why}")):
        reader = gguf.GGUFReader(path)
        values = {name: field.contents() for name, field in reader.fields.items() if len(field.data) < 2**10}
    if (parts := values.get("split.count", 1)) not in (0, 1):
        raise CheckpointError(f"{path} is one of {parts!r:.20} parts; join them with llama-gguf-split --merge")
    config = _config(path, values, reader)
    row = table.named(config["architectures"][0])
    tensors = [each for each in reader.tensors if each.name != gguf_rope.TENSOR or row.name != ROWS["llama"]]
    names = {each.name: _name(path, each.name, row, config["num_hidden_layers"]) for each in tensors}
    if len(set(names.values())) < len(tensors):
        raise CheckpointError(f"{path} holds a tensor twice")
    types = {names[each.name]: each.tensor_type.name for each in tensors}
    return GGUFile(path, config | {"tie_word_embeddings": row.head_weight not in types}, types, reader, names)


def _config(path: Path, values: Mapping[str, Any], reader: Any) -> dict[str, Any]:
    kind = values.get("general.architecture")
    if kind not in ROWS:
        raise CheckpointError(f"{path}: architecture {kind!r:.80} is not read from GGUF; read are {', '.join(ROWS)}")
    row = table.named(ROWS[kind])
    for key, value in values.items():
        own = key.removeprefix(f"{kind}.")
        changing = any(word in own for word in _CHANGING) and own not in gguf_rope.KEYS
        if own != key and changing and _NEUTRAL.get(own) != value:
            raise CheckpointError(f"{path}: {key} = {value!r:.80} is not read from GGUF; take the checkpoint that the "
                                  "file was made of")  # fmt: skip
    if missing := [f"{kind}.{key}" for key in _SIZES.values() if f"{kind}.{key}" not in values]:
        raise CheckpointError(f"{path} has no {missing[0]}; it is damaged, or of another version of GGUF")
    config = {name: values[f"{kind}.{key}"] for name, key in _SIZES.items()}
    tokens = reader.fields.get("tokenizer.ggml.tokens")
    config |= {
        "architectures": [row.name],
        "model_type": row.model_type,
        "vocab_size": values.get(f"{kind}.vocab_size") if tokens is None else len(tokens.data),
        "rope_theta": values.get(f"{kind}.rope.freq_base", 10000.0),
        "hidden_act": "silu",
    }
    checks.architecture_of(config, str(path))  # sizes that can be
    width = config["hidden_size"] // config["num_attention_heads"]
    config["head_dim"] = values.get(f"{kind}.attention.key_length", width)
    if values.get(f"{kind}.rope.dimension_count", config["head_dim"]) != config["head_dim"]:
        raise CheckpointError(f"{path} turns a part of each head by its position, which is not read from GGUF")
    checks.architecture_of(config, str(path))
    if (scaled := _positions(path, values, reader, config)) is not None:
        config["rope_parameters"] = scaled
    for name, key in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        if (token := values.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            config[name] = token
    return config


def _positions(path: Path, values: Mapping[str, Any], reader: Any, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """`rope_parameters` of scaled positions."""
    kind = values["general.architecture"]
    said = {key: values[f"{kind}.{key}"] for key in gguf_rope.KEYS if f"{kind}.{key}" in values}
    factors = next((each for each in reader.tensors if each.name == gguf_rope.TENSOR and kind == "llama"), None)
    if factors is not None and factors.tensor_type.name != "F32":
        raise CheckpointError(f"{path}: {gguf_rope.TENSOR} is stored as {factors.tensor_type.name}, expected F32")
    table = None if factors is None else torch.from_numpy(factors.data.copy())
    try:
        return gguf_rope.read(said, config, table, values.get(gguf_rope.SETTINGS))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def places(row: table.Architecture) -> tuple[dict[str, str], dict[str, str]]:
    """Paths in the model, and paths in a block, by what ggml calls them."""
    (attention,), (mlp,) = row.attentions, row.mlps
    inside = {
        "attn_norm": attention.norm, "attn_q": attention.queries, "attn_k": attention.keys,
        "attn_v": attention.producer,
        "attn_output": attention.writer, "ffn_norm": mlp.norm, "ffn_gate": mlp.gate, "ffn_up": mlp.producer,
        "ffn_down": mlp.writer, "attn_q_norm": row.query_norm, "attn_k_norm": row.key_norm,
    }  # fmt: skip
    outside = {"token_embd": row.embeddings, "output_norm": row.norm, "output": row.head}
    return outside, {name: path for name, path in inside.items() if path}


def part_of(name: str) -> str:
    """The path in its block of a tensor; of one outside the blocks its own.

    >>> part_of("model.layers.3.self_attn.q_proj.weight")
    'self_attn.q_proj'
    """
    stem = name.rpartition(".")[0]
    number = next((piece for piece in stem.split(".") if piece.isdigit()), None)
    return stem if number is None else stem.partition(f".{number}.")[2]


def _name(path: Path, name: str, row: table.Architecture, layers: int) -> str:
    """transformers' name of a tensor, by the row of the architecture."""
    (outside, inside), suffix = places(row), name.rpartition(".")[2]
    stem = name.removesuffix(f".{suffix}")
    if suffix in ("weight", "bias") and stem in outside:
        return f"{outside[stem]}.{suffix}"
    lead, _, rest = stem.partition(".")
    block, _, part = rest.partition(".")
    if lead == "blk" and suffix in ("weight", "bias") and block in map(str, range(layers)) and part in inside:
        return f"{row.block(int(block))}.{inside[part]}.{suffix}"
    raise CheckpointError(f"{path}: tensor {name!r:.80} has no place in {row.name}; it is of another architecture")


def _text(reader: Any, key: str) -> str:
    field = reader.get_field(key)
    return "none" if field is None else f"{field.contents()!s:.40}"


def rotated_by_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys (heads x head size, ...) from ggml's order, channels 2 i and 2 i + 1 of a head turned
    together, into that of transformers, where these are i and i + head size / 2.

    >>> rotated_by_halves(np.arange(8), heads=2).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    size = weight.shape[0] // heads
    return weight.reshape(heads, size // 2, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def rotated_by_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `rotated_by_halves`.

    >>> rotated_by_pairs(np.array([0, 2, 1, 3, 4, 6, 5, 7]), heads=2).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    size = weight.shape[0] // heads
    return weight.reshape(heads, 2, size // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
