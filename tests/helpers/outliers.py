"""Outliers planted in the activations of a model, which computes what it did: all norms of its blocks put out some
channels many times as large, and what reads them has columns as many times smaller."""

import torch

from compression.architectures.decoder import Decoder

CHANNELS, FACTOR = 10, 30.0


def plant(model, channels=CHANNELS, factor=FACTOR, seed=0):
    """In place, by hand, `channels` of each norm's output; how many norms."""
    generator, decoder, norms = torch.Generator().manual_seed(seed), Decoder(model), 0
    for block in decoder.blocks:
        for site in block.sites:
            if site.row.of not in ("norm", "latent"):
                continue
            norm, norms = site.producer, norms + 1
            chosen = torch.randperm(len(norm.weight), generator=generator)[:channels]
            factors = torch.ones(len(norm.weight), dtype=norm.weight.dtype)
            factors[chosen] = factor
            with torch.no_grad():
                norm.weight.copy_((norm.weight + decoder.row.norm_offset) * factors - decoder.row.norm_offset)
                if getattr(norm, "bias", None) is not None:
                    norm.bias.mul_(factors)
                for path in (*site.row.readers, *site.row.routers):
                    block.layer(path).weight.div_(factors)
    return norms
