"""Folders as versions before layers had parts wrote them."""

import safetensors.torch


def of_schema_1(layer):
    """The description of a layer of codes as it was before layers had parts."""
    codes = {name: layer["weight"][name] for name in ("grid", "dtype", "permuted")}
    common = {name: layer[name] for name in ("in_features", "out_features", "compute_dtype", "backend")}
    return codes | common | {"bias": layer["bias"] is not None, "threshold": None}


def tensors_of_schema_1(path, new):
    """Move the tensors of `path` to the file `new`, under the names of then."""
    tensors = safetensors.torch.load_file(path)
    path.unlink()
    named = {name.replace("weight_part.", ""): tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(named, new, {"format": "pt"})
