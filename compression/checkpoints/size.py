"""What a model takes when it is stored: bytes and numbers of its layers and other tensors."""

from typing import Any

from compression.architectures import decoder
from compression.layers.parts import Part


def stored_bytes(model: Any) -> int:
    """Bytes of parameters and persistent buffers as `Compressed.save` stores them, shared ones once."""
    total, seen = 0, set()
    for module in model.modules():
        if id(module) in seen:
            continue
        if isinstance(module, Part):  # it may hold its tensors otherwise than they are stored
            own = module.tensors().values()
            total += module.bytes - sum(tensor.nbytes for tensor in own if id(tensor) in seen)
            seen |= {id(each) for each in (*own, *module.modules())}
            continue
        transient = module._non_persistent_buffers_set
        tensors = [*module._parameters.values(), *(b for n, b in module._buffers.items() if n not in transient)]
        for tensor in tensors:
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                total += tensor.numel() * tensor.element_size()
    return total


def count_parameters(model: Any) -> int:
    """Weights of the model as mathematics: a packed or sparse layer has as many as the dense one that it replaced."""
    layers = decoder.stored_layers(model).values()
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    outside = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in inside)
    return sum(layer.weights for layer in layers) + outside
