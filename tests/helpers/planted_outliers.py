"""Outliers planted into a decoder without a change of what it computes."""

import torch

from compression.architectures.edits import fold_norms
from compression.architectures.rotations import RotateStream


def in_principal_basis(model, ids):
    """Turn the residual stream of a decoder, in place, into the principal directions of what reaches its norms on token
    ids (samples, length): a few channels of a token are then far larger than all others, and no gain of a norm has them
    in it, which folding would take out. The directions."""
    decoder = fold_norms(model)
    second = torch.zeros(decoder.width, decoder.width, dtype=torch.float64)

    def see(_, arguments):
        x = arguments[0].flatten(0, -2).double()
        x = x / x.square().mean(-1, keepdim=True).sqrt()  # as norms see it
        second.add_(x.T @ x)

    hooks = [place.norm.register_forward_pre_hook(see) for place in decoder.places()]
    with torch.no_grad():
        for sample in ids.split(1):
            decoder.model(sample, use_cache=False)
    for hook in hooks:
        hook.remove()
    directions = torch.linalg.eigh(second).eigenvectors.flip(-1)
    RotateStream(directions).apply(decoder)
    return directions
