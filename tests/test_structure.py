"""Decoders cut smaller: what is kept computes what it computed, the configuration agrees, and no layer goes unsaid."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from checkpoints import transformers_model
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import gaussian, seeds

import compression
from bench._step import lean_step
from bench.generation import Decoder, Load, _static_cache
from bench.metrics.compute import model_flops_per_token
from compression import CalibrationError, LayerError, Recipe, RecipeError
from compression._artefact import stored_bytes
from compression._blocks import Inputs, decoder_blocks
from compression._checkpoint import build, byte_tokenizer
from compression._checks import check
from compression._grids import AffineGrid, Int8RowGrid, NF4Grid, quantize
from compression._linear import PackedLinear
from compression._shapes import SHAPES
from compression._structure import count_heads, keep_heads
from compression.pruning import _importance
from compression.pruning.p import P
from compression.pruning.structured import layers_by_position

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
SIZES = {
    "vocab_size": 300, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 5, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 16, "initializer_range": 0.1,
}  # fmt: skip
IDS = torch.randint(300, (4, 12), generator=torch.Generator().manual_seed(1))
HEADS = "structured(keep_layers=none,keep_kv_heads=3"
LAYERS = "structured(keep_kv_heads=none,keep_layers="
NF4 = "nf4(group_size=32)"


@pytest.fixture(scope="module", autouse=True)
def folders(tmp_path_factory):
    """Checkpoints that transformers wrote, one to an architecture; `opened` reads them."""
    for family in FAMILIES:
        sizes = {key: value for key, value in SIZES.items() if key != "head_dim" or family != "Qwen2ForCausalLM"}
        model = transformers_model(family, **sizes)
        with torch.random.fork_rng():
            torch.manual_seed(2)
            for name, parameter in model.named_parameters():
                if "norm" in name or name.endswith("bias"):  # ones and zeros would hide one that is left out
                    parameter.data.normal_(1 if "norm" in name else 0, 0.3)
        folder = tmp_path_factory.mktemp("base") / family
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        FOLDERS[family] = folder
    yield
    FOLDERS.clear()
    compressed.cache_clear()


FOLDERS = {}


def opened(family="MistralForCausalLM", edit=None):
    base = compression.open_base(str(FOLDERS[family]))
    if edit is not None:
        edit(base.model)
    return base


@functools.cache
def compressed(family, recipe):
    return compression.compress(opened(family), recipe, calibration=IDS)


def logits(model):
    with torch.inference_mode():
        return model(IDS, use_cache=False).logits


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def without(model, layers=(), heads=(), neurons=()):
    """The slow reference: the whole model, with the parts that go cut off from the residual stream by zeros."""
    model = copy.deepcopy(model)
    for i, block in enumerate(decoder_blocks(model)):
        attention, mlp = block.module.self_attn, block.module.mlp
        queries, kv_heads = count_heads(block)
        for head in range(kv_heads) if i in layers else heads:
            width = queries // kv_heads * attention.head_dim
            attention.o_proj.weight.data[:, head * width : (head + 1) * width] = 0
        mlp.down_proj.weight.data[:, slice(None) if i in layers else list(neurons)] = 0
    return model


# --- Which parts stay -------------------------------------------------------------------------------------------------


def test_of_32_layers_the_paper_keeps_the_first_8_and_the_last_12():
    assert [*range(8), *range(20, 32)] == layers_by_position(20, 32)
    assert [0, 1, 5, 6, 7] == layers_by_position(5, 8)
    assert list(range(7)) == layers_by_position(7, 7)


def skeleton(shape):
    return build(SHAPES[shape], torch.bfloat16, device="meta")


def test_mistral_7b_is_left_with_20_layers_and_6_of_8_kv_heads_of_its_shapes():
    model = check(Recipe.parse("structured"), skeleton("mistral-7b"))

    config, attention = model.config, model.model.layers[19].self_attn
    assert (20, 24, 6, 128) == (
        config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    )  # fmt: skip
    shapes = {name: tuple(getattr(attention, f"{name}_proj").weight.shape) for name in "qkvo"}
    assert {"q": (3072, 4096), "k": (768, 4096), "v": (768, 4096), "o": (4096, 3072)} == shapes
    assert list(range(20)) == [layer.self_attn.layer_idx for layer in model.model.layers]


@pytest.mark.parametrize(("text", "left"), [("p(round_to=1)", 7706), ("p", 7680), ("p(ratio=0.5)", 5504)])
def test_of_11008_neurons_the_paper_keeps_7706_and_the_default_a_multiple_of_128(text, left):
    model = check(Recipe.parse(text), skeleton("qwen2.5-3b"))

    mlp = model.model.layers[35].mlp
    assert left == model.config.intermediate_size
    assert [(left, 2048), (left, 2048), (2048, left)] == [
        tuple(layer.weight.shape) for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    ]


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 200), st.integers(1, 4000))
def test_what_stays_of_neurons_is_the_nearest_allowed_number(ratio, round_to, neurons):
    exact = neurons - int(ratio * neurons + 1e-9)
    try:
        kept = P(ratio=ratio, round_to=round_to).keep(neurons)
    except LayerError:
        allowed = range(round_to, neurons, round_to)
        assert not allowed or 2 * exact < round_to or exact < neurons < exact + round_to / 2 + round_to
        return

    assert (kept == neurons == exact) or (kept % round_to == 0 and 0 < kept < neurons)
    if round_to == 1:
        assert exact == kept
    elif kept < neurons:
        assert abs(kept - exact) <= round_to / 2 or kept == neurons // round_to * round_to


# --- What was kept computes what it computed --------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_model_is_the_whole_one_without_the_parts_that_went(family):
    base = opened(family)
    cut = compressed(family, "structured(keep_layers=3)").model

    assert_close(logits(cut), logits(without(base.model, layers=[1, 2], heads=[3])))
    for other in ({}, {"layers": [1, 2]}, {"heads": [3]}, {"layers": [2, 3], "heads": [3]}):  # it matters what went
        assert (logits(cut) - logits(without(base.model, **other))).abs().max() > 0.05


@pytest.mark.parametrize("kept", [[0, 2], [1, 3], [3]])
def test_query_heads_go_with_the_head_of_keys_that_they_attend_to(kept):
    base, model = opened("Qwen3ForCausalLM"), opened("Qwen3ForCausalLM").model
    for block in decoder_blocks(model):
        keep_heads(block, torch.tensor(kept))

    assert_close(logits(model), logits(without(base.model, heads=[h for h in range(4) if h not in kept])))


def test_heads_cut_as_the_paper_lists_them_cannot_run():
    """Listing 6 of [E]: rows of k_proj and v_proj alone; a negative control."""
    model = opened().model
    attention = model.model.layers[0].self_attn
    for linear in (attention.k_proj, attention.v_proj):
        linear.weight = torch.nn.Parameter(linear.weight[: 3 * attention.head_dim])

    with pytest.raises(RuntimeError):
        logits(model)


@pytest.mark.parametrize("family", FAMILIES[1:3])
def test_neurons_of_zeros_are_the_ones_that_go_and_no_logit_changes(family):
    dead = [3, 4, 50, 95]

    def edit(model):
        for layer in model.model.layers:
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                linear.weight.data[dead] = 0

    base = opened(family, edit)
    result = compression.compress(base, f"p(ratio={4.5 / 96},round_to=1)", calibration=IDS)

    assert 92 == result.model.config.intermediate_size
    assert_close(logits(result.model), logits(base.model))
    kept = [i for i in range(96) if i not in dead]
    down = [model.model.layers[4].mlp.down_proj.weight for model in (base.model, result.model)]
    assert torch.equal(down[0][:, kept], down[1])


def test_neurons_that_are_not_zero_are_missed():
    base = opened()

    result = compression.compress(base, f"p(ratio={4.5 / 96},round_to=1)", calibration=IDS)

    assert (logits(result.model) - logits(base.model)).abs().max() > 0.01
    assert (92, 96) == (result.model.config.intermediate_size, base.model.config.intermediate_size)


@pytest.mark.parametrize("family", FAMILIES[2:])
def test_a_head_that_o_proj_does_not_read_is_the_one_that_goes_and_no_logit_changes(family):
    base = opened(family)
    base.model = without(base.model, heads=[1])

    result = compression.compress(base, f"{HEADS},heads=importance)", calibration=IDS)

    assert (6, 3) == (result.model.config.num_attention_heads, result.model.config.num_key_value_heads)
    assert_close(logits(result.model), logits(base.model))
    assert (logits(compressed(family, f"{HEADS})").model) - logits(base.model)).abs().max() > 0.05


def test_a_layer_that_is_the_identity_is_the_one_that_goes_and_no_bit_of_a_logit_changes():
    base = opened()
    base.model = without(base.model, layers=[2])

    result = compression.compress(base, f"{LAYERS}4,choose=similarity)", calibration=IDS)

    removed = {entry.name for entry in result.report if entry.outcome == "removed"}
    assert {name for name, _ in decoder_blocks(base.model)[2].linears()} == removed
    assert torch.equal(logits(base.model), logits(result.model))
    for entry in result.report:
        if entry.outcome == "removed":
            assert "layer 2 of 5 is none of the 4 that stay, similarity 1.0000" in entry.detail


EVERYTHING = (
    "structured(keep_layers=1.0,keep_kv_heads=1.0)",
    "structured(keep_layers=5,keep_kv_heads=4)",
    "p(ratio=0)",
    f"{NF4}-p(ratio=0)",
    f"{NF4}-structured(keep_layers=none,keep_kv_heads=none)",
)


@pytest.mark.parametrize("text", EVERYTHING)
def test_keeping_everything_is_the_identity_bit_for_bit(text):
    base = opened()
    before = base.model if "nf4" not in text else compressed("MistralForCausalLM", NF4).model

    result = compression.compress(base, text)

    assert torch.equal(logits(before), logits(result.model))
    after = result.model.state_dict()
    assert before.state_dict().keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.state_dict().items())
    assert "nf4" in text or all(entry.outcome == "kept" for entry in result.report)


# --- What is measured, against slow references ------------------------------------------------------------------------


@torch.no_grad()
def test_similarity_is_the_mean_cosine_of_what_enters_and_leaves_a_layer():
    model, seen = opened().model, []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, arguments, output: seen.append((arguments[0], output)))
    for sample in IDS:
        model(sample[None], use_cache=False)
    expected = [
        torch.stack([
            (x * y).sum() / x.norm() / y.norm()
            for before, after in seen[i::5]
            for x, y in zip(before.squeeze(0), after.squeeze(0), strict=True)
        ]).mean()
        for i in range(5)
    ]  # fmt: skip

    assert pytest.approx([float(x) for x in expected], rel=1e-5) == _importance.layer_similarity(opened().model, IDS)


@torch.no_grad()
def test_perplexity_without_a_layer_is_that_of_the_model_without_it():
    expected = []
    for i in range(5):
        model = opened().model
        del model.model.layers[i]
        model.config.num_hidden_layers = 4
        losses = [F.cross_entropy(logits(model)[j, :-1], sample[1:]) for j, sample in enumerate(IDS)]
        expected.append(float(torch.stack(losses).mean().exp()))

    found = _importance.perplexity_without(opened().model, IDS)

    assert pytest.approx(expected, rel=1e-4) == found
    result = compressed("MistralForCausalLM", f"{LAYERS}4,choose=perplexity)")
    (gone,) = {entry.name.split(".")[2] for entry in result.report if entry.outcome == "removed"}
    assert expected.index(min(expected)) == int(gone)


@torch.no_grad()
def test_the_contribution_of_a_head_is_the_norm_of_what_its_columns_add():
    model = opened().model
    block, seen = decoder_blocks(model)[0], []
    block.module.self_attn.o_proj.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    logits(model)
    expected = []
    for head in range(4):
        columns = slice(32 * head, 32 * head + 32)
        weight = block.module.self_attn.o_proj.weight[:, columns]
        expected.append(float(sum((weight @ x).square().sum() for x in seen[0][..., columns].reshape(-1, 32)).sqrt()))

    fresh = opened().model
    found = _importance.head_contribution(decoder_blocks(fresh)[0], Inputs.of_first_block(fresh, IDS))

    assert pytest.approx(expected, rel=1e-4) == found.tolist()


@torch.no_grad()
def test_the_neurons_that_stay_are_those_of_the_papers_score_on_the_model_as_it_was():
    model, hidden = opened().model, []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, arguments: hidden.append(arguments[0]))
    logits(model)

    cut = compressed("MistralForCausalLM", "p(ratio=0.3,round_to=1)").model

    for i, layer in enumerate(model.model.layers):
        weight = [
            float(layer.mlp.gate_proj.weight[n].abs().sum() + layer.mlp.up_proj.weight[n].abs().sum())
            for n in range(96)
        ]
        activation = [float(hidden[i][..., n].abs().mean()) for n in range(96)]
        score = [0.5 * w / max(weight) + 0.5 * a / max(activation) for w, a in zip(weight, activation, strict=True)]
        gone = sorted(range(96), key=score.__getitem__)[: int(0.3 * 96)]
        kept = [n for n in range(96) if n not in gone]
        assert torch.equal(layer.mlp.gate_proj.weight[kept], cut.model.layers[i].mlp.gate_proj.weight)
        assert torch.equal(layer.mlp.up_proj.weight[kept], cut.model.layers[i].mlp.up_proj.weight)
        assert torch.equal(layer.mlp.down_proj.weight[:, kept], cut.model.layers[i].mlp.down_proj.weight)


# --- Generation, saving, counting -------------------------------------------------------------------------------------

CUTS = ("structured(keep_layers=3)", f"{NF4}-structured(keep_layers=3)", "p(ratio=0.3,round_to=32)")


def greedy(model, how, new=10):
    """Token ids behind a prompt of seven: without a cache, with transformers' two, or by the step of the benchmarks."""
    tokens, length = IDS[:1, :7], 7 + new
    cache = None if how == "none" else _static_cache(model.config, 1, length) if how != "dynamic" else True
    step = lean_step(model, length) if how == "lean" else None
    with torch.inference_mode():
        for at in range(7, length):
            if how == "none":
                found = model(tokens, use_cache=False).logits
            elif at == 7:
                out = model(tokens, past_key_values=None if cache is True else cache, use_cache=True)
                found, cache = out.logits, out.past_key_values
            elif step is not None:
                found = step(tokens[:, -1:], at - 1, cache)
            else:
                found = model(tokens[:, -1:], past_key_values=cache, use_cache=True).logits
            tokens = torch.cat([tokens, found[:, -1:].argmax(-1)], 1)
    return tokens[0, 7:].tolist()


@pytest.mark.parametrize(
    ("family", "text"), [*((family, CUTS[0]) for family in FAMILIES), (FAMILIES[2], CUTS[1]), (FAMILIES[3], CUTS[2])]
)
def test_generation_is_the_same_with_and_without_a_cache(family, text):
    model = compressed(family, text).model

    expected = greedy(model, "none")

    assert len(set(expected)) > 2  # else it would show nothing
    assert [expected] * 3 == [greedy(model, how) for how in ("dynamic", "static", "lean")]


def test_the_cache_shrinks_by_the_product_of_the_shares_and_the_work_by_what_was_cut():
    load = Load(prompt_tokens=5, new_tokens=4)
    base, cut = opened().model, compressed("MistralForCausalLM", CUTS[0]).model

    before, after = (Decoder(model, load).run().kv_bytes for model in (base, cut))

    assert 20 * after == 9 * before  # 3 of 5 layers, 3 of 4 heads
    assert 5 * 3 * (2 * 128 * (2 * 96 + 2 * 48) + 2 * 3 * 128 * 96 + 4 * 96 * 9) == 5 * (
        model_flops_per_token(cut, 9) - 2 * 128 * 300
    )


@pytest.mark.parametrize(("family", "text"), [*((family, CUTS[0]) for family in FAMILIES), (FAMILIES[2], CUTS[2])])
def test_what_is_saved_opens_in_plain_transformers(family, text, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = compressed(family, text)
    folder = result.save(tmp_path / "cut")

    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)

    assert [set()] * 3 == [set(told[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")]
    assert_close(logits(model.eval()), logits(result.model))
    assert torch.equal(logits(compression.load(folder).model), logits(result.model))
    assert torch.equal(logits(compression.open_base(str(folder)).model), logits(result.model))
    config, attention = model.config, model.model.layers[0].self_attn
    structured = text == CUTS[0]
    assert (3, 6, 3, 96) if structured else (5, 8, 4, 64) == (
        config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
    )  # fmt: skip
    assert 16 == config.head_dim == attention.head_dim
    assert len(getattr(config, "layer_types", None) or model.model.layers) == config.num_hidden_layers
    assert AutoTokenizer.from_pretrained(folder).encode("abc") == byte_tokenizer().encode("abc")


def test_a_llama_whose_heads_do_not_divide_its_width_becomes_a_mistral_and_says_so():
    """128 / 6: transformers refuses the configuration of such a Llama, and computes it."""
    from transformers import LlamaConfig

    with pytest.raises(Exception, match="not a multiple"):
        LlamaConfig(hidden_size=128, num_attention_heads=6, num_key_value_heads=3).validate()

    result = compressed("LlamaForCausalLM", CUTS[0])

    assert ("MistralForCausalLM", None) == (type(result.model).__name__, result.model.config.sliding_window)
    (told,) = [entry.detail for entry in result.report if entry.name == "model"]
    assert told.startswith("a MistralForCausalLM, the same function")
    halved = compressed("LlamaForCausalLM", "structured(keep_kv_heads=2)")
    assert "LlamaForCausalLM" == type(halved.model).__name__
    assert "model" not in {entry.name for entry in halved.report}


def test_layers_of_different_attention_keep_their_kinds():
    sizes = SIZES | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}
    model = transformers_model("Qwen3ForCausalLM", **sizes).eval()
    base = opened("Qwen3ForCausalLM")
    base.model = model.requires_grad_(False)

    cut = compression.compress(base, "structured(keep_layers=3)").model

    assert ["full_attention", "sliding_attention", "sliding_attention"] == cut.config.layer_types
    assert_close(logits(cut), logits(without(model, layers=[1, 2], heads=[3])))
    assert greedy(cut, "none") == greedy(cut, "dynamic")


# --- Packed layers ----------------------------------------------------------------------------------------------------

GRIDS = (
    NF4Grid(group_size=32), NF4Grid(group_size=64), NF4Grid(group_size=64, double_quant=False), Int8RowGrid(),
    *(AffineGrid(bits=bits, group_size=size, symmetric=symmetric)
      for bits, size, symmetric in ((4, 64, False), (3, 32, False), (2, -1, False), (8, 64, True))),
    AffineGrid(bits=4, group_size=64, symmetric=False, float_zeros=True),
)  # fmt: skip
ROWS, COLS = 96, 256


def packed(grid, seed, *, permuted=False, bias=False):
    codes, params = quantize(grid, gaussian(ROWS, COLS, seed=seed) * (1 + torch.arange(ROWS)[:, None]))
    order = torch.randperm(COLS, generator=torch.Generator().manual_seed(seed)) if permuted else None
    return PackedLinear.from_codes(
        codes, params, torch.arange(ROWS).float() if bias else None, grid, dtype=torch.float32, permutation=order
    )


def check_rows(grid, seed, kept, permuted=False):
    layer = packed(grid, seed, permuted=permuted, bias=True)

    cut = layer.take_rows(torch.tensor(kept))

    assert torch.equal(layer.dequantize()[kept], cut.dequantize())
    assert torch.equal(layer.bias[kept], cut.bias)
    x = gaussian(3, COLS, std=1)
    torch.testing.assert_close(cut(x), layer.reference(x)[:, kept], rtol=1e-4, atol=2e-3)


subsets = st.lists(st.integers(0, ROWS - 1), min_size=1, unique=True).map(sorted)


@settings(max_examples=25)
@given(st.sampled_from(GRIDS), seeds, subsets | st.integers(1, ROWS).map(lambda n: list(range(n))), st.booleans())
def test_rows_of_a_packed_layer_keep_their_bits(grid, seed, kept, permuted):
    check_rows(grid, seed, kept, permuted)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rows_of_a_packed_layer_from_the_front_are_stored_as_before(grid):
    layer = packed(grid, 0)

    cut = layer.take_rows(torch.arange(64))

    assert grid == cut.grid
    assert PackedLinear(grid, COLS, 64, bias=False, dtype=torch.float32, device="meta").stored_bytes == cut.stored_bytes


def test_the_law_catches_blocks_of_double_quantization_that_are_ignored(monkeypatch):
    """A negative control: scales of the blocks as they stood, over codes that moved."""

    def broken(self, params, places, size):
        flat = places.flatten()
        blocks = -(-len(flat) // 256)
        return self, params | {
            "absmax_codes": params["absmax_codes"][flat], "absmax_scales": params["absmax_scales"][:blocks]
        }  # fmt: skip

    kept = list(range(40, 96))
    check_rows(NF4Grid(group_size=32), 0, kept)
    monkeypatch.setattr(NF4Grid, "take", broken)
    with pytest.raises(AssertionError):
        check_rows(NF4Grid(group_size=32), 0, kept)


@settings(max_examples=25)
@given(st.sampled_from(GRIDS), seeds, st.sets(st.integers(0, 7), min_size=1), st.booleans())
def test_columns_that_fall_into_groups_keep_their_bits(grid, seed, blocks, permuted):
    layer = packed(grid, seed, permuted=permuted)
    columns = torch.cat([torch.arange(32) + 32 * block for block in sorted(blocks)])
    if permuted:  # blocks of what is stored
        columns = torch.sort(layer.permutation[columns].long()).values

    cut, change = layer.take_columns(columns)

    assert 0.0 == change
    assert torch.equal(layer.dequantize()[:, columns], cut.dequantize())
    x = gaussian(3, COLS, std=1)
    alone = torch.zeros_like(x).index_copy(1, columns, x[:, columns])
    torch.testing.assert_close(cut(x[:, columns]), layer.reference(alone), rtol=1e-4, atol=2e-3)


@settings(max_examples=25)
@given(st.sampled_from(GRIDS), seeds, st.booleans())
def test_columns_that_do_not_are_rounded_on_their_own_grid_and_the_change_is_told(grid, seed, permuted):
    layer = packed(grid, seed, permuted=permuted)
    generator = torch.Generator().manual_seed(seed + 1)
    columns = torch.sort(torch.randperm(COLS, generator=generator)[:192]).values
    expected = layer.dequantize()[:, columns]

    cut, change = layer.take_columns(columns)

    assert grid == cut.grid
    assert pytest.approx(float((cut.dequantize() - expected).norm() / expected.norm()), abs=1e-6) == change
    assert 0.0 == change if grid.group_size == -1 else 0 < change < {2: 0.5, 3: 0.25, 4: 0.15, 8: 0.01}[grid.bits]


def test_columns_that_no_group_tiles_are_refused():
    with pytest.raises(LayerError, match="groups of 64 cannot be cut to tile the 200 inputs that are left"):
        packed(NF4Grid(), 0).take_columns(torch.arange(200))


PACKED = (
    CUTS[1],
    f"rtn(group_size=32)-{CUTS[0]}",
    f"gptq(group_size=32,act_order=true,samples=4,sequence_length=12)-{CUTS[0]}",
    f"hqq(group_size=32)-{CUTS[2]}",
    f"{NF4}-{CUTS[2]}",
)


@pytest.mark.parametrize("text", PACKED)
def test_a_packed_model_is_cut_and_stays_packed(text, tmp_path):
    quantized = compressed("Qwen2ForCausalLM", text.split("-s")[0].split("-p")[0])
    result = compressed("Qwen2ForCausalLM", text)

    linears = [linear for block in decoder_blocks(result.model) for _, linear in block.linears()]
    assert 2 == len(result.executed)
    assert all(isinstance(linear, PackedLinear) for linear in linears)
    assert result.stored_bytes < quantized.stored_bytes
    whole = copy.deepcopy(quantized.model)
    for block in decoder_blocks(whole):
        for name, linear in block.linears():
            block.replace(name, linear.to_linear())
    exact = not any("rounded again" in entry.detail for entry in result.report)
    assert exact == (CUTS[0] in text and "act_order" not in text)
    if exact:
        assert_close(logits(result.model), logits(without(whole, layers=[1, 2], heads=[3])))
    opened_again = compression.load(result.save(tmp_path / "cut"))
    assert torch.equal(logits(opened_again.model), logits(result.model))
    assert result.stored_bytes == opened_again.stored_bytes
    assert result.report == opened_again.report


def test_a_step_that_edits_packed_weights_is_no_quantizer_and_cut_models_are_quantized():
    assert (NF4, CUTS[0]) == compressed("MistralForCausalLM", f"{NF4}-{CUTS[0]}").executed
    result = compressed("MistralForCausalLM", f"{CUTS[0]}-{NF4}")
    assert 21 == sum(result.kernels().values())


# --- Fine-tuning ------------------------------------------------------------------------------------------------------

CUT = "p(round_to=32,samples=4)"
TUNED = "p(round_to=32,samples=4,finetune_samples=16)"


def test_fine_tuning_trains_all_that_is_left_on_the_loss_of_the_text(tmp_path):
    from compression.distillation._settings import Objective, Settings
    from compression.distillation._training import train

    ids, base = torch.randint(300, (20, 12), generator=torch.Generator().manual_seed(3)), opened()
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    wanted = copy.deepcopy(compression.compress(base, CUT, calibration=ids).model)
    result = compression.compress(base, TUNED, calibration=ids, cache=tmp_path / "cache")

    settings = Settings(epochs=2, learning_rate=5e-5, batch=2, accumulation=4, clip=1.0)
    cut = {name: tensor.clone() for name, tensor in wanted.state_dict().items()}
    train(wanted, ids[:16], Objective(alpha=0, temperature=1), settings, tmp_path / "runs")
    found = result.model.state_dict()
    torch.testing.assert_close(wanted.state_dict(), found, rtol=0, atol=0)
    assert {name for name in cut if not torch.equal(cut[name], found[name])} == cut.keys()
    torch.testing.assert_close(before, base.model.state_dict(), rtol=0, atol=0)
    assert 2 * 16 * 12 == result.cost.trained_tokens
    assert {"replaced"} == {entry.outcome for entry in result.report}
    assert all("4 steps over 384 tokens" in entry.detail for entry in result.report)


def test_packed_weights_are_not_fine_tuned_which_is_said_before_any_work():
    with pytest.raises(
        LayerError, match=r"trains all weights, and those of model\.layers\.0\.self_attn\.q_proj are pack"
    ):
        check(Recipe.parse(f"{NF4}-{TUNED}"), opened().model)
    check(Recipe.parse(f"{TUNED}-{NF4}"), opened().model)


# --- Before any work --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("structured(keep_layers=0)", "keep_layers=0): at least 1"),
        ("structured(keep_layers=-3)", "keep_layers=-3): at least 1"),
        ("structured(keep_layers=0.0)", "above 0 and at most 1"),
        ("structured(keep_layers=1.5)", "keep_layers=1.5): a share must be above 0 and at most 1"),
        ("structured(keep_kv_heads=-0.5)", "keep_kv_heads=-0.5): a share"),
        ("structured(keep_kv_heads=2.0)", "written without a point"),
        ("structured(choose=size)", "allowed are position, similarity, perplexity"),
        ("structured(samples=0)", "structured(samples=0): must be at least 1"),
        ('structured(layers={"*":null})', "no settings per layer"),
        ("p(ratio=1.0)", "p(ratio=1.0): allowed are 0 to below 1"),
        ("p(ratio=-0.1)", "p(ratio=-0.1): allowed are 0 to below 1"),
        ("p(round_to=0)", "p(round_to=0): must be at least 1"),
        ("p(finetune_samples=7)", "p(finetune_samples=7): one step takes 8 texts; allowed are 0 and 8 or more"),
        ("p(sequence_length=0)", "p(sequence_length=0): must be at least 1"),
    ],
)
def test_parameters_that_cannot_be_are_refused(text, words):
    with pytest.raises(RecipeError) as refused:
        Recipe.parse(text)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("shape", "text", "words"),
    [
        ("mistral-7b", "structured(keep_layers=33)", "model.layers.0 to model.layers.31; allowed are 1 to 32"),
        ("mistral-7b", "structured(keep_layers=20)-structured(keep_layers=21)", "has 20 layers"),
        ("mistral-7b", "structured(keep_kv_heads=9)", "layers.0.self_attn has 8 heads of keys and values; allowed"),
        ("llama-2-7b", "structured", "model.layers.0.self_attn has no grouped heads, 32 of keys and"),
        ("qwen2.5-3b", "p(ratio=0.999)", "model.layers.0.mlp: p(ratio=0.999) leaves 12 of 11008 neurons"),
        ("qwen2.5-3b", "p(ratio=0.001)", "leaves 10997 of 11008 neurons, and round_to=128 makes that 11008"),
        ("qwen2.5-3b", "p(round_to=1)-nf4", "nf4 cannot take model.layers.0.mlp.down_proj: group_size=64"),
        ("qwen2.5-3b", "nf4-p(round_to=1)", "model.layers.0.mlp.down_proj: its groups of 64 cannot be cut"),
    ],
)  # fmt: skip
def test_what_the_shapes_forbid_is_refused_from_the_configuration_alone(shape, text, words):
    with pytest.raises(LayerError) as refused:
        check(Recipe.parse(text), skeleton(shape))
    assert words in str(refused.value)


def test_a_model_without_grouped_heads_loses_layers_alone():
    model = check(Recipe.parse("structured(keep_kv_heads=none)"), skeleton("llama-2-7b"))

    assert (20, 32) == (model.config.num_hidden_layers, model.config.num_key_value_heads)
    assert "LlamaForCausalLM" == type(model).__name__


def test_a_llama_with_biases_that_transformers_has_no_class_for_is_refused():
    config = SHAPES["tinyllama-1.1b"] | {"attention_bias": True}

    with pytest.raises(LayerError, match=r"q_proj has a bias.* no class for 24 heads of a Llama of width 2048"):
        check(Recipe.parse("structured"), build(config, torch.bfloat16, device="meta"))


def test_a_weight_that_is_not_finite_is_refused_naming_the_layer():
    def edit(model):
        model.model.layers[3].mlp.up_proj.weight.data[1, 2] = float("inf")

    for recipe in ("structured", "p(round_to=1)"):
        with pytest.raises(LayerError, match=r"model\.layers\.3\.mlp\.up_proj.*NaN"):
            compression.compress(opened(edit=edit), recipe, calibration=IDS)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("structured", 0), ("structured(choose=similarity)", 32 * 256), ("structured(heads=importance,samples=2)", 512),
     ("structured(choose=similarity,keep_layers=none)", 0), ("p(samples=3)", 3 * 512), ("p(ratio=0)", 0),
     ("p(samples=3,finetune_samples=1500)", 1500 * 512), ("p(ratio=0,finetune_samples=8)", 8 * 512)],
)  # fmt: skip
def test_calibration_is_asked_for_where_something_is_measured(text, tokens):
    (step,) = Recipe.parse(text).steps

    asked = step.method.calibration

    assert tokens == (0 if asked is None else asked[0] * asked[1])
    if tokens:
        with pytest.raises(CalibrationError, match="needs calibration text"):
            compression.compress(str(FOLDERS["MistralForCausalLM"]), text)


def test_calibration_is_counted():
    assert IDS.numel() == compressed("MistralForCausalLM", CUTS[2]).cost.calibration_tokens
    assert 0 == compressed("MistralForCausalLM", CUTS[0]).cost.calibration_tokens


@pytest.mark.parametrize("text", [CUTS[0], f"{NF4}-{CUTS[2]}"])
def test_block_by_block_it_is_refused_in_words(text, tmp_path):
    with pytest.raises(RecipeError, match="works on the whole model at once; take compress"):
        compression.compress_to(tmp_path / "out", str(FOLDERS["MistralForCausalLM"]), text, calibration=IDS)


# --- The report -------------------------------------------------------------------------------------------------------


def test_every_layer_of_the_base_is_reported_with_what_became_of_it():
    base = opened()
    result = compressed("MistralForCausalLM", CUTS[0])

    said = {entry.name: (entry.outcome, entry.detail) for entry in result.report}
    linears = [name for block in decoder_blocks(base.model) for name, _ in block.linears()]
    assert linears == [entry.name for entry in result.report][: len(linears)]
    assert ("removed", "structured(keep_layers=3): layer 1 of 5 is none of the 3 that stay") == said[
        "model.layers.1.mlp.up_proj"
    ]
    heads = "structured(keep_layers=3): KV heads 0, 1, 2 of 4 stay, 6 of 8 query heads"
    assert ("replaced", heads) == said["model.layers.0.self_attn.o_proj"]
    assert ("replaced", f"{heads}; now model.layers.1.self_attn.k_proj") == said["model.layers.3.self_attn.k_proj"]
    assert ("kept", "the recipe leaves this layer alone; now model.layers.2.mlp.up_proj") == said[
        "model.layers.4.mlp.up_proj"
    ]
    neurons = {e.name: e.detail for e in compressed("MistralForCausalLM", CUTS[2]).report}
    assert "p(round_to=32): 64 of 96 neurons stay" == neurons["model.layers.4.mlp.down_proj"]


@pytest.mark.parametrize(
    ("family", "text"),
    [(FAMILIES[0], CUTS[0]), *((FAMILIES[1], text) for text in (f"{CUTS[0]}-{NF4}", CUTS[1], "p(round_to=32)"))],
)
def test_the_shapes_foreseen_are_those_that_come(family, text):
    """What `--plan` counts, and what later steps are checked against."""
    base = opened(family)

    foreseen = check(Recipe.parse(text), base.model)

    result = compressed(family, text)
    assert type(result.model) is type(foreseen)
    assert stored_bytes(result.model) == stored_bytes(foreseen)
    assert {n: t.shape for n, t in result.model.state_dict().items()} == {
        n: t.shape for n, t in foreseen.state_dict().items()
    }
    assert all(tensor.is_meta for tensor in foreseen.state_dict().values())
    assert not any(tensor.is_meta for tensor in base.model.state_dict().values())
