"""Greedy generation with a static cache, stamped token by token: the clock of every efficiency figure.

A `Decoder` prepares one model for one load; `run` submits a prompt and yields a `Round` of times. `Interleaved` runs
two of them in turn (A B A B ...), so that drift of the machine falls on both. On CUDA a decode step can be replayed
from a graph (mode "graph"): at batch 1 eager decoding is bound by launches, and no kernel would show.
"""

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from bench import measure
from bench.errors import NotAvailable, OptionError
from bench.machine.cpu_wait import moments
from compression import caches, devices, layers
from compression.files.strict_json import at_least

MODES = ("eager", "graph")


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked of the model; the papers' defaults ([E], section 3).

    Attributes:
        batch_size: sequences generated at once.
        prompt_tokens: length of every prompt.
        new_tokens: tokens generated per sequence; the end-of-sequence token is ignored.
        prompts: different prompts that the rounds cycle through.
    """

    batch_size: int = 1
    prompt_tokens: int = 128
    new_tokens: int = 128
    prompts: int = 8

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("prompt_tokens", 1), ("new_tokens", 2), ("prompts", 1)):
            at_least(name.replace("_", "-"), getattr(self, name), least, OptionError)


@dataclass(frozen=True, kw_only=True)
class Round:
    """One generation.

    Attributes:
        ttft_s: prompt submitted to first token out, cache set-up included.
        prefill_s: the forward pass over the prompt alone; None where it cannot be told from the rest, as of engines.
        steps_s: one entry for every decode step, from token to token.
        total_s: prompt submitted to last token out.
        kv_bytes: bytes of the keys and values in the cache at the end, unused places left out; None where not told.
        tokens: generated, over the batch.
        waits_s: how much of this the thread waited for a processor that another had: in setting up the cache, in the
            prefill, in every decode step. Empty where the system does not tell, on CUDA, and with several threads, of
            which one may work while another waits.
    """

    ttft_s: float
    prefill_s: float | None
    steps_s: tuple[float, ...]
    total_s: float
    kv_bytes: int | None
    tokens: int
    waits_s: tuple[float, ...] = ()

    def running(self) -> "Round":
        """The same without the waits; itself where there are none."""
        if not self.waits_s or self.prefill_s is None:
            return self
        setup, prefill, *steps = self.waits_s
        return dataclasses.replace(
            self,
            ttft_s=self.ttft_s - setup - prefill,
            prefill_s=self.prefill_s - prefill,
            steps_s=tuple(took - waited for took, waited in zip(self.steps_s, steps, strict=True)),
            total_s=self.total_s - sum(self.waits_s),
            waits_s=(),
        )


class Decoder:
    """Greedy decoding of one model under one load.

    Args:
        model: a transformers decoder; anything that takes (input_ids, past_key_values, use_cache, logits_to_keep) and
            returns `.logits`.
        load: what is asked of it.
        mode: "eager" or, on CUDA, "graph".
        seed: of the prompts, uniform over the vocabulary: no weight-only method is faster or slower for what they say.

    Raises:
        OptionError: the load does not fit the model's positions, or graphs are asked for without CUDA.
        NotAvailable: no graph can hold what a layer does, or what the cache does once its window is full.
    """

    def __init__(
        self,
        model: Any,
        load: Load,
        *,
        mode: str = "eager",
        seed: int = 0,
    ):
        length = load.prompt_tokens + load.new_tokens
        positions = getattr(model.config, "max_position_embeddings", length)
        if length > positions:
            raise OptionError(
                f"--prompt-tokens {load.prompt_tokens} and --max-new-tokens {load.new_tokens} exceed the {positions} "
                "positions of the model"
            )
        self.model, self.load, self.mode = model, load, mode
        self.device = next(model.parameters()).device
        if mode not in MODES or (mode == "graph" and self.device.type != "cuda"):
            raise OptionError(f"mode must be eager, or graph on cuda, not {mode!r} on {self.device.type}")
        if mode == "graph" and (why := graph_refusal(model)):
            raise NotAvailable(f"mode graph: {why}; mode eager measures it")
        self._length = length
        if mode == "graph" and (why := _window_refusal(self._new_cache(), length)):
            raise NotAvailable(f"mode graph: {why}; mode eager measures it")
        self._prompts = list(random_prompts(load, model.config.vocab_size, seed).to(self.device))
        self._lean = measure.decode_step.lean_step(model, self._length)
        self._graph: tuple[Any, Any, Any, Any] | None = None

    def run(self, index: int = 0) -> Round:
        """Generate once from prompt `index` modulo the number of prompts."""
        import torch

        with torch.inference_mode(), devices.on(self.device):  # events and graphs are those of the current device
            if self.device.type == "cuda":
                return self._run_cuda(index)
            return self._run_cpu(self._prompts[index % len(self._prompts)])

    def _run_cpu(self, prompt: Any) -> Round:
        """The token is taken out (argmax) within each step."""
        import torch

        with moments() as moment:
            stamps = [moment()]
            cache = self._new_cache()
            stamps.append(moment())
            token = _next(self.model, prompt, cache)
            stamps.append(moment())
            step = self._step(cache)
            for position in range(self.load.prompt_tokens, self._length - 1):
                token = step(token, position)
                stamps.append(moment())
        clock, waits = zip(*stamps, strict=True)
        told = None not in waits and torch.get_num_threads() == 1
        return self._round(*clock[:2], clock[2:], cache, waits if told else ())

    def _run_cuda(self, index: int) -> Round:
        """Steps are stamped by events on the device, without a synchronisation between them."""
        import torch

        prompt = self._prompts[index % len(self._prompts)]
        torch.cuda.synchronize(self.device)
        begin = time.perf_counter()
        cache, step = self._graph_step() if self.mode == "graph" else (self._new_cache(), None)
        ready = time.perf_counter()
        token = _next(self.model, prompt, cache)
        torch.cuda.synchronize(self.device)
        first = time.perf_counter()
        if step is None:
            step = self._step(cache)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(self.load.new_tokens)]
        events[0].record()
        for position, event in enumerate(events[1:], self.load.prompt_tokens):
            token = step(token, position)
            event.record()
        torch.cuda.synchronize(self.device)
        stamps = [first + events[0].elapsed_time(event) / 1e3 for event in events]
        return self._round(begin, ready, stamps, cache)

    def _new_cache(self) -> Any:
        if caches.replaying.policy_of(self.model) is not None:
            return caches.replaying.new_cache(self.model)
        return _static_cache(self.model.config, self.load.batch_size, self._length)

    def _step(self, cache: Any) -> Callable[[Any, int], Any]:
        """(token, position) -> next token, over a cache that holds the prompt."""
        lean, model = self._lean, self.model
        if lean is None or not measure.decode_step.fits(cache, self._length):
            return lambda token, position: _next(model, token, cache)
        return lambda token, position: _most_likely(lean(token, position, cache))

    def _graph_step(self) -> tuple[Any, Callable[[Any, int], Any]]:
        """The captured decode step over a cache of fixed addresses, emptied; captured at the first use."""
        import torch

        if self._graph is None:
            cache = self._new_cache()
            token = _next(self.model, self._prompts[0], cache).clone()
            side = torch.cuda.Stream(self.device)
            side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side):  # lazily made workspaces must exist before the capture
                _next(self.model, token, cache)
            torch.cuda.current_stream(self.device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side):  # that of torch's own is of the device that captured first
                out = _next(self.model, token, cache)
            self._graph = (graph, cache, token, out)
        graph, cache, static_token, out = self._graph
        cache.reset()

        def step(token: Any, position: int) -> Any:
            static_token.copy_(token)
            graph.replay()
            return out

        return cache, step

    def _round(
        self, begin: float, ready: float, stamps: Sequence[float], cache: Any, waits: Sequence[float] = ()
    ) -> Round:
        return Round(
            ttft_s=stamps[0] - begin,
            prefill_s=stamps[0] - ready,
            steps_s=tuple(b - a for a, b in pairwise(stamps)),
            total_s=stamps[-1] - begin,
            kv_bytes=kv_bytes(cache, self._length - 1),  # the last token is not fed back
            tokens=self.load.batch_size * self.load.new_tokens,
            waits_s=tuple(b - a for a, b in pairwise(waits)),
        )


def random_prompts(load: Load, vocabulary: int, seed: int) -> Any:
    """Token ids of the prompts of a load, uniform over the vocabulary, int64 (prompts, batch size, prompt tokens)."""
    import torch

    shape = (load.prompts, load.batch_size, load.prompt_tokens)
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


class Interleaved:
    """Rounds of several decoders in turn.

    Args:
        decoders: usually the uncompressed model and the compressed one, in that order.
    """

    def __init__(self, decoders: Sequence[Decoder]):
        self.decoders = list(decoders)
        self.rounds: list[list[Round]] = [[] for _ in self.decoders]

    def round_of(self, which: int) -> Round:
        """One more round of one decoder; rounds of equal number have equal prompts."""
        done = self.rounds[which]
        done.append(self.decoders[which].run(len(done)))
        return done[-1]

    def run(self, rounds: int, seconds: float = math.inf) -> None:
        """Complete every decoder to `rounds` rounds, in turn; to equally many, but fewer, when `seconds` are over."""
        end = time.perf_counter() + seconds
        while min(map(len, self.rounds)) < rounds and time.perf_counter() < end:
            for which, done in enumerate(self.rounds):
                if len(done) < rounds:
                    self.round_of(which)


def kv_bytes(cache: Any, tokens: int) -> int:
    """Bytes of the keys and values of `tokens` positions, by the cache's own tensors: grouped heads are stored once.

    A quantized cache holds no unused places: all its tensors count, scales and what stays in 16 bits included.
    """
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes)
    total = 0
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values):
            places = tensor.shape[-2]
            total += tensor.numel() // places * min(tokens, places) * tensor.element_size()
    return total


def graph_refusal(model: Any, device: str | None = None) -> str | None:
    """Why a CUDA graph cannot hold a decode step of the model (on `device`; default: where it is), or None."""
    if caches.replaying.policy_of(model) is not None:
        return "its quantized cache grows with every token, and a captured step has tensors of fixed size"
    for name, layer in model.named_modules():
        if isinstance(layer, layers.linear.Linear) and (why := layer.graph_refusal(device)):
            return f"{name}: {why}"
    return None


def _window_refusal(cache: Any, length: int) -> str | None:
    """Why a graph cannot hold a step over this cache for so many positions, or None.

    Where a sliding window is full, transformers moves what is in it instead of writing to the next place, and decides
    so in Python. A graph that was captured before goes on writing to the next place, which is none.
    """
    window = min(getattr(layer, "max_cache_len", length) for layer in cache.layers)
    if window >= length:
        return None
    return f"{length} positions exceed the sliding window of {window}: a captured step would write past its end"


def _next(model: Any, tokens: Any, cache: Any) -> Any:
    """One forward pass; the most likely next token of each sequence, (batch, 1)."""
    return _most_likely(model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits)


def _most_likely(logits: Any) -> Any:
    """The first of the most likely tokens after the last position, (batch, 1), of logits (batch, length, vocabulary).

    On CPU by NumPy, whose argmax is vectorized (`python benchmarks/loop_overhead.py` prints the times of both).
    """
    last = logits[:, -1:]
    if last.device.type != "cpu":
        return last.argmax(-1)
    import torch

    return torch.from_numpy(last.float().numpy().argmax(-1))


def _static_cache(config: Any, batch: int, length: int) -> Any:
    """transformers' static cache; where the text fits into a sliding window, without its bookkeeping on the host."""
    from transformers import StaticCache

    if (getattr(config, "sliding_window", None) or 0) >= length:
        config = copy.deepcopy(config)
        config.sliding_window = config.layer_types = None
    return StaticCache(config=config, max_cache_len=length)
