"""The published formats written out one code at a time, from their descriptions alone: the oracle of `_formats`."""

import json
from dataclasses import dataclass

import torch
from checkpoints import transformers_model
from safetensors.torch import save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass
class Layer:
    """codes (out, in), scales fp16 (out, groups), zeros (out, groups), g_idx (in,)."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    g_idx: torch.Tensor

    def weight(self, dtype=torch.float16):
        """(out, in), one number at a time, rounded once."""
        g_idx = self.g_idx.tolist()
        rows = zip(self.codes.tolist(), self.scales.tolist(), self.zeros.tolist(), strict=True)
        return torch.tensor([
            [scales[g] * (code - zeros[g]) for code, g in zip(codes, g_idx, strict=True)]
            for codes, scales, zeros in rows
        ], dtype=torch.float64).to(dtype)  # fmt: skip


def random_layer(rows, cols, bits, group_size, *, symmetric=False, desc_act=False, zeros=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    group = cols if group_size == -1 else group_size
    g_idx = torch.arange(cols) // group
    if desc_act:
        g_idx = g_idx[torch.randperm(cols, generator=generator)]
    shape = (rows, cols // group)
    if symmetric:
        zeros = 2 ** (bits - 1)
    drawn = torch.randint(0, 2**bits, shape, generator=generator)
    return Layer(
        codes=torch.randint(0, 2**bits, (rows, cols), generator=generator),
        scales=(torch.rand(shape, generator=generator) * 0.02 + 0.001).half(),
        zeros=drawn if zeros is None else torch.full(shape, zeros),
        g_idx=g_idx,
    )


def gptq_words(codes, bits):
    """Packs a list of codes as AutoGPTQ's loop does."""
    words = []
    if bits != 3:
        for start in range(0, len(codes), 32 // bits):
            words.append(sum(code << bits * j for j, code in enumerate(codes[start : start + 32 // bits])))
        return words
    for start in range(0, len(codes), 32):
        c = codes[start : start + 32]
        first = sum(c[j] << 3 * j for j in range(10)) | c[10] << 30
        second = c[10] >> 2 | sum(c[11 + j] << 3 * j + 1 for j in range(10)) | c[21] << 31
        third = c[21] >> 1 | sum(c[22 + j] << 3 * j + 2 for j in range(10))
        words += [first, second, third]
    return [word & 0xFFFFFFFF for word in words]


def gptq_tensors(layer, bits, version):
    """Version "gptq" as GPTQModel makes it of "gptq_v2": less one in every field of a word, with borrows."""
    qweight = [gptq_words(column, bits) for column in layer.codes.tolist()]  # one list of words to an output
    qzeros = []
    for zeros in layer.zeros.t().tolist():
        if version == "gptq" and bits == 3:
            zeros = [(zero - 1) % 8 for zero in zeros]
        words = gptq_words(zeros, bits)
        if version == "gptq" and bits != 3:
            words = [word - sum(1 << j for j in range(0, 32, bits)) for word in words]
        qzeros.append(words)
    return {
        "qweight": int32(qweight).t().contiguous(),
        "qzeros": int32(qzeros),
        "scales": layer.scales.t().contiguous(),
        "g_idx": layer.g_idx.int(),
    }


def awq_words(codes):
    words = []
    for start in range(0, len(codes), 8):
        words.append(sum(codes[start + column] << 4 * j for j, column in enumerate(AWQ_ORDER)))
    return words


def awq_tensors(layer):
    return {
        "qweight": int32([awq_words(row) for row in layer.codes.t().tolist()]),
        "qzeros": int32([awq_words(row) for row in layer.zeros.t().tolist()]),
        "scales": layer.scales.t().contiguous(),
    }


def int32(words):
    signed = [[(word + 2**31) % 2**32 - 2**31 for word in row] for row in words]
    return torch.tensor(signed, dtype=torch.int32)


def tensors_of(layer, quantization):
    if quantization["quant_method"] == "awq":
        return awq_tensors(layer)
    return gptq_tensors(layer, quantization["bits"], quantization.get("checkpoint_format", "gptq"))


def publish(folder, architecture, quantization, *, dtype=torch.float32, dense=(), lm_head=False):
    """A checkpoint of random codes in the published layout; returns the dense model of the same weights."""
    model = transformers_model(architecture, dtype=dtype, hidden_size=64, num_hidden_layers=1).eval()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, linear in model.named_modules():
        if isinstance(linear, torch.nn.Linear) and name not in dense and (lm_head or name != "lm_head"):
            layer = random_layer(
                linear.out_features, linear.in_features, quantization["bits"], quantization["group_size"],
                symmetric=quantization.get("sym", False), desc_act=quantization.get("desc_act", False), seed=len(name),
            )  # fmt: skip
            linear.weight.data = layer.weight(dtype)
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{key}": tensor for key, tensor in tensors_of(layer, quantization).items()}
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [architecture]
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return model
