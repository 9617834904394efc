"""What calibration text makes reach the layers: the hidden states in front of a block, and from there what observers of
its layers, or of places in the residual stream, see."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compression.architectures.anatomy import Kind, SiteRow
from compression.architectures.decoder import HALVES, Block, Decoder, Place, decoder_blocks, make_dense
from compression.architectures.edits import Turn
from compression.calibration.observers import Observer, Sample
from compression.calibration.routing import Routed, Routing
from compression.calibration.sums import LEAVES, Share, Sums
from compression.errors import LayerError
from compression.layers.kernels.torch_products import product_dtype
from compression.workers import ALONE, Workers

MakeObserver = Callable[[int, torch.device], Observer]
Keep = Callable[[int], None]


def _nothing(run: int) -> None:
    pass


@dataclass(frozen=True)
class Stack:
    """Linear layers of a block that see the same tokens, by path: all readers of a site, or those of one expert."""

    site: SiteRow
    readers: tuple[str, ...]

    @property
    def of(self) -> Kind:
        """That of the site."""
        return self.site.of


def stacks_of(block: Block) -> list[Stack]:
    """All of a block, in the order of computation."""
    return [Stack(site.row, readers) for site in block.sites for readers in site.row.stacks]


class Inputs:
    """What reaches one decoder block for each calibration sample; `advance` takes it to the next block.

    Attributes:
        hidden: the hidden states of each sample of this process, (1, length, hidden size), in the dtype of the model,
            or in fp32 on a CPU that does not multiply bf16 in hardware.
        arguments: for each block what transformers passes beside them (positions, mask), the same for all samples.
        share: which of the samples those are.
    """

    def __init__(
        self,
        hidden: list[Tensor],
        arguments: list[dict[str, Any]],
        at: int = 0,
        share: Share | None = None,
        like: Tensor | None = None,
    ):
        self.hidden, self.arguments, self.share = hidden, arguments, share or Share(len(hidden))
        like = hidden[0] if like is None else like  # of a process that has no sample
        self.dtype, self.device = like.dtype, like.device
        self._at = at

    @classmethod
    @torch.no_grad()
    def of_first_block(cls, model: nn.Module, ids: Tensor, workers: Workers = ALONE) -> "Inputs":
        """Run token ids (samples, length) through the model with every block left out; blocks need no weights."""
        share = Share(len(ids), workers)
        mine = share.of()
        hidden, arguments = _reaching(model, ids[mine.start : mine.stop] if mine else ids[:1])
        return cls(hidden if mine else [], arguments, share=share, like=hidden[0])

    @classmethod
    @torch.no_grad()
    def of_block(
        cls, at: int, hidden: list[Tensor] | None, model: nn.Module, ids: Tensor, workers: Workers = ALONE
    ) -> "Inputs":
        """What reached block `at` before, as `gathered` gave it to the first process; the rest as in `of_first_block`.

        The other processes have None for it, and get theirs from the first one.
        """
        share = Share(len(ids), workers)
        pieces = hidden and [[hidden[i] for i in share.of(rank)] for rank in range(workers.count)]
        [like], arguments = _reaching(model, ids[:1])
        return cls(workers.scatter(pieces), arguments, at, share, like)

    def gathered(self) -> list[Tensor]:
        """The hidden states of all samples, for the first process; nothing for the others."""
        return [states for part in self.share.workers.collect(self.hidden, 0) for states in part]

    @torch.no_grad()
    def observe(self, block: Block, see: Callable[[Stack, Tensor], None], keep: Keep = _nothing) -> Routed:
        """Run the samples through a block; `see` gets the input of every stack, (1, length, cols).

        Args:
            keep: called behind each run of samples with a number that rises (`calibration.sums`).

        Returns:
            How many tokens were routed to each expert; those that few reached have seen all (`calibration.routing`).
        """
        module = self.computing(block, see)
        routing = Routing(block, module)
        self._through(module, keep)
        routing.count(self.share.workers)
        for run, samples in self.share.runs() if routing.routed.starved else ():
            for sample in samples:
                routing.show_rest(sample - self.share.of().start)
            keep(LEAVES + run)
        return routing.routed

    @torch.no_grad()
    def advance(self, block: Block, see: Callable[[Stack, Tensor], None] | None = None) -> None:
        """Put the outputs of a block in the place of its inputs; `see` gets the input of every stack on the way."""
        module = self.computing(block, see)
        for i, states in enumerate(self.hidden):
            self.hidden[i] = module(states, **self.arguments[self._at])
        self._at += 1

    @torch.no_grad()
    def listen(
        self,
        block: Block,
        outputs: dict[str, Callable[[Tensor], None]],
        inputs: dict[str, Callable[[Tensor], None]] | None = None,
        keep: Keep = _nothing,
    ) -> None:
        """Run the samples through a block; functions get the outputs, and the inputs, of modules by their path.

        `keep` as in `observe`.
        """
        module = self.computing(block)
        for path, see in outputs.items():
            module.get_submodule(path).register_forward_hook(lambda _, x, y, see=see: see(y))
        for path, see in (inputs or {}).items():
            module.get_submodule(path).register_forward_pre_hook(lambda _, x, see=see: see(x[0]))
        self._through(module, keep)

    def _through(self, module: nn.Module, keep: Keep) -> None:
        for run, samples in self.share.runs():
            for sample in samples:
                module(self.hidden[sample - self.share.of().start], **self.arguments[self._at])
            keep(run)

    def through(self, module: nn.Module, number: int) -> None:
        """Run the sample of that number, among those of this process, through what `computing` gave."""
        module(self.hidden[number], **self.arguments[self._at])

    def computing(self, block: Block, see: Callable[[Stack, Tensor], None] | None = None) -> nn.Module:
        """A copy of the block in the dtype of the hidden states, its stored layers unpacked once for all samples."""

        def hook(stack: Stack, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            see(stack, arguments[0])  # type: ignore[misc]

        module = copy.deepcopy(block.module)
        make_dense(module, activations=True)
        for stack in stacks_of(block) if see else ():
            module.get_submodule(stack.readers[0]).register_forward_pre_hook(partial(hook, stack))
        exact = {path: tensor for path, tensor in module.named_buffers() if block.row.kept_in_float32(path)}
        module.to(self.dtype)
        for path, tensor in exact.items():
            owner, _, name = path.rpartition(".")
            setattr(module.get_submodule(owner), name, tensor)
        return module


def _reaching(model: nn.Module, ids: Tensor) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """What token ids (samples, length) make reach the first block, and what goes to every block beside it."""
    blocks = decoder_blocks(model)
    hidden: list[Tensor] = []
    arguments: list[dict[str, Any]] = [{} for _ in blocks]

    def note(i: int, states: Tensor, **others: Any) -> Tensor:
        if i == 0:
            hidden.append(states.to(product_dtype(states.dtype, states.device)))
        arguments[i] = others
        return states

    try:
        for i, block in enumerate(blocks):
            block.module.forward = partial(note, i)  # type: ignore[method-assign]
        for sample in ids.split(1):
            model.get_decoder()(input_ids=sample, use_cache=False)  # type: ignore[operator, union-attr]
    finally:
        for block in blocks:
            block.module.__dict__.pop("forward", None)
    return hidden, arguments


class Seen:
    """What the layers of one block see while calibration text runs through it; each call is one such run.

    Layers are as they are at the time of the call; what reaches the block comes from those before it as they are
    compressed. All processes have the values.
    """

    def __init__(self, block: Block, inputs: Inputs):
        self.block, self.states, self.routed = block, inputs, Routed()

    @property
    def device(self) -> torch.device:
        return self.states.device

    def inputs(self, make: MakeObserver) -> dict[str, Any]:
        """By full name of every linear layer, the value of an observer of its inputs; readers of a stack share one."""
        stacks = stacks_of(self.block)
        sums = Sums(stacks, lambda stack: make(self.block.layer(stack.readers[0]).in_features, self.device))
        self.routed = self.states.observe(self.block, sums.see, sums.keep)
        values = self._values(sums)
        return {self.block.full(path): values[stack] for stack in stacks for path in stack.readers}

    def at_weights(self, make: MakeObserver) -> dict[str, Any]:
        """As `inputs`, behind what layers do to their inputs beside rounding them, such as an online rotation."""
        readers = [(stack, path) for stack in stacks_of(self.block) for path in stack.readers]
        entering = {path: part.exact for _, path in readers
                    if (part := getattr(self.block.layer(path), "input_part", None)) is not None}  # fmt: skip
        if not entering:
            return self.inputs(make)
        sums = Sums((path for _, path in readers), lambda path: make(self.block.layer(path).in_features, self.device))

        def see(stack: Stack, x: Tensor) -> None:
            for path in stack.readers:
                sums.see(path, entering[path](x) if path in entering else x)

        self.routed = self.states.observe(self.block, see, sums.keep)
        return {self.block.full(path): value for path, value in self._values(sums).items()}

    def outputs(self, make: MakeObserver, paths: Iterable[str]) -> dict[str, Any]:
        """By full name of the linear layers at these paths of the block, the value of an observer of their outputs."""
        sums = Sums(paths, lambda path: make(self.block.layer(path).out_features, self.device))
        self.states.listen(self.block, {path: partial(sums.see, path) for path in sums}, keep=sums.keep)
        return {self.block.full(path): value for path, value in self._values(sums).items()}

    def _values(self, sums: Sums) -> dict[Any, Any]:
        workers, values = self.states.share.workers, {}
        for key in list(sums):
            observer = sums.given_to(key, 0, workers)
            values[key] = workers.first(partial(self._value, key, observer))
        return values

    def _value(self, key: Any, observer: Any) -> Any:
        try:
            return observer.value()
        except LayerError as error:
            path = key.readers[0] if isinstance(key, Stack) else key
            raise LayerError(f"{self.block.full(path)}: {error}") from error


class Stream:
    """The residual stream of a whole model on calibration text, read place by place, in order, while it is changed."""

    def __init__(self, model: nn.Module, ids: Tensor):
        self._decoder, self._ids, self._states = Decoder(model), ids, None  # type: ignore[var-annotated]
        self._at = 0

    def at(self, place: Place, make: MakeObserver = Sample) -> Any:
        """The value of an observer of what reaches the norm of a place, from layers as they are by now.

        Raises:
            ValueError: a block in front of it was left behind already.
        """
        if place.number // HALVES < self._at:
            raise ValueError(f"{place.name} was read already: places are read in order")
        if self._states is None:
            self._states = Inputs.of_first_block(self._decoder.model, self._ids)
        while self._at < place.number // HALVES:
            self._states.advance(self._decoder.blocks[self._at])
            self._at += 1
        observer = make(len(place.norm.weight), self._states.device)
        if place.block is None or place.number % HALVES == 0:
            for states in self._states.hidden:
                observer.add(states)
        else:
            self._states.listen(place.block, {}, {place.half.norm or "": observer.add})
        return observer.value()

    def turn(self, place: Place, basis: Tensor) -> None:
        """Turn the stream at a place that was just read into a basis (width, new width), and go on from there."""
        Turn(place.number, basis).apply(self._decoder)
        if self._states is not None and place.number % HALVES == 0:
            self._states.hidden = [states @ basis.to(states.dtype) for states in self._states.hidden]
