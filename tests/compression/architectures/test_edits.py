"""Edits of decoders: what leaves the function as it was does so to 1e-9 in fp64, cuts are the slow cuts, and the shapes
that any of them makes are made again from JSON."""

import copy
import json

import pytest
import torch
from exact_models import TOKENS, model_of, norms_in_fp64, numbers, orthogonal, plain  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st

from compression import LayerError
from compression.architectures import skeleton
from compression.architectures.decoder import Decoder
from compression.architectures.description import describe, from_json, restore
from compression.architectures.edits import (
    EDITS,
    Divide,
    FoldNorm,
    InBlock,
    KeepHeads,
    KeepLayers,
    KeepNeurons,
    Permute,
    Rotate,
    Shift,
    Turn,
    Untie,
)
from compression.architectures.rotations import RotateStream
from compression.architectures.table import ARCHITECTURES

CLOSE = 1e-9
# their routers multiply in fp32, so that a norm that is rounded elsewhere sends tokens with other weights
ROUGH = dict.fromkeys(("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"), 1e-5)

families = st.sampled_from(sorted(ARCHITECTURES))
turned = st.sampled_from(sorted(name for name, row in ARCHITECTURES.items() if row.unturned is None))
sliced = st.sampled_from(["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
seeds = st.integers(0, 2**20)


def logits(model):
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def moved(model, edits):
    """By how much edits change the logits, relative to them (Frobenius); edits of blocks are in an `InBlock`."""
    before = logits(model)
    decoder = Decoder(model)
    for edit in edits:
        edit.apply(decoder)
    return float((logits(model) - before).norm() / before.norm())


def sites_of(model, of):
    return [(b, site) for b, block in enumerate(Decoder(model).blocks) for site in block.sites if site.row.of == of]


def close(family):
    return ROUGH.get(family, CLOSE)


def one_of_each(model, seed):
    """Every edit that leaves the function as it was, at every place that it can be."""
    decoder = Decoder(model)
    edits = [Untie(), *(FoldNorm(place.number) for place in decoder.places())]
    for number, block in enumerate(decoder.blocks):
        heads, size = block.heads[1], block.head_size
        for site in block.sites:
            if site.row.of == "stream":
                continue
            channels, own = len(site.producer.weight), seed + 10 * number + site.number
            found = [] if site.row.fixed else [Divide(site.number, numbers(own, channels).exp())]
            found += [Shift(site.number, numbers(own, channels))] if site.shiftable else []
            if site.row.of == "values":
                order = torch.stack([numbers(own + i, size).argsort() for i in range(heads)])
                found += [Permute(site.number, order), Rotate(site.number, orthogonal(own, heads, size, size))]
            if site.row.of == "neurons":
                found.append(Permute(site.number, numbers(own, channels).argsort()))
            edits += [InBlock(number, edit) for edit in found]
    # a norm that was divided has a weight again
    edits += [FoldNorm(place.number) for place in decoder.places()]
    turns = [RotateStream(orthogonal(seed, 32, 32))]
    turns += [Turn(p.number, orthogonal(seed + p.number, 32, 32)) for p in decoder.places()]
    return edits + (turns if decoder.row.unturned is None else [])


# --- What leaves the function as it was -------------------------------------------------------------------------------


@settings(max_examples=8)
@given(families, seeds, st.booleans())
def test_folding_norms_changes_nothing(family, seed, tied):
    model = model_of(family, seed, tied)

    assert close(family) > moved(model, [Untie(), *(FoldNorm(place.number) for place in Decoder(model).places())])
    for place in Decoder(model).places():
        if place.norm is not None:
            assert (place.norm.weight + Decoder(model).row.norm_offset == 1).all()
            assert not getattr(place.norm, "bias", torch.zeros(1)).any()


@settings(max_examples=12)
@given(families, seeds, st.data(), st.floats(0, 3))
def test_dividing_a_site_changes_nothing_or_is_refused_with_the_reason(family, seed, data, spread):
    model = model_of(family, seed)
    for b, block in enumerate(Decoder(model).blocks):
        site = data.draw(st.sampled_from(block.sites))
        channels = 32 if site.producer is None else len(site.producer.weight)
        edit = InBlock(b, Divide(site.number, (numbers(seed + b, channels) * spread).exp()))
        if site.row.fixed is None:
            assert close(family) > moved(model, [edit])
        else:
            with pytest.raises(LayerError, match=site.row.fixed):
                edit.apply(Decoder(model))


@settings(max_examples=4)
@given(families, seeds)
def test_sites_can_be_shifted_permuted_and_rotated_where_that_changes_nothing(family, seed):
    model = model_of(family, seed)
    for edit in one_of_each(model, seed):
        if isinstance(edit, InBlock) and not isinstance(edit.what, Divide):
            assert close(family) > moved(model, [edit]), edit.what.kind


@settings(max_examples=8)
@given(turned, seeds, st.data())
def test_turning_the_residual_stream_anywhere_changes_nothing(family, seed, data):
    model = model_of(family, seed)
    places = [place.number for place in Decoder(model).places()]
    chosen = data.draw(st.lists(st.sampled_from(places), min_size=1, max_size=8))

    assert close(family) > moved(model, [FoldNorm(number) for number in places])
    assert close(family) > moved(model, [Turn(n, orthogonal(seed + i, 32, 32)) for i, n in enumerate(chosen)])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_all_of_it_at_once_changes_nothing(family, tied):
    model = model_of(family, seed := 5, tied)

    assert close(family) > moved(model, one_of_each(model, seed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_norm_in_a_short_dtype_is_rounded_before_its_readers_make_up_for_it(dtype):
    model = model_of("LlamaForCausalLM", 1).to(dtype)
    block = Decoder(model).blocks[0]
    before = [block.sites[0].producer.weight.double() * r.weight.double() for r in block.sites[0].readers]

    Divide(0, numbers(3, 32).exp()).apply(block)

    after = [block.sites[0].producer.weight.double() * r.weight.double() for r in block.sites[0].readers]
    for one, other in zip(before, after, strict=True):
        assert ((one - other).abs() <= one.abs() * torch.finfo(dtype).eps / 1.9 + 1e-12).all()  # of one rounding


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float16, 1e-7), (torch.float16, 1e9), (torch.bfloat16, 1e-39)])
def test_scales_that_the_dtype_of_a_norm_cannot_hold_are_refused_with_the_way_out(dtype, scale):
    block = Decoder(model_of("LlamaForCausalLM", 1).to(dtype)).blocks[1]

    with pytest.raises(
        LayerError, match=r"layers.1.self_attn.q_proj: the norm .* in b?float16; take a base in a wider"
    ):
        Divide(0, torch.full((32,), scale, dtype=torch.float64)).apply(block)


# --- Cuts are the slow cuts -------------------------------------------------------------------------------------------


class Projected(torch.nn.Module):
    """A decoder by the book, its stream cut to some directions wherever it is read: the slow reference of `Turn`."""

    def __init__(self, model, bases):
        super().__init__()
        self.decoder, self.bases = Decoder(model), bases

    def forward(self, x, position):
        def cut(number, x):
            basis = self.bases.get(number)
            return x if basis is None else x @ basis @ basis.T

        model = self.decoder.model.model
        rotary = model.rotary_emb(x, position[None])
        mask = torch.full((x.shape[1], x.shape[1]), -torch.inf, dtype=x.dtype).triu(1)[None, None]
        for i, layer in enumerate(model.layers):
            x = cut(2 * i, x)
            x = x + layer.self_attn(layer.input_layernorm(x), position_embeddings=rotary, attention_mask=mask)[0]
            x = cut(2 * i + 1, x)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.decoder.head(model.norm(cut(2 * len(model.layers), x)))


@settings(max_examples=6)
@given(sliced, seeds, st.integers(8, 32))
def test_a_slice_of_the_stream_is_the_stream_cut_to_its_directions_by_the_book(family, seed, kept):
    model = model_of(family, seed)
    places = [place.number for place in Decoder(model).places()]
    bases = {number: orthogonal(seed + number, 32, 32)[:, :kept] for number in places}
    slow = Projected(copy.deepcopy(model), bases)
    with torch.no_grad():
        expected = slow(slow.decoder.embeddings(TOKENS), torch.arange(20))

    moved(model, [FoldNorm(number) for number in places])
    moved(model, [Turn(number, bases[number]) for number in places])

    assert CLOSE > float((logits(model) - expected).norm() / expected.norm())
    assert {kept} == {len(place.norm.weight) for place in Decoder(model).places()}


@settings(max_examples=6)
@given(sliced, seeds)
def test_heads_and_neurons_that_go_are_those_whose_outputs_are_zero(family, seed):
    slow, model = model_of(family, seed), model_of(family, seed)
    neurons = tuple(numbers(seed, 64).argsort()[:40].sort().values.tolist())
    gone = [n for n in range(64) if n not in neurons]
    for number, layer in enumerate(slow.model.layers):
        layer.mlp.down_proj.weight[:, gone] = 0
        layer.self_attn.o_proj.weight[:, :16] = 0  # of KV head 0 and the two query heads that read it
        for edit in (KeepHeads((1,)), KeepNeurons(neurons)):
            InBlock(number, edit).apply(Decoder(model))
    slow.model.layers[1].mlp.down_proj.weight.zero_()
    slow.model.layers[1].self_attn.o_proj.weight.zero_()

    KeepLayers((0, 2)).apply(Decoder(model))

    torch.testing.assert_close(logits(model), logits(slow), rtol=CLOSE, atol=CLOSE)


# --- JSON -------------------------------------------------------------------------------------------------------------


def fresh(model):
    """A model without weights of this one's configuration."""
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    return skeleton.build(config, torch.float64, device="meta")


@settings(max_examples=8)
@given(sliced, seeds, st.integers(8, 32), st.booleans())
def test_a_model_of_other_shapes_is_built_again_from_json_to_the_bit(family, seed, kept, tied):
    model = model_of(family, seed, tied)
    edits = [edit for edit in one_of_each(model, seed) if edit.kind != "turn"]
    edits += [Turn(p.number, orthogonal(seed + p.number, 32, 32)[:, :kept]) for p in Decoder(model).places()]
    for edit in edits:
        edit.apply(Decoder(model))
    expected = logits(model)

    again = fresh(model)
    restore(again, json.loads(json.dumps(describe(model))))
    again.load_state_dict(model.state_dict(), assign=True)
    skeleton.renew_tables(again)

    assert torch.equal(expected, logits(again.eval()))
    assert describe(model) == describe(again)


@settings(max_examples=8)
@given(sliced, seeds)
def test_each_edit_of_json_makes_the_same_shapes_without_weights(family, seed):
    model = model_of(family, seed, tied=True)
    blank = fresh(model)
    edits = [*one_of_each(model, seed), InBlock(0, KeepHeads((0,))), InBlock(1, KeepNeurons((3, 5)))]
    for edit in edits:
        edit.apply(Decoder(model))
        from_json(json.loads(json.dumps(edit.to_json()))).apply(Decoder(blank))

    assert {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in blank.state_dict().items()}
    assert EDITS.keys() - {"keep_layers"} == {e.what.kind if isinstance(e, InBlock) else e.kind for e in edits} | {
        "in_block"
    }


def test_most_models_are_described_by_nothing():
    assert [] == describe(plain("LlamaForCausalLM", False)) == describe(plain("Qwen2ForCausalLM", True))


# --- What cannot be ---------------------------------------------------------------------------------------------------

REFUSED = {
    "a norm has no order": (InBlock(0, Permute(0, torch.arange(32))), "turn the stream instead"),
    "a norm has no bias": (InBlock(1, Shift(2, torch.ones(32))), "from no norm with a bias"),
    "neurons are gated": (InBlock(0, Shift(3, torch.ones(64))), "no values of attention"),
    "a norm is elementwise": (InBlock(0, Rotate(0, torch.eye(8)[None])), "works on each channel"),
    "a scale of zero": (InBlock(0, Divide(0, torch.zeros(32))), "must be finite and above 0"),
    "too few scales": (InBlock(0, Divide(0, torch.ones(31))), "must be (32,)"),
    "an order that names one twice": (InBlock(0, Permute(3, torch.zeros(64, dtype=torch.int64))), "each of them once"),
    "a norm that is not folded": (Turn(1, torch.eye(32)), "fold it into its readers first"),
    "a wider basis": (Turn(0, torch.ones(32, 33)), "the basis must be (32, 1 to 32)"),
    "no such place": (Turn(7, torch.eye(32)), "must be 0 to 6"),
    "no such block": (InBlock(3, Divide(0, torch.ones(32))), "must be 0 to 2"),
    "no such site": (InBlock(0, Divide(4, torch.ones(32))), "must be 0 to 3"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_an_architecture_does_not_allow_is_refused_in_words(case):
    edit, words = REFUSED[case]

    with pytest.raises(LayerError) as refused:
        edit.apply(Decoder(model_of("MistralForCausalLM", 1)))

    assert words in str(refused.value)


def test_layers_of_a_turned_stream_stay():
    model = model_of("MistralForCausalLM", 1)
    for edit in (FoldNorm(2), Turn(2, orthogonal(1, 32, 32))):
        edit.apply(Decoder(model))

    with pytest.raises(LayerError, match="remove layers before the step that turns it"):
        KeepLayers((0,)).apply(Decoder(model))


@pytest.mark.parametrize(
    "entry",
    [
        None, {}, {"edit": "melt"}, {"edit": "turn", "place": 0}, {"edit": "turn", "place": "0", "basis": None},
        {"edit": "turn", "place": 0, "basis": {"shape": [32, -1], "whole": False}},
        {"edit": "turn", "place": 0, "basis": {"shape": [32, 2**40], "whole": False}},
        {"edit": "turn", "place": 0, "basis": {"shape": "32", "whole": False}},
        {"edit": "turn", "place": -1, "basis": {"shape": [32, 8], "whole": False}},
        {"edit": "turn", "place": True, "basis": {"shape": [32, 8], "whole": False}},
        {"edit": "in_block", "block": 0, "what": {"edit": "shift", "site": 1, "values": {"shape": [3], "whole": 0}}},
    ],
)  # fmt: skip
def test_json_that_is_no_edit_is_refused(entry):
    with pytest.raises(LayerError):
        restore(fresh(plain("LlamaForCausalLM", False)), [entry])
