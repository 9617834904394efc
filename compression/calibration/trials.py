"""Layers tried in other forms on a little of the calibration text, by what their consumers get of them."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from compression.architectures.decoder import Block, Site
from compression.calibration.capture import Seen

SAMPLES = 2  # of the first run of samples, that forms are tried on
Form = Callable[[nn.Module], nn.Module]


def best(seen: Seen, site: Site, forms: Sequence[Form]) -> int:
    """Which of the forms of a site's readers leaves least squared error; the first of those that leave as little.

    Of what a norm puts out the consumer is the rest of its half: the error is that of what its writers read, attention
    or the gated MLP included. Of all else it is the reader itself. Its process has the samples, and tells the others.
    """
    share = seen.states.share
    owner = next(rank for rank in range(share.workers.count) if share.of(rank))
    [losses] = share.workers.run([owner], [partial(_losses, seen, site, forms)])
    return min(range(len(forms)), key=losses.__getitem__)


@torch.no_grad()
def _losses(seen: Seen, site: Site, forms: Sequence[Form]) -> list[float]:
    _, first = seen.states.share.runs()[0]
    samples = range(min(SAMPLES, len(first)))
    module = seen.states.computing(seen.block)
    whole = site.row.of in ("norm", "latent")
    dense = {path: module.get_submodule(path) for path in site.row.readers}
    read: list[Tensor] = []
    for path in _writers(seen.block, site) if whole else site.row.readers:
        module.get_submodule(path).register_forward_pre_hook(lambda _, x: read.append(x[0].detach()))

    def run() -> list[Tensor]:
        read.clear()
        for number in samples:
            seen.states.through(module, number)
        return list(read)

    inputs = run()
    if not whole:
        [path] = dense
        return [_apart((dense[path](x), form(dense[path])(x)) for x in inputs) for form in forms]
    losses = []
    for form in forms:
        for path, layer in dense.items():
            module.set_submodule(path, form(layer))
        losses.append(_apart(zip(inputs, run(), strict=True)))
    return losses


def _apart(pairs: object) -> float:
    return sum(float((one - other).double().square().sum()) for one, other in pairs)  # type: ignore[attr-defined]


def _writers(block: Block, site: Site) -> list[str]:
    """Paths of what writes the stream in the halves that a site is of."""
    readers = set(site.row.readers)
    own = [half for half in block.halves if readers & {*half.site.readers, *sum((s.readers for s in half.latents), ())}]
    return [path for half in own for path in half.writers]
