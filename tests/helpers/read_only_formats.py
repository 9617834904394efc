"""Checkpoints of hqq and torchao, written number by number from the descriptions of their layouts alone."""

import json
from functools import reduce

import torch
from checkpoints import transformers_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
         "num_key_value_heads": 2}  # fmt: skip
NAME = "model.layers.0.mlp.up_proj"
_IN_WORD = {8: 1, 4: 2, 3: 10, 2: 4}


def published(folder, quantization, quantize, *, architecture="LlamaForCausalLM", dtype=torch.bfloat16):
    """A checkpoint whose linear layers `quantize(name, weight)` stores: the tensors behind their name, the weight in
    fp64 that these stand for, and what the metadata says of it; None for one that stays dense. The weights by name."""
    model = transformers_model(architecture, dtype=dtype, **SIZES)
    tensors, weights, said = {name: each.clone() for name, each in model.state_dict().items()}, {}, {}
    for name, linear in model.named_modules():
        made = quantize(name, linear.weight.detach().double()) if isinstance(linear, torch.nn.Linear) else None
        if made is None:
            continue
        del tensors[f"{name}.weight"]
        stored, weights[name], metadata = made
        tensors |= {f"{name}.{key}": each for key, each in stored.items()}
        said |= {} if metadata is None else {f"{name}.weight": metadata}
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [architecture]
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    save_file(tensors, folder / "model.safetensors", metadata=metadata_of(model, said))
    return weights


def metadata_of(model, said):
    plain = {name: {"_type": "Tensor"} for name in model.state_dict() if name not in said}
    names = {"tensor_names": list(model.state_dict())} if said else {}
    return {"format": "pt"} | {
        name: json.dumps(each) for name, each in (names | said | (plain if said else {})).items()
    }


def change_stored(folder, change):
    """Tensors and metadata, each parsed where it is JSON, changed in place; None of metadata is taken out."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = {name: text if name == "format" else json.loads(text) for name, text in file.metadata().items()}
    change(tensors, metadata)
    save_file(tensors, path, metadata={
        name: each if isinstance(each, str) else json.dumps(each) for name, each in metadata.items()
    })  # fmt: skip


# --- hqq --------------------------------------------------------------------------------------------------------------


def hqq_setting(bits=4, size=32, **changes):
    weights = {"nbits": bits, "group_size": size, "axis": 1, "channel_wise": True, "optimize": True,
               "round_zero": bits == 4, "view_as_float": False} | changes  # fmt: skip
    return {"weight_quant_params": weights, "scale_quant_params": None, "zero_quant_params": None,
            "offload_meta": False}  # fmt: skip


def hqq_config(setting, skipped=("lm_head",)):
    return {"quant_method": "hqq", "quant_config": setting, "skip_modules": list(skipped)}


def hqq_words(rows, bits):
    """Rows of codes, packed along the rows: the first of the equal parts is in the highest bits."""
    count = _IN_WORD[bits]
    rows = rows + [[0] * len(rows[0])] * (-len(rows) % count)
    step = len(rows) // count
    return [
        [
            reduce(lambda word, part: word << bits | rows[part * step + i][j], range(count), 0)
            for j in range(len(rows[0]))
        ]
        for i in range(step)
    ]


def hqq_layer(weight, setting, *, view=None, dtype=torch.float16):
    """What `published` takes of a weight (out, in), on random levels."""
    params, (out, inputs) = setting["weight_quant_params"], weight.shape
    bits, size = params["nbits"], params["group_size"] or weight.shape[1]
    generator = torch.Generator().manual_seed(out * inputs + bits)
    codes = torch.randint(0, 2**bits, (out * inputs // size, size), generator=generator)
    scale = (torch.rand(len(codes), 1, generator=generator) * 0.01 + 0.001).to(dtype)
    zero = (torch.rand(len(codes), 1, generator=generator) * 2**bits).to(dtype)
    words = torch.tensor(hqq_words(codes.tolist(), bits)).to(torch.int32 if bits == 3 else torch.uint8)
    stored = {
        "W_q": words if view is None else words.view(view), "scale": scale, "zero": zero,
        "shape": torch.tensor([out, inputs]), "nbits": int32(bits), "group_size": int32(size), "axis": int32(1),
        "packing": text(f"{bits}bit_{'32' if bits == 3 else 'u8'}"), "compute_dtype": text(str(dtype)),
        "unpack_view_dtype": text(str(words.dtype)), "view_as_float": flag(view is not None),
        **{name: flag(True) for name in ("channel_wise", "optimize", "encoded_state_dict", "stores_quant_config")},
        **{name: flag(False) for name in ("quant_scale", "quant_zero", "offload_meta", "round_zero")},
    }  # fmt: skip
    return stored, (scale.double() * (codes - zero.double())).view(out, inputs), None


def int32(value):
    return torch.tensor(value, dtype=torch.int32)


def flag(value):
    return torch.tensor(int(value), dtype=torch.uint8)


def text(value):
    return torch.tensor(list(value.encode()), dtype=torch.uint8)


# --- torchao ----------------------------------------------------------------------------------------------------------


def torchao_config(kind="Int8WeightOnlyConfig", version=2, **data):
    setting = {"_type": kind, "_version": version, "_data": data}
    return {"quant_method": "torchao", "quant_type": {"default": setting}, "modules_to_not_convert": None,
            "include_input_output_embeddings": False, "untie_embedding_weights": False}  # fmt: skip


def torchao_layer(weight, kind="Int8Tensor", *, block=None, bits=8, zeros=False, scales=torch.float32):
    """On random levels; `block` of (rows, columns), by default a row."""
    (out, inputs), generator = weight.shape, torch.Generator().manual_seed(weight.numel())
    block = list(block or (1, inputs))
    shape, middle = (-(-out // block[0]), inputs // block[1]), 2 ** (bits - 1)
    scale = (torch.rand(shape, generator=generator) * 0.01 + 0.001).to(scales)
    if kind == "Float8Tensor":
        data = torch.randn(out, inputs, generator=generator).to(torch.float8_e4m3fn)
    else:
        data = torch.randint(-middle, middle, (out, inputs), generator=generator).to(torch.int8)
    zero = torch.randint(-middle, middle, shape, generator=generator).to(torch.int8)
    zero = zero if zeros else torch.zeros_like(zero)
    stored = {"_weight_qdata": data, "_weight_scale": scale}
    attributes = {"block_size": block, "dtype": {"_type": "torch.dtype", "_data": "bfloat16"}}
    if kind == "Float8Tensor":
        attributes |= {"mm_config": None, "act_quant_kwargs": None}
    else:
        stored["_weight_zero_point"] = zero
    if kind == "IntxUnpackedToInt8Tensor":
        attributes |= {"target_dtype": {"_type": "torch.dtype", "_data": f"int{bits}"}, "activation_quantization": None}
    value = torch.tensor([
        [float(scale[i // block[0], j // block[1]]) * (float(data[i, j]) - float(zero[i // block[0], j // block[1]]))
         for j in range(inputs)] for i in range(out)
    ], dtype=torch.float64)  # fmt: skip
    names = [name.removeprefix("_weight_") for name in stored]
    return stored, value, {"_type": kind, "_data": attributes, "_tensor_data_names": names}
