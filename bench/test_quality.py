"""Quality: what the compressed model still knows."""

import pytest

from bench._errors import DataError
from bench.metrics.perplexity import PerplexityProtocol, perplexity
from compression import Recipe
from compression._recipe import UNCOMPRESSED

pytestmark = pytest.mark.quality

_BATCH = 4  # fixed, since scores move in their last bits with it


def _protocol(workbench):
    protocol = PerplexityProtocol(batch_size=_BATCH, **workbench.options.protocol)
    asked = {"protocol": protocol.name, "length": protocol.length, "split": protocol.split, "batch": _BATCH}
    return protocol, asked


def _read(workbench, protocol, recipe):
    """The model under a recipe, read beside the base; the base alone for fp16."""
    tokenizer, device = workbench.base.tokenizer, workbench.options.device
    if tokenizer is None:
        raise DataError(f"base {workbench.source.text} has no tokenizer: perplexity needs tokenizer.json beside it")

    def of(model, base=None):
        return perplexity(model.model, tokenizer, workbench.data, protocol, device=device, base=base and base.model)

    if recipe.text == UNCOMPRESSED:
        return workbench.base_reading(("perplexity", protocol), lambda: of(workbench.base))
    return workbench.reading(recipe, protocol, lambda model: of(model, workbench.base))


@pytest.mark.ordering
def test_perplexity(workbench, recipe):
    protocol, asked = _protocol(workbench)
    workbench.note_data("perplexity", workbench.data.source(protocol.split, what=protocol.what).digest)

    def take():
        base = _read(workbench, protocol, Recipe())
        return (base, None) if recipe.text == UNCOMPRESSED else (_read(workbench, protocol, recipe), base)

    workbench.measure("perplexity", recipe, take, asked)


def test_divergence(workbench, recipe):
    if recipe.text == UNCOMPRESSED:
        pytest.skip("the base does not differ from itself")
    protocol, asked = _protocol(workbench)
    workbench.note_data("divergence", workbench.data.source(protocol.split, what=protocol.what).digest)

    def take():
        found = _read(workbench, protocol, recipe).divergence
        return found, found.of_itself

    workbench.measure("divergence", recipe, take, asked)
