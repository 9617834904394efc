"""What methods do to the shape and the basis of a decoder, as data: each edit applies itself, and says what it is.

    FoldNorm        the weight of a norm into the layers that read it
    Divide          the channels of a producer by numbers, which its readers make up for
    Shift           values of attention, or a norm with a bias, by numbers that biases of readers make up for
    Permute         neurons of the MLP, or channels within the heads of values
    Rotate          the channels within each head of values by an orthogonal matrix
    Turn            the residual stream, where it is read, into another basis; of fewer columns: a slice of it
    Untie           the head from the embeddings
    KeepLayers, KeepHeads, KeepNeurons      cuts (`compression.architectures.cuts`)
    InBlock         an edit of a block, in a decoder

All but `Turn` to fewer columns and the cuts leave what the model computes as it was. Arithmetic is in fp64, rounded
once to the dtype of what is stored. Edits replace parameters and modules, they never write into a tensor.

`to_json` has everything but the values of weights, of which it has the shapes: what `architectures.description` makes
of it makes the same shapes of a model without weights.

Shapes: W (rows, cols); R of a residual stream, x -> x R, is stored as R^T (width after it, width before it).
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compression.architectures import cuts
from compression.architectures.decoder import HALVES, Block, Decoder
from compression.architectures.rewriting import (
    added,
    by_head,
    channel_values,
    is_order,
    parameter,
    place_of,
    plain,
    put,
    site_of,
    turned_heads,
)
from compression.architectures.turned import TurnedBlock
from compression.errors import LayerError
from compression.layers.parts import name_of

EDITS: dict[str, type["Edit"]] = {}


@dataclass(frozen=True, eq=False)
class Edit:
    """A change of a block or of a decoder; subclasses are frozen dataclasses of whole numbers, tuples and tensors."""

    kind: ClassVar[str]

    def __init_subclass__(cls, kind: str) -> None:
        cls.kind = kind
        EDITS[kind] = cls

    def apply(self, target: Any) -> None:
        """Change a `Block`, or a `Decoder` for edits of the whole.

        Raises:
            LayerError: the target is not one that can be changed so; the message names the layer and the reason.
        """
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        fields = {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {"edit": self.kind, **fields}


@dataclass(frozen=True, eq=False)
class FoldNorm(Edit, kind="fold_norm"):
    """The weight of the norm at a place of the residual stream into its readers; what is left of it is ones."""

    place: int

    def apply(self, target: Decoder) -> None:
        place = place_of(target, self.place)
        if place.norm is None:
            return
        if place.block is None and target.tied:
            raise LayerError(f"{target.row.head} is the embeddings, which cannot take the weight of {place.name}; "
                             "untie them first")  # fmt: skip
        offset = target.row.norm_offset
        gain = place.norm.weight.double() + offset
        shift = getattr(place.norm, "bias", None)

        def take(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
            moved = None if shift is None or not (shift.is_meta or shift.any()) else weight @ shift.double()
            return weight * gain, bias if moved is None else added(bias, moved)

        for name in place.readers:
            put(target.model, name, take)
        place.norm.weight = parameter(torch.ones_like(place.norm.weight) - offset)
        if shift is not None:
            place.norm.bias = parameter(torch.zeros_like(shift))


@dataclass(frozen=True, eq=False)
class Divide(Edit, kind="divide"):
    """The producer of a site by `scales` (channels,), and the columns of its readers times them.

    A norm in a short dtype is rounded first, n' = round(n / s), and its readers take n / n', so that nothing but their
    own rounding changes the function.
    """

    site: int
    scales: Tensor

    def apply(self, target: Block) -> None:
        site = site_of(target, self.site)
        if site.row.fixed is not None:
            raise LayerError(f"{site.names[0]}: its inputs cannot be divided, because {site.row.fixed}")
        scales, channels = channel_values(site, self.scales, "scales"), site.channels.to(self.scales.device)
        if not scales.is_meta and not (scales.isfinite() & (scales > 0)).all():
            raise LayerError(f"{site.names[0]}: scales of its inputs must be finite and above 0")
        if site.row.of in ("norm", "latent"):
            offset = target.row.norm_offset
            weight, dtype = site.producer.weight.double() + offset, site.producer.weight.dtype
            exact = weight / ((weight / scales - offset).to(dtype).double() + offset)
            if not weight.is_meta and not (exact.isfinite() & (exact > 0) | (weight == 0)).all():
                held = f"{float(scales.min()):.3g} to {float(scales.max()):.3g}"
                raise LayerError(f"{site.names[0]}: the norm in front of it cannot hold its weight over {held} in "
                                 f"{name_of(dtype)}; take a base in a wider dtype, or scales nearer to 1")  # fmt: skip
            scales = torch.where(weight == 0, scales, exact)
            site.producer.weight = parameter((weight / scales - offset).to(dtype))
            if getattr(site.producer, "bias", None) is not None:
                site.producer.bias = parameter((site.producer.bias.double() / scales).to(dtype))
        else:
            put(target, site.row.producer, lambda w, b: (w / scales[:, None], None if b is None else b / scales),
                produces=True)  # fmt: skip
        for path in (*site.row.readers, *site.row.routers):
            put(target, path, lambda weight, bias: (weight * scales[channels], bias))


@dataclass(frozen=True, eq=False)
class Shift(Edit, kind="shift"):
    """`values` (channels,) off what a site puts out, and their product with the readers' weights onto their biases.

    Of values of attention, whose weights add up to 1, so that a constant in them is one in what attention puts out; and
    of a norm that has a bias. In a short dtype that is rounded first, as in `Divide`.
    """

    site: int
    values: Tensor

    def apply(self, target: Block) -> None:
        site = site_of(target, self.site)
        if not site.shiftable:
            why = site.row.unshifted or "they are no values of attention, and come from no norm with a bias"
            raise LayerError(f"{site.names[0]}: its inputs cannot be shifted, because {why}; shift them where the "
                             "reader takes them in")  # fmt: skip
        values, channels = channel_values(site, self.values, "values"), site.channels.to(self.values.device)
        if site.row.of == "norm":
            bias = site.producer.bias
            site.producer.bias = parameter((bias.double() - values).to(bias.dtype))
            values = bias.double() - site.producer.bias.double()
        else:
            put(target, site.row.producer, lambda weight, bias: (weight, added(bias, -values)), produces=True)
        for path in (*site.row.readers, *site.row.routers):
            put(target, path, lambda weight, bias: (weight, added(bias, weight @ values[channels])))


@dataclass(frozen=True, eq=False)
class Permute(Edit, kind="permute"):
    """Channels of a producer in another order: `order` (neurons,), or (KV heads, head size) within heads of values."""

    site: int
    order: Tensor

    def apply(self, target: Block) -> None:
        site = site_of(target, self.site)
        if site.row.of not in ("values", "neurons"):
            raise LayerError(f"{site.names[0]}: its inputs are the residual stream, or a latent, whose order all "
                             "layers share; turn the stream instead")  # fmt: skip
        rows, columns = self.order, self.order
        if site.row.of == "values":
            rows = by_head(self.order, target.head_size)
            shared = target.heads[0] // target.heads[1]
            columns = by_head(self.order.repeat_interleave(shared, 0), target.head_size)
        if rows.numel() != len(site.channels.unique()) or not is_order(rows):
            raise LayerError(f"{site.names[0]}: the order of its channels must name each of them once")
        for path in filter(None, (site.row.producer, site.row.gate)):
            put(target, path, lambda weight, bias: (weight[rows], None if bias is None else bias[rows]), produces=True)
        for path in site.row.readers:
            put(target, path, lambda weight, bias: (weight[:, columns], bias))


@dataclass(frozen=True, eq=False)
class Rotate(Edit, kind="rotate"):
    """Each head of values times `matrix`, orthogonal (KV heads, head size, head size), undone by what reads them."""

    site: int
    matrix: Tensor

    def apply(self, target: Block) -> None:
        site, heads, size = site_of(target, self.site), target.heads[1], target.head_size
        if site.row.of != "values":
            raise LayerError(f"{site.names[0]}: its inputs cannot be rotated, because what makes them works on each "
                             "channel by itself")  # fmt: skip
        if self.matrix.shape != (heads, size, size):
            raise LayerError(f"{site.names[0]}: the rotation must be {(heads, size, size)}, not "
                             f"{tuple(self.matrix.shape)}")  # fmt: skip
        for path, change, produces in self.changes(target):
            put(target, path, change, produces=produces)

    def changes(self, target: Block) -> list[tuple[str, Any, bool]]:
        """By path of each layer, what becomes of its weight and bias, and whether its outputs are other ones then."""
        row, (produce, read) = site_of(target, self.site).row, turned_heads(self.matrix, target.heads[0])
        return [(row.producer or "", produce, True), *((path, read, False) for path in row.readers)]


@dataclass(frozen=True, eq=False)
class Turn(Edit, kind="turn"):
    """The residual stream at one place, x -> x B with orthonormal columns, B (width, new width).

    RMS norms of folded weights do not see a rotation, so that the layers that read the place and those that write to it
    are turned, and the stream passes between this basis and that of its neighbours through a matrix beside each half.
    Where B has fewer columns the rest of the stream is cut off; norms still divide by the mean over the whole width,
    as SliceGPT's do (arXiv:2401.15024, section 3.3).
    """

    place: int
    basis: Tensor

    def apply(self, target: Decoder) -> None:
        place = place_of(target, self.place)
        norm, row = place.norm, target.row
        if (why := row.unturned) is not None:
            raise LayerError(f"{place.name}: the residual stream of {row.name} cannot be turned: {why}")
        old, new = len(norm.weight), self.basis.shape[-1]
        if self.basis.shape != (old, new) or not 1 <= new <= old:
            raise LayerError(f"{place.name}: the basis must be ({old}, 1 to {old}), not {tuple(self.basis.shape)}")
        if new < old and any(half.experts for half in row.mlps):
            raise LayerError(f"{place.name}: the residual stream of {row.name} cannot be cut: its mixtures of experts "
                             "put out as many channels as they read")  # fmt: skip
        if not norm.weight.is_meta and not (norm.weight + row.norm_offset == 1).all():
            raise LayerError(f"{place.name} has a weight that a turn would mix; fold it into its readers first")
        basis = self.basis.double()
        whole = basis * (old / new) ** 0.5  # the norm takes the mean over fewer channels than there were
        for name in place.readers:
            put(target.model, name, lambda weight, bias: (weight @ whole, bias))
        norm.weight = parameter(norm.weight.new_ones(new) - row.norm_offset)
        setattr(norm, row.epsilon, getattr(target.model.config, row.config_epsilon) * (target.width / new))
        self._write(target, basis)
        if place.block is not None:
            self._beside(target, self.place, lambda residual: residual @ basis, basis)

    def _write(self, target: Decoder, basis: Tensor) -> None:
        """Turn what writes the stream: the half before the place, or the embeddings."""
        if self.place == 0:
            embeddings = target.embeddings
            if not isinstance(embeddings, nn.Embedding) or target.tied:
                raise LayerError(f"{target.row.embeddings} is packed, or is the head too; untie it before it is turned")
            embeddings.weight = parameter((embeddings.weight.double() @ basis).to(embeddings.weight.dtype))
            embeddings.embedding_dim = basis.shape[1]
            return
        before = place_of(target, self.place - 1)
        assert before.block is not None
        for path in map(before.block.full, before.half.writers):
            put(target.model, path, lambda w, b: (basis.mT @ w, None if b is None else basis.mT @ b), produces=True)
        self._beside(target, self.place - 1, lambda residual: basis.mT @ residual, basis.mT)

    @staticmethod
    def _beside(target: Decoder, number: int, change: Any, identity: Tensor) -> None:
        """Change R^T beside a half; `identity` is what becomes of none."""
        place = place_of(target, number)
        block, half, scale = place.block, number % HALVES, target.row.residual_scale
        assert block is not None
        module = block.module
        if not isinstance(module, TurnedBlock):
            module = TurnedBlock(block, 1.0 if scale is None else getattr(target.model.config, scale))
            target.model.set_submodule(block.name, module)
        residual, dtype = block.residual(half), block.layer(place.half.writers[0]).weight.dtype
        module.turn(half, (identity if residual is None else change(residual.weight.double())).to(dtype).contiguous())


@dataclass(frozen=True, eq=False)
class Untie(Edit, kind="untie"):
    """Give the head a weight of its own where it is that of the embeddings; the configuration says so too."""

    def apply(self, target: Decoder) -> None:
        if not target.tied:
            return
        if not isinstance(target.head, nn.Linear):
            raise LayerError(f"{target.row.head} is packed with the embeddings; make it dense before it is untied")
        target.head.weight = parameter(target.head.weight.clone())
        target.model.config.tie_word_embeddings = False


@dataclass(frozen=True, eq=False)
class KeepLayers(Edit, kind="keep_layers"):
    """Leave the blocks of these numbers."""

    kept: tuple[int, ...]

    def apply(self, target: Decoder) -> None:
        cuts.keep_layers(target.model, self.kept)


@dataclass(frozen=True, eq=False)
class KeepHeads(Edit, kind="keep_heads"):
    """Leave these heads of keys and values, and the query heads of their groups."""

    kept: tuple[int, ...]

    def apply(self, target: Block) -> None:
        cuts.keep_heads(target, torch.tensor(self.kept))


@dataclass(frozen=True, eq=False)
class KeepNeurons(Edit, kind="keep_neurons"):
    """Leave these neurons of the MLP."""

    kept: tuple[int, ...]

    def apply(self, target: Block) -> None:
        cuts.keep_neurons(target, torch.tensor(self.kept))


@dataclass(frozen=True, eq=False)
class InBlock(Edit, kind="in_block"):
    """An edit of block number `block`."""

    block: int
    what: Edit

    def apply(self, target: Decoder) -> None:
        blocks = target.blocks
        if not 0 <= self.block < len(blocks):
            raise LayerError(f"block={self.block!r:.80} must be 0 to {len(blocks) - 1}")
        self.what.apply(blocks[self.block])


def fold_norms(model: nn.Module) -> Decoder:
    """Fold the weights of all norms that read the residual stream, the head untied before; the decoder."""
    decoder = Decoder(model)
    Untie().apply(decoder)
    for place in decoder.places():
        FoldNorm(place.number).apply(decoder)
    return decoder
