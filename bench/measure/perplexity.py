"""How well a model predicts text: perplexity, the exponential of the mean negative log-likelihood per token.

    nll = sum over scored tokens t of -log p(t | tokens before t in the same sample);   perplexity = exp(nll / tokens)

Three protocols, since published numbers differ by more than any compression does (Mistral-7B: about 5 and 12.79):

- `default`: the rows joined with a blank line, tokenised once without special tokens, cut in windows of `length`;
  `samples` of them spread evenly over the text (of the embedded world, whose documents are drawn, the first). They are
  disjoint unless a smaller `stride` is given; the first token of the text (of each disjoint window) has no context and
  is not scored.
- `e`: table 4 of the E-JUST paper as its published code computes it: `samples` rows spread evenly over the split; of
  these the blank ones (at most 10 characters) are dropped; each is stripped, tokenised with the tokenizer's own special
  tokens, cut off at `length`, and scored alone. Summed over tokens, not averaged over rows. With `stride` a row longer
  than `length` goes on in further windows instead of being cut off.
- `o`: whole conversations, spread evenly over the split, in the tokenizer's chat template where it has one; the
  exponential of the mean of their means. A conversation longer than the model's context is cut off there.

Departure from the published code: a sample that fails is an error, not skipped.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from bench.data.sources import Data
from bench.errors import DataError, MetricError
from bench.measure import rope
from bench.measure.divergence import Divergence, diverge, shares
from bench.measure.perplexity_windows import PerplexityProtocol, Sample, samples_of
from bench.results.items import Items, hashes_of
from bench.results.row import Input
from compression import architectures, caches

if TYPE_CHECKING:
    import torch

CHUNK_TOKENS = 1024  # positions whose logits exist at once, at most
CHUNK_ELEMENTS = 2**25  # positions x vocabulary of one chunk, at most: 128 MiB of fp32
KEPT_BYTES = 2**31  # hidden states of the base that a run keeps, at most
TOKEN_BUDGET = {"cpu": 2_048, "cuda": 16_384}  # tokens in one forward pass, padding included


@dataclass(frozen=True, kw_only=True)
class PerplexityReading:
    """One measurement: sums in float64, and the mean of each sample for paired comparisons."""

    nll: float  # nats, summed over the scored tokens
    tokens: int  # scored
    sample_means: tuple[float, ...]  # nats per token of each sample, in the order of the data
    bits_per_byte: float | None  # None where a window cuts a character, or the tokenizer has no offsets
    truncated: int  # samples cut off
    batch_size: int
    data: str
    digest: str
    protocol: PerplexityProtocol
    sample_tokens: tuple[int, ...] = ()  # scored of each sample
    asked: tuple[str, ...] = ()  # hash of each sample
    divergence: Divergence | None = None  # from the base, where one was read beside the model
    inputs: Mapping[str, Input] = field(default_factory=dict)  # the text, by name and digest

    @property
    def items(self) -> dict[str, Items]:
        """The loss of each sample, in nat per token, weighted so that their mean is `mean_nll`."""
        means = self.sample_means
        if self.protocol.name != "o":
            sums = [mean * count for mean, count in zip(means, self.sample_tokens, strict=True)]
            means = shares(sums, self.sample_tokens)
        items = Items(self.asked, means, "real")
        return {"quality.perplexity": items, "quality.nll": items}

    @property
    def mean_nll(self) -> float:
        """Nats per token; for protocol "o" the mean of the conversations' means."""
        if self.protocol.name == "o":
            return math.fsum(self.sample_means) / len(self.sample_means)
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(mean_nll); raises MetricError where that is beyond a float."""
        try:
            return math.exp(self.mean_nll)
        except OverflowError:
            raise MetricError(f"perplexity exp({self.mean_nll:.6g}) is beyond a float: the model is broken") from None

    @property
    def params(self) -> dict[str, Any]:
        """What belongs to the key of the row, as it was: samples scored and batch size used, not those asked for."""
        return {
            "protocol": self.protocol.name,
            "data": self.data,
            "split": self.protocol.split,
            "samples": len(self.sample_means),
            "length": self.protocol.length,
            "stride": self.protocol.shown_stride,
            "batch": self.batch_size,
        }


def perplexity(
    model: Any,
    tokenizer: Any,
    data: Data,
    protocol: PerplexityProtocol,
    *,
    device: Any,
    base: Any = None,
    states: "KeptStates | None" = None,
    token_budget: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    template: Mapping[str, Any] | None = None,
) -> PerplexityReading:
    """Scores `model` (a causal decoder of transformers, on `device`, in eval mode) on `data`.

    With `base`, the model that it was made from, each batch goes through both, and the reading has the divergence from
    it; the loss keeps every bit. What that adds to memory is the base's hidden states of a batch and its logits of one
    chunk of positions. `states` keeps those hidden states for further calls with the same base.
    `token_budget` is the number of tokens in one forward pass where the protocol names no batch size; by default
    TOKEN_BUDGET of the device. `progress` is called with (samples done, samples) after each batch. `template` are
    arguments of the tokenizer's chat template.
    Raises DataError for too little data or the tokenizer of another model, MetricError for a loss that is not finite.
    """
    if model.training:
        raise MetricError("the model is in training mode, where dropout changes its scores; call model.eval() first")
    samples = checked_samples(model.config, tokenizer, data, protocol, template)
    _check_base(model.config, base)
    budget = token_budget or TOKEN_BUDGET.get(str(device).partition(":")[0], TOKEN_BUDGET["cpu"])
    fitting = max(1, budget // (protocol.length or max(len(sample.ids) for sample in samples)))
    batch_size = min(protocol.batch_size or fitting, len(samples))
    sums, distances = [0.0] * len(samples), [(0.0, 0.0)] * len(samples)
    done = 0
    for batch in _batches([len(sample.ids) for sample in samples], batch_size, rope.limit(model.config)):
        scored = _scored(model, base, [samples[i] for i in batch], device, states)
        for i, (nll, *distance) in zip(batch, scored, strict=True):
            for what, value in zip(("loss", "divergence from the base"), (nll, *distance[:1]), strict=False):
                if not math.isfinite(value):
                    where = f"sample {i + 1} of {len(samples)} ({samples[i].label})"
                    raise MetricError(f"the {what} of {where} is {value}")
            sums[i] = nll
            distances[i] = tuple(distance)
        done += len(batch)
        if progress is not None:
            progress(done, len(samples))
    reading = reading_of(samples, sums, data, protocol, batch_size)
    return reading if base is None else replace(reading, divergence=_divergence(reading, distances))


def checked_samples(
    config: Any, tokenizer: Any, data: Data, protocol: PerplexityProtocol, template: Mapping[str, Any] | None = None
) -> list[Sample]:
    """What is scored, once it is known that a model of this configuration can.

    Raises:
        DataError: the data is too little, or the tokenizer another model's.
    """
    samples = samples_of(tokenizer, data, protocol, context=config.max_position_embeddings, template=template)
    highest, vocabulary = max(max(sample.ids) for sample in samples), config.vocab_size
    if highest >= vocabulary:
        raise DataError(
            f"the tokenizer produced token {highest}, but the model has a vocabulary of {vocabulary}: they are from "
            "different checkpoints"
        )
    return samples


def _check_base(config: Any, base: Any) -> None:
    if base is not None and base.config.vocab_size != config.vocab_size:
        raise DataError(
            f"the base has a vocabulary of {base.config.vocab_size}, the model one of {config.vocab_size}: they are "
            "not of the same base"
        )


def reading_of(
    samples: Sequence[Sample], sums: Sequence[float], data: Data, protocol: PerplexityProtocol, batch_size: int
) -> PerplexityReading:
    """The reading of the nats that each sample came to, in the order of the data."""
    total = math.fsum(sums)
    counts = [len(sample.ids) - sample.first_scored for sample in samples]
    sizes = [sample.n_bytes for sample in samples]
    source = data.source(protocol.split, what=protocol.what)
    return PerplexityReading(
        nll=total,
        tokens=sum(counts),
        sample_means=tuple(nll / count for nll, count in zip(sums, counts, strict=True)),
        bits_per_byte=None if None in sizes else total / math.log(2) / sum(sizes),
        truncated=sum(sample.cut for sample in samples),
        batch_size=batch_size,
        data=source.read.key,
        digest=source.digest,
        inputs={"data": source.read},
        protocol=protocol,
        sample_tokens=tuple(counts),
        asked=hashes_of([list(sample.ids), sample.first_scored] for sample in samples),
    )


def _divergence(reading: PerplexityReading, distances: Sequence[tuple[float, ...]]) -> Divergence:
    kl, agreed = zip(*distances, strict=True)
    return Divergence(kl=kl, agreed=agreed, tokens=reading.sample_tokens, asked=reading.asked, params=reading.params,
                      inputs=reading.inputs)  # fmt: skip


def _batches(lengths: Sequence[int], size: int, limit: int | None) -> Iterator[list[int]]:
    """Places of samples that share a pass, longest first; on each side of `limit` (`measure.rope`) by themselves."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    beyond = sum(limit is not None and length > limit for length in lengths)
    for side in (order[:beyond], order[beyond:]):
        for start in range(0, len(side), size):
            yield side[start : start + size]


class KeptStates:
    """The last hidden states of one model, by batch, so that it is read once for all models compared with it.

    The head then multiplies the same states in the same chunks: every bit of a result is that of reading again. Once
    `limit` bytes are kept, in main memory, further batches are read every time.

    Attributes:
        model: the model, or an equal copy of it.
    """

    def __init__(self, model: Any = None, limit: int = KEPT_BYTES):
        self.model, self._room = model, limit
        self._states: dict[str, torch.Tensor] = {}

    def of(self, model: Any, ids: "torch.Tensor", mask: "torch.Tensor | None") -> "torch.Tensor":
        """Hidden states (batch, positions, width) of ids and mask, both (batch, positions); kept of the one model."""
        if model is not self.model:
            return _hidden(model, ids, mask)
        digest = hashlib.sha256(repr(tuple(ids.shape)).encode())
        for part in (ids, *([] if mask is None else [mask])):
            digest.update(part.cpu().numpy().tobytes())
        key = digest.hexdigest()
        if key in self._states:
            return self._states[key].to(ids.device)
        found = _hidden(model, ids, mask)
        if found.nbytes <= self._room:
            self._room -= found.nbytes
            self._states[key] = found.cpu()
        return found


def _hidden(model: Any, ids: "torch.Tensor", mask: "torch.Tensor | None") -> "torch.Tensor":
    """As generation computes them, where keys and values are quantized: a pass without a past would not see it."""
    if caches.replaying.policy_of(model) is not None:
        return caches.replaying.hidden(model, ids)
    return model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False)[0]


def _scored(
    model: Any, base: Any, samples: Sequence[Sample], device: Any, states: KeptStates | None
) -> list[list[float]]:  # fmt: skip
    """Nats of each sample over its scored tokens, and beside a base its divergence and the tokens agreed on.

    One forward pass of each model, then logits for a chunk of positions at a time.
    """
    import torch
    from torch.nn.functional import cross_entropy

    with torch.inference_mode():
        lengths = [len(sample.ids) for sample in samples]
        width = max(lengths)
        ids = torch.tensor([[*sample.ids, *[0] * (width - len(sample.ids))] for sample in samples], device=device)
        position = torch.arange(width, device=device)
        real = position < torch.tensor(lengths, device=device)[:, None]
        mask = None if min(lengths) == width else real.long()
        models = [model] if base is None else [model, base]
        hidden_states = states.of if states else _hidden
        read = [(architectures.decoder.logits_of(m), hidden_states(m, ids, mask)) for m in models]

        chunk = max(1, min(CHUNK_TOKENS, CHUNK_ELEMENTS // model.config.vocab_size))
        scored = real & (position >= torch.tensor([sample.first_scored for sample in samples], device=device)[:, None])
        found = torch.zeros((*ids.shape, 2 * len(models) - 1), dtype=torch.float64, device=device)
        for at in scored.nonzero().split(chunk):
            row, token = at.unbind(1)
            logits, *others = (head(hidden[row, token - 1]).float() for head, hidden in read)  # t - 1 predicts t
            found[row, token, 0] = cross_entropy(logits, ids[row, token], reduction="none").double()
            for other in others:
                found[row, token, 1:] = torch.stack([each.double() for each in diverge(other, logits)], -1)
        return found.sum(1).tolist()
