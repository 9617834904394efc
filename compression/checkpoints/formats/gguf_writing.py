"""A model as one GGUF file: hyperparameters, tokenizer, and every tensor in a type of ggml that holds it exactly.

    part `ggml`                                            the bytes as they are
    dense bf16, fp16, fp32                                 BF16, F16, F32; vectors F32, as llama.cpp has them
    codes of `rtn(bits=4|8,group_size=32,symmetric=true)`  Q4_0, Q8_0, if fp16 holds the scales

Nothing else is converted: a layer that fits none of these is refused. Names are in `gguf.ROWS` and `gguf.places`.
Needs the library `gguf` (extra `gguf`) to write; a check does not.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compression.architectures import decoder, description, embeddings
from compression.architectures.table import architecture_of
from compression.checkpoints.formats import gguf, gguf_rope, gguf_tokenizer, writing
from compression.errors import LayerError
from compression.layers.embedding import Embedding
from compression.layers.linear import Linear
from compression.numeric import packing
from compression.numeric.grids import AffineGrid

NAME = "model.gguf"
RECIPE = "compression_bench.recipe"
ARCHITECTURES = {**{row: name for name, row in gguf.ROWS.items()}, "MistralForCausalLM": "llama"}
_DENSE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_BLOCKS = {4: "Q4_0", 8: "Q8_0"}  # of codes, by their bits
_FITS = "what fits is the method gguf, rtn(bits=4 or 8,group_size=32,symmetric=true), and dense layers"
_FILE_TYPES = {  # llama_ftype by the type of most weights
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12, "Q4_K": 15,
    "Q5_K": 17, "Q6_K": 18, "BF16": 32,
}  # fmt: skip


def obstacle(layer: nn.Linear | Linear) -> str | None:
    """Why there is no type for a layer, or None."""
    if not isinstance(layer, Linear):
        return None if layer.weight.dtype in _DENSE else f"its weight is {layer.weight.dtype}"
    first, *beside = layer.weight_part.summands
    places = [each.kind for each in (layer.input_part, layer.output_part) if each is not None]
    if places:
        return f"it has no place for {', '.join(places)}"
    if beside:
        return f"its weight is a sum with {beside[0].kind}; recover with merge=all"
    if first.kind == "ggml" or (first.kind == "dense" and first.dtype in _DENSE):
        return None
    if first.kind != "codes" or first.permutation is not None:
        what = "codes in activation order" if first.kind == "codes" else f"a weight of kind {first.kind}"
        return f"it has no block type for {what}; {_FITS}"
    grid = first.grid
    if not (isinstance(grid, AffineGrid) and grid.bits in _BLOCKS and grid.group_size == 32 and grid.symmetric):
        return f"it has no block type for {grid.words}; {_FITS}"
    return None


def check_model(model: nn.Module) -> None:
    """Raise LayerError if the format has no place for the model, whatever its layers are stored in."""
    name, config = type(model).__name__, model.config
    if name not in ARCHITECTURES:
        raise LayerError(f"format gguf cannot hold {name}; written are {', '.join(ARCHITECTURES)}")
    writing.check_cache("gguf", model)
    if description.describe(model):
        raise LayerError("format gguf cannot hold edits of the model (compression.architectures.edits); leave out the "
                         "step that makes them")  # fmt: skip
    rope = getattr(config, "rope_parameters", None) or {}
    try:
        gguf_rope.written(rope, ARCHITECTURES[name])
    except ValueError as error:
        raise LayerError(f"format gguf cannot hold these scaled positions: {error}") from error
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and window < config.max_position_embeddings:
        raise LayerError(f"format gguf is not written with a sliding window ({window}), which llama.cpp passes over")
    if config.hidden_act != "silu":
        raise LayerError(f"format gguf is written with hidden_act=silu, not {config.hidden_act}")
    row = architecture_of(model)
    for path in (row.embeddings, row.head):
        layer = _layer(model.get_submodule(path))
        reason = None if isinstance(layer, nn.Embedding) else obstacle(layer)
        if reason:
            raise LayerError(f"format gguf cannot hold {path}: {reason}")


def check_scales(model: nn.Module) -> None:
    """Raise LayerError if fp16 would round the scales of a layer."""
    for name, layer in decoder.stored_layers(model).items():
        _check_scales(name, _layer(layer))


def _check_scales(name: str, layer: Linear) -> None:
    part = layer.weight_part.summands[0]
    if part.kind == "codes" and not torch.equal(part.scales.half().float(), part.scales.float()):
        raise LayerError(f"format gguf stores scales in fp16, which would round those of {name} "
                         f"({part.scales.dtype}); compress a checkpoint of fp16 or bf16")  # fmt: skip


def filler(result: Any, filling: Callable[[], Iterator[Any]]) -> Callable[[Path], None]:
    """What writes a model, whose shapes were checked, into a folder.

    Args:
        filling: goes through the pieces of the model, what is outside the blocks first, each of which has its tensors
            until the next is asked for.

    Raises:
        CheckpointError: the library is missing.
        LayerError: the tokenizer has no name in llama.cpp.
    """
    library = gguf.library()
    config = result.model.config
    tokens = gguf_tokenizer.described(result.tokenizer, config.vocab_size)

    def fill(folder: Path) -> None:
        writer = library.GGUFWriter(folder / NAME, ARCHITECTURES[type(result.model).__name__])
        with closing(writer):
            _write_values(writer, result, tokens)
            _write_tensors(writer, result.model, filling)

    return fill


def _write_tensors(writer: Any, model: nn.Module, filling: Callable[[], Iterator[Any]]) -> None:
    """What is in the file is told first; values follow in that order, which is that of the pieces."""
    types, count = gguf.library().GGMLQuantizationType, Counter[str]()
    factors, modules = _rope_factors(model.config), list(_modules(model))
    if factors is not None:
        writer.add_tensor_info(gguf_rope.TENSOR, factors.shape, factors.dtype, factors.nbytes, types.F32)
    for _, name, module, _ in modules:
        for suffix, (kind, values) in _of_module(module).items():
            dtype = np.dtype(np.float32 if values.dtype == torch.float32 else np.uint8)
            writer.add_tensor_info(f"{name}.{suffix}", values.shape, dtype, values.nbytes, types[kind])
            count[kind] += values.nbytes if name.startswith("blk.") and values.ndim > 1 else 0
    writer.add_file_type(_FILE_TYPES[count.most_common(1)[0][0]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for _ in filling():
        while modules and not next(iter(_layer(modules[0][2]).state_dict().values())).is_meta:
            _write_module(writer, *modules.pop(0))


def _write_module(writer: Any, path: str, _: str, module: Any, heads: int | None) -> None:
    if isinstance(_layer(module), Linear):
        _check_scales(path, _layer(module))
    for _, values in _of_module(module).values():
        array = values.cpu().numpy()
        writer.write_tensor_data(array if heads is None else gguf.rotated_by_pairs(array, heads))


def _write_values(writer: Any, result: Any, tokens: dict[str, Any]) -> None:
    config = result.model.config
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = getattr(config, "rope_parameters", None) or {}
    writer.add_name(result.base[0])
    writer.add_quantization_version(2)
    writer.add_string(RECIPE, json.dumps(result.recipe.to_json(), sort_keys=True))
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    kind = ARCHITECTURES[type(result.model).__name__]
    scaled = {key if key == gguf_rope.SETTINGS else f"{kind}.{key}": value
              for key, value in gguf_rope.written(rope, kind).items()}  # fmt: skip
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
           list: writer.add_array}  # fmt: skip
    for key, value in (scaled | {f"tokenizer.{key}": value for key, value in tokens.items()}).items():
        add[type(value)](key, value)


def _rope_factors(config: Any) -> np.ndarray | None:
    """The tensor by which positions of Llama 3 are scaled, fp32 (head_dim / 2,); None for others."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "llama3":
        return None
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return gguf_rope.factors_of(rope, width).numpy()


def _modules(model: nn.Module) -> Iterator[tuple[str, str, Any, int | None]]:
    """All that has tensors, what is outside the blocks first: its path, ggml's name, itself, and how many heads its
    rows are those of, where ggml has them in another order."""
    row, config = architecture_of(model), model.config
    outside, inside = gguf.places(row)
    paths = {path: name for name, path in outside.items()}
    for number in range(config.num_hidden_layers):
        paths |= {f"{row.block(number)}.{path}": f"blk.{number}.{name}" for name, path in inside.items()}
    attention = row.attentions[0]
    permuted = ARCHITECTURES[type(model).__name__] in gguf.PERMUTED
    heads = {attention.queries: config.num_attention_heads, attention.keys: config.num_key_value_heads}
    for path, name in paths.items():
        if path == row.head and embeddings.tied(model):
            continue
        try:
            module = model.get_submodule(path)
        except AttributeError:
            continue
        yield path, name, module, heads.get(gguf.part_of(f"{path}.weight")) if permuted else None


def _layer(module: Any) -> Any:
    return module.table if isinstance(module, Embedding) else module


def _of_module(module: Any) -> dict[str, tuple[str, Tensor]]:
    """Of a layer, embeddings or a norm, by "weight" and "bias", ggml's type and the bytes or fp32 values."""
    layer = _layer(module)
    part = layer.weight_part.summands[0] if isinstance(layer, Linear) else None
    if part is None or part.kind == "dense":
        found = {"weight": _dense(layer.weight)}
    elif part.kind == "ggml":
        found = {"weight": (part.type, part.raw)}
    else:
        kind = _BLOCKS[part.grid.bits]
        found = {"weight": (kind, _of_codes(part, kind))}
    if getattr(layer, "bias", None) is not None:
        found["bias"] = _dense(layer.bias)
    return found


def _dense(tensor: Tensor) -> tuple[str, Tensor]:
    values = tensor.detach().contiguous()
    if values.ndim == 1 or values.dtype == torch.float32:
        return "F32", values.float()
    return _DENSE[values.dtype], values.view(torch.uint8)


def _of_codes(part: Any, kind: str) -> Tensor:
    """Blocks of a scale in fp16 and 32 codes; those of 8 bits are stored as signed numbers."""
    rows, cols = part.shape
    codes = packing.unpack(part.canonical(), part.grid.bits, cols).view(-1, 32)
    scales = part.scales.half().contiguous().view(torch.uint8).view(-1, 2)
    if kind == "Q8_0":
        return torch.cat([scales, codes ^ 128], -1).view(rows, -1)
    low, high = codes.chunk(2, -1)
    return torch.cat([scales, low | (high << 4)], -1).view(rows, -1)
