"""Stored layers: however one comes to be, it is what it says, or it is refused in words that name it."""

import contextlib
import json
import math
import shutil

import pytest
import torch
from checkpoints import leaves, transformers_model
from hypothesis import given
from hypothesis import strategies as st
from packed_layers import affine, coded_linear, pack_linear, sparse_linear
from safetensors.torch import load, save_file
from strategies import gaussian

import compression
from compression import BackendError, CheckpointError, LayerError, Recipe
from compression.architectures import embeddings
from compression.architectures.decoder import stored_layers
from compression.checkpoints.artefact import Compressed
from compression.files.strict_json import signed
from compression.layers.activations import OutlierColumns
from compression.layers.codes import Codes
from compression.layers.embedding import Embedding
from compression.layers.low_rank import LowRank
from compression.layers.sparse import Sparse
from compression.layers.stored import describe, restore
from compression.numeric.grids import AffineGrid, Int8RowGrid
from compression.numeric.grouping import quantize
from compression.numeric.normal_float import NF4Grid

ORDER = torch.arange(32).roll(5)


def permuted(weight):
    grid = affine(4, 32)
    codes, params = quantize(grid, weight[:, ORDER])
    return coded_linear(codes, params, None, grid, dtype=weight.dtype, permutation=ORDER)


def float_zeros(weight):
    grid = AffineGrid(bits=4, group_size=16, symmetric=False, float_zeros=True)
    codes, params = quantize(grid, weight)
    params["zero_points"] = params["zero_points"] + 0.25
    return coded_linear(codes, params, None, grid, dtype=weight.dtype)


def two_of_four(weight):
    gone = weight.abs().view(-1, 4).argsort(-1)[:, :2]
    return sparse_linear(weight.view(-1, 4).scatter(-1, gone, 0.0).view_as(weight), None, (2, 4))


def adapted(base):
    adapter = LowRank(gaussian(2, base.in_features), gaussian(base.out_features, 2), 0.5)
    return base.with_weight(*base.weight_part.summands, adapter)


def packed(grid, **options):
    return lambda weight: pack_linear(weight, None, grid, **options)


def bitmask(weight):
    return sparse_linear(weight.clamp(min=0), None)


KINDS = {  # every way to store a layer, each at its place in one small model
    "model.layers.0.self_attn.q_proj": permuted,
    "model.layers.0.self_attn.k_proj": packed(affine(3, 8, True)),
    "model.layers.0.self_attn.v_proj": float_zeros,
    "model.layers.0.self_attn.o_proj": packed(NF4Grid(group_size=32)),
    "model.layers.0.mlp.gate_proj": packed(NF4Grid(group_size=32, double_quant=False)),
    "model.layers.0.mlp.up_proj": bitmask,
    "model.layers.0.mlp.down_proj": two_of_four,
    "model.layers.1.self_attn.q_proj": lambda w: adapted(packed(affine(2, 32))(w)),
    "model.layers.1.self_attn.k_proj": lambda w: adapted(bitmask(w)),
    "model.layers.1.self_attn.v_proj": packed(Int8RowGrid(), threshold=6.0, backend="torch"),
    "model.layers.1.self_attn.o_proj": packed(affine(8, -1)),
    "model.layers.1.mlp.down_proj": packed(affine(3, 64), backend="native"),
}
ALL = {*KINDS, "model.embed_tokens", "lm_head"}


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    model = transformers_model("LlamaForCausalLM")
    for name, make in KINDS.items():
        model.set_submodule(name, make(model.get_submodule(name).weight.detach()))
    embeddings.pack(model)
    model.requires_grad_(False)
    return Compressed(model, Recipe(), ("tiny", "0")).save(tmp_path_factory.mktemp("artefacts") / "all")


@pytest.fixture(scope="module")
def copy(artefact, tmp_path_factory):
    return shutil.copytree(artefact, tmp_path_factory.mktemp("copies") / "copy")


@pytest.fixture(scope="module")
def manifest(artefact):
    return json.loads((artefact / "compression.json").read_text())


def disagreement(layer):
    """How far the product of a layer is from the one with its dense weight; 0 where that is not finite."""
    if isinstance(layer, Embedding):
        ids = torch.arange(0, layer.num_embeddings, 5)
        return float((layer(ids) - layer.weight[ids]).nan_to_num().abs().max())
    x = gaussian(3, layer.in_features, std=1)
    expected = layer.reference(x)
    if not expected.isfinite().all() or not expected.norm().isfinite():
        return 0.0
    return float((layer(x) - expected).norm() / expected.norm().clamp(min=1e-30))


def opened_or_refused(folder, name):
    """The layer of that name, or None where the folder is refused by words that name it or the file."""
    try:
        return stored_layers(compression.load(folder).model)[name]
    except CheckpointError as error:
        assert name in str(error), error
        return None


def test_a_sound_artefact_of_every_kind_opens_and_multiplies_as_its_dense_weights(artefact):
    layers = stored_layers(compression.load(artefact).model)

    assert ALL == layers.keys()
    assert all(disagreement(layer) < 1e-4 for layer in layers.values())


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 70), st.sampled_from([10**9, 2**31, 2**63, 10**40]), st.floats(-10, 10),
    st.sampled_from(["", "x", "float16", "float8_e4m3fn", "load", "affine", "nf4", "bitmask", "nm"]),
    st.sampled_from([[], {}, [2, 4], [4, 2], [0, 4], [1, 1], [3, 4], [2, 8]]),
)  # fmt: skip


@given(st.data())
def test_a_description_that_was_changed_is_refused_even_if_another_layer_could_be_described_so(
    copy, artefact, manifest, data
):
    name = data.draw(st.sampled_from(sorted(ALL)))
    *path, last = data.draw(st.sampled_from(list(leaves(manifest["layers"][name]))))
    table = json.loads(json.dumps(manifest))
    place = table["layers"][name]
    for key in path:
        place = place[key]
    value = data.draw(VALUES)
    unchanged = place[last] == value and type(place[last]) is type(value)
    place[last] = value
    (copy / "compression.json").write_text(json.dumps(table))
    if not unchanged:
        with pytest.raises(CheckpointError, match="was changed after it was written"):
            compression.load(copy)

    (copy / "compression.json").write_text(json.dumps(signed(table)))  # whoever changes it can sign it, too
    layer = opened_or_refused(copy, name)

    with contextlib.suppress(BackendError):  # it insists on a library that has no such kernel
        assert layer is None or disagreement(layer) < 1e-4


def damages(tensor):
    """What can become of a tensor: other values, another shape, another type."""
    flat = tensor.flatten().view(torch.uint8)

    def bits(mask, at):
        changed = flat.clone()
        changed[at % len(changed)] ^= mask
        return changed.view(tensor.dtype).view(tensor.shape)

    def filled(value):
        return torch.full_like(tensor, value)

    fills = [filled(value) for value in ((math.nan, math.inf) if tensor.is_floating_point() else (0, 1, 100))]
    shapes = [tensor.flatten(), tensor[None], *([tensor[:-1].clone()] if tensor.dim() else [])]
    kinds = [tensor.to(kind) for kind in (torch.float16, torch.int32, torch.int64, torch.uint8) if kind != tensor.dtype]
    if tensor.dim() and tensor.numel() > 1:
        repeated = tensor.clone()
        repeated[1] = repeated[0]
        fills.append(repeated)
    return st.one_of(
        st.builds(bits, st.integers(1, 255), st.integers(0, 10**6)), st.sampled_from([*fills, *shapes, *kinds])
    )


@given(st.data())
def test_a_tensor_that_was_damaged_is_refused_or_read_alike_by_every_path(artefact, tmp_path_factory, data):
    tensors = load((artefact / "compressed.safetensors").read_bytes())
    name = data.draw(st.sampled_from(sorted(ALL)))
    key = data.draw(st.sampled_from(sorted(each for each in tensors if each.startswith(f"{name}."))))
    tensors[key] = data.draw(damages(tensors[key])).contiguous()
    folder = tmp_path_factory.getbasetemp() / "damaged"
    if not folder.exists():
        shutil.copytree(artefact, folder)
    save_file(tensors, folder / "compressed.safetensors", metadata={"format": "pt"})

    layer = opened_or_refused(folder, name)

    assert layer is None or disagreement(layer) < 1e-4


WRONG = {
    "a column twice": ("self_attn.q_proj", "permutation", lambda t: t.index_fill(0, torch.tensor([0]), int(t[1]))),
    "a column that is not there": ("self_attn.q_proj", "permutation", lambda t: t.index_fill(0, torch.tensor([0]), 99)),
    "one value too many": ("mlp.up_proj", "mask", lambda t: t.clone().index_fill_(1, torch.tensor([0]), 255)),
    "a place twice": ("mlp.down_proj", "indices", torch.zeros_like),
    "a scale that is infinite": ("self_attn.k_proj", "scales", lambda t: torch.full_like(t, math.inf)),
    "a value that is no number": ("mlp.up_proj", "values", lambda t: torch.full_like(t, math.nan)),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("assign", [True, False])
def test_loading_a_state_dict_checks_as_opening_an_artefact_does(artefact, what, assign):
    part, key, change = WRONG[what]
    model = compression.load(artefact).model
    name = f"model.layers.0.{part}"
    layer = model.get_submodule(name)
    key, state = f"weight_part.{key}", layer.state_dict()
    state[key] = change(state[key])
    key = key.removeprefix("weight_part.")

    with pytest.raises(LayerError, match=rf"^weight_part: {key}|^weight_part: the order of the columns|{key} must"):
        layer.load_state_dict(state, assign=assign)
    with pytest.raises(LayerError, match=name):
        model.load_state_dict({f"{name}.{each}": tensor for each, tensor in state.items()}, strict=False, assign=assign)


def test_codes_are_not_made_of_floats(artefact):
    layer = compression.load(artefact).model.get_submodule("model.layers.0.self_attn.k_proj")
    state = layer.state_dict()
    state["weight_part.codes"] = state["weight_part.codes"].float() + 0.5

    with pytest.raises(LayerError, match=r"codes is stored as torch\.float32, expected torch\.uint8"):
        layer.load_state_dict(state)


def test_padding_of_packed_rows_is_zero():
    layer = packed(affine(3, 10))(gaussian(4, 10))
    state = layer.state_dict()
    state["weight_part.codes"][:, -1] |= 0x80

    with pytest.raises(LayerError, match="codes has bits set behind the last of the 10 codes"):
        layer.load_state_dict(state)


CANNOT_BE = [
    (lambda: AffineGrid(bits=0, group_size=8, symmetric=True), "bits=0"),
    (lambda: AffineGrid(bits=9, group_size=8, symmetric=True), "bits=9"),
    (lambda: AffineGrid(bits=4.0, group_size=8, symmetric=True), "bits=4.0"),
    (lambda: AffineGrid(bits=4, group_size=8, symmetric=1), "symmetric=1"),
    (lambda: NF4Grid(bits=3), "bits=3"),
    (lambda: Int8RowGrid(group_size=64), "group_size=64"),
    (lambda: packed(affine(4, 0))(gaussian(8, 64)), "group_size=0"),
    (lambda: packed(affine(4, -2))(gaussian(8, 64)), "group_size=-2"),
    (lambda: Codes(NF4Grid(), 0, 64, dtype=torch.float32), "out_features=0"),
    (lambda: Codes(NF4Grid(), 8.0, 64, dtype=torch.float32), "out_features=8.0"),
    (lambda: Codes(NF4Grid(), 8, 64, dtype=torch.int8), "dtype=torch.int8"),
    (lambda: OutlierColumns(math.nan), "threshold=nan"),
    (lambda: Sparse(8, 64, dtype=torch.float32, pattern=(0, 4)), "n of the pattern=0"),
    (lambda: Sparse(8, 64, dtype=torch.float32, pattern=(4, 4)), "n of the pattern=4"),
    (lambda: Sparse(8, 63, dtype=torch.float32, pattern=(2, 4)), "2:4 does not divide"),
    (lambda: Sparse(8, 64, dtype=torch.float32, kept=513), "kept=513"),
    (lambda: LowRank(torch.zeros(0, 8), torch.zeros(8, 0), 1.0), "rank=0"),
    (lambda: LowRank(torch.zeros(2, 8), torch.zeros(8, 2), math.inf), "scale=inf"),
]


@pytest.mark.parametrize(("make", "words"), CANNOT_BE, ids=[words for _, words in CANNOT_BE])
def test_a_layer_that_cannot_be_is_refused_where_it_is_made(make, words):
    with pytest.raises(LayerError, match=f"^{words}|{words} "):
        make()


@pytest.mark.parametrize("name", KINDS)
def test_a_description_gives_the_layer_back(name):
    layer = KINDS[name](gaussian(32, 32 if "down" not in name else 64))
    described = json.loads(json.dumps(describe(layer)))
    again = restore(described)

    assert described == json.loads(json.dumps(describe(again)))
    assert {key: (t.shape, t.dtype) for key, t in layer.state_dict().items()} == {
        key: (t.shape, t.dtype) for key, t in again.state_dict().items()
    }


def test_the_check_tells_layers_apart_from_right_ones(artefact):
    """Negative control: without its check a mask that does not match its values loads, and multiplies otherwise."""
    layer = compression.load(artefact).model.get_submodule("model.layers.0.mlp.up_proj")
    state = layer.state_dict()
    before = layer.weight.clone()
    with contextlib.suppress(LayerError):
        layer.load_state_dict({**state, "weight_part.mask": state["weight_part.mask"].roll(1, 0)}, assign=True)
        layer.weight_part.mask[0, 0] ^= 0xFF
    assert not torch.equal(before, layer.weight)
    with pytest.raises(LayerError):
        layer.check()
