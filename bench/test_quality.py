"""Quality: what the compressed model still knows."""

import pytest

from bench._errors import DataError
from bench.metrics.perplexity import PerplexityProtocol, perplexity
from compression._recipe import UNCOMPRESSED

pytestmark = pytest.mark.quality

_BATCH = 4  # fixed, since scores move in their last bits with it


@pytest.mark.ordering
def test_perplexity(workbench, recipe):
    protocol = PerplexityProtocol(batch_size=_BATCH, **workbench.options.protocol)
    workbench.note_data("perplexity", workbench.data.source(protocol.split, what=protocol.what).digest)

    def of(model):
        tokenizer = workbench.base.tokenizer
        if tokenizer is None:
            raise DataError(f"base {workbench.source.text} has no tokenizer: perplexity needs tokenizer.json beside it")
        return perplexity(model.model, tokenizer, workbench.data, protocol, device=workbench.options.device)

    def take():
        base = workbench.base_reading(("perplexity", protocol), lambda: of(workbench.base))
        return (base, None) if recipe.text == UNCOMPRESSED else (of(workbench.compressed(recipe)), base)

    asked = {"protocol": protocol.name, "length": protocol.length, "split": protocol.split, "batch": _BATCH}
    workbench.measure("perplexity", recipe, take, asked)
