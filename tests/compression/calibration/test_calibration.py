"""Calibration text and what of it reaches the layers; GPTQ on the reference, end to end."""

import copy
import json
import re

import pytest
import torch
from checkpoints import transformers_model

import compression
from compression import CalibrationError, RecipeError
from compression.architectures.decoder import decoder_blocks
from compression.architectures.random_shapes import SHAPES
from compression.calibration.capture import Inputs
from compression.calibration.text import open_calibration
from compression.checkpoints.base import BaseSource, byte_tokenizer, locate

TINY = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True, "dtype": "float32",
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip
FOLDER = BaseSource("a-folder", "folder")
SMALL = "samples=4,sequence_length=24"


@pytest.fixture
def base(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny-calibrated", TINY)
    return compression.open_base("random:tiny-calibrated")


def tokens(given, *, samples=2, length=8, seed=0, vocabulary=256, tokenizer=None):
    source = open_calibration(given, FOLDER)
    return source.tokens(
        tokenizer or byte_tokenizer(), samples=samples, length=length, seed=seed, vocabulary=vocabulary
    )


# --- Text -------------------------------------------------------------------------------------------------------------


def test_texts_are_joined_by_blank_lines_in_seeded_order_and_cut_into_samples():
    documents = [letter * 4 for letter in "abcdefgh"]

    first, again, other = (tokens(documents, samples=3, length=6, seed=seed) for seed in (1, 1, 2))

    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (3, 6) == tuple(first.shape)
    text = byte_tokenizer().decode(first.flatten())
    assert re.fullmatch(r"(([a-h])\2{3}\n\n)+", text)


def test_text_that_is_too_short_is_an_error_that_says_how_much_there_was():
    with pytest.raises(CalibrationError, match="4 samples of 8 tokens are 32 tokens, and there are 22, enough for "
                                               "samples=2"):  # fmt: skip
        tokens(["x" * 20], samples=4)


@pytest.mark.parametrize("write", [False, True], ids=["compress", "compress_to"])
def test_texts_that_can_be_read_once_are_read_once(tmp_path, write):
    texts, recipe, base = ["letters " * 20] * 20, f"gptq({SMALL},group_size=8)", tmp_path / "base"
    transformers_model("LlamaForCausalLM", vocab_size=258).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    written = []
    for number, given in enumerate((texts, iter(texts))):
        out = tmp_path / str(number)
        if write:
            compression.compress_to(out, str(base), recipe, calibration=given)
        else:
            compression.compress(str(base), recipe, calibration=given).save(out)
        written.append({path.name: path.read_bytes() for path in out.glob("*.safetensors")})

    assert written[0] == written[1]


def test_a_folder_gives_its_texts_and_leaves_out_those_for_evaluation(tmp_path):
    (tmp_path / "a.txt").write_text("first\n\nsecond\n \nthird\n")
    (tmp_path / "b.jsonl").write_text('{"text": "fourth"}\n\n{"content": "fifth"}\n')
    (tmp_path / "wiki-test.txt").write_text("never")
    (tmp_path / "valid.jsonl").write_text('{"text": "never"}')

    documents = open_calibration(str(tmp_path), FOLDER).documents(0)

    assert {"first", "second", "third", "fourth", "fifth"} == set(documents)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        ({}, "has no calibration text"),
        ({"test.txt": "x"}, "has no calibration text"),
        ({"a.jsonl": "{"}, "a.jsonl:1: not JSON"),
        ({"a.jsonl": '{"body": "x"}'}, "a.jsonl:1: calibration needs an object with the field text or content"),
    ],
)
def test_a_folder_that_cannot_serve_is_refused(tmp_path, write, words):
    for name, text in write.items():
        (tmp_path / name).write_text(text)

    with pytest.raises(CalibrationError, match=words):
        tokens(tmp_path)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("embeded", "is not a folder; give calibration"),
        (7, "must be texts or token ids, not int"),
        ([1, 2], "must be texts or token ids"),
        (torch.ones(3, 4), "integers"),
        (torch.zeros(8, dtype=torch.int64), "integers"),
        (torch.full((2, 3), 300), "holds token id 300; the base has a vocabulary of 256"),
    ],
)
def test_what_is_no_calibration_is_refused(given, words):
    with pytest.raises(CalibrationError, match=words):
        tokens(given)


def test_without_text_a_method_that_needs_some_is_refused_before_any_weight_is_read(folder):
    (folder / "model.safetensors").unlink()

    with pytest.raises(CalibrationError, match="gptq needs calibration text, and 'tiny' brings none; give"):
        compression.compress(str(folder), "gptq")


def test_layers_cannot_have_calibration_of_their_own(base):
    with pytest.raises(RecipeError, match="cannot have samples or sequence_length of its own"):
        compression.compress(base, 'gptq(layers={"*.down_proj":{"samples":3}})')


def test_the_embedded_text_is_disjoint_from_what_is_evaluated():
    from bench.data.sources import open_data

    data = open_data("embedded", base="reference")
    calibration = set(open_calibration(None, locate("reference")).documents(0))

    assert len(calibration) > 1000
    for split in ("test", "validation"):
        assert not calibration & set(data.texts(split))


# --- What reaches the layers ------------------------------------------------------------------------------------------


def test_captured_inputs_are_those_of_a_plain_forward(base):
    ids = torch.randint(256, (3, 24), generator=torch.Generator().manual_seed(0))
    blocks, expected, actual = decoder_blocks(base.model), {}, {}
    hooks = [
        block.module.get_submodule(reader).register_forward_pre_hook(
            lambda module, x, key=(block.name, reader): expected.setdefault(key, []).append(x[0])
        )
        for block in blocks for site in block.sites for reader in site.row.readers
    ]  # fmt: skip
    with torch.no_grad():
        for sample in ids:
            base.model(sample[None], use_cache=False)
    for hook in hooks:
        hook.remove()

    inputs = Inputs.of_first_block(base.model, ids)
    for block in blocks:
        inputs.observe(block, lambda site, x, block=block: actual.setdefault((block.name, site.readers), []).append(x))
        inputs.advance(block)

    for (block, stack), captured in actual.items():
        for reader in stack:
            assert all(map(torch.equal, expected[block, reader], captured)), (block, reader)
    assert len(expected) == sum(len(stack) for _, stack in actual) == 3 * 7


def test_capturing_leaves_the_model_as_it_was(base):
    ids = torch.arange(24).view(2, 12)
    before = base.model(ids).logits

    inputs = Inputs.of_first_block(base.model, ids)
    inputs.observe(decoder_blocks(base.model)[0], lambda site, x: None)

    assert torch.equal(before, base.model(ids).logits)
    assert not any(module._forward_pre_hooks for module in base.model.modules())


def test_later_blocks_see_the_outputs_of_compressed_ones(base):
    """Two bits in the first block change what the second is rounded for."""
    kept = '{"model.layers.0.*":null}'
    results = [
        compression.compress(base, f"gptq(bits=2,group_size=32,{SMALL}{layers})").model.model.layers[1].self_attn.q_proj
        for layers in ("", f",layers={kept}")
    ]

    assert not torch.equal(results[0].weight_part.codes, results[1].weight_part.codes)


def test_the_tokens_that_were_read_are_counted_and_a_report_tells_the_error_of_each_layer(base):
    result = compression.compress(base, f"gptq(group_size=32,{SMALL})", calibration=["a text of some length"] * 99)

    assert 4 * 24 == result.cost.calibration_tokens
    for entry in result.report:
        if entry.outcome == "replaced":
            error, nearest = map(float, re.search(r"output error (\S+) \(nearest: (\S+)\)", entry.detail).groups())
            assert 0 < error < nearest, entry


def test_inputs_of_low_rank_without_damping_are_reported(base):
    """Four tokens cannot span 64 channels: H is singular."""
    ids = torch.arange(4).view(1, 4)

    result = compression.compress(base, "gptq(group_size=32,damp=0.0)", calibration=ids)

    assert any("damping raised to" in entry.detail for entry in result.report)


@pytest.mark.parametrize("text", ["gptq(damp=2)", "gptq(group_size=4)", "gptq(samples=0)", "gptq(bits=5)"])
def test_parameters_that_cannot_be_are_refused(text):
    with pytest.raises(RecipeError, match=r"gptq\(.*(allowed|must)"):
        compression.Recipe.parse(text)


# --- End to end -------------------------------------------------------------------------------------------------------


def held_out_nll(model, ids):
    """Mean nat per token of each sample, computed in fp32."""
    model = copy.deepcopy(model).float()
    with torch.no_grad():
        logits = torch.cat([model(sample, use_cache=False).logits for sample in ids.split(4)])
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return nll.view(len(ids), -1).mean(-1)


def divergence(base, model, ids):
    """Mean nat per token of each sample that what the model expects differs from what the base does (KL), in fp32."""
    with torch.no_grad():
        expected, actual = (
            torch.cat([copied(sample, use_cache=False).logits for sample in ids.split(4)]).log_softmax(-1)
            for copied in (copy.deepcopy(each).float() for each in (base, model))
        )
    return (expected.exp() * (expected - actual)).sum(-1).mean(-1)


@pytest.fixture(scope="module")
def reference():
    """The embedded reference, held-out tokens, and its nat per token of each sample."""
    from bench.data.sources import open_data

    base = compression.open_base("reference")
    text = "\n\n".join(open_data("embedded", base="reference").texts("test"))
    ids = base.tokenizer.encode(text, add_special_tokens=False, verbose=False)[: 32 * 256]
    ids = torch.tensor(ids).view(32, 256)
    return base, ids, held_out_nll(base.model, ids)


@pytest.mark.process
@pytest.mark.parametrize("options", ["bits=3,group_size=128,symmetric=true", "bits=2,group_size=128,symmetric=false"])
def test_gptq_takes_back_what_rounding_to_nearest_loses(reference, options):
    base, ids, fp16 = reference

    rtn, gptq = (
        held_out_nll(compression.compress(base, recipe).model, ids)
        for recipe in (f"rtn({options})", f"gptq({options},samples=32,sequence_length=256)")
    )

    gained = rtn - gptq
    assert gained.mean() > 2 * gained.std() / len(gained) ** 0.5  # paired over the samples
    assert gained.mean() >= 0.2 * (rtn - fp16).mean()


@pytest.mark.process
@pytest.mark.parametrize("symmetric", ["false", "true"])
def test_awq_stays_nearer_to_the_base_than_rounding_to_nearest_at_3_bits(reference, symmetric):
    """By divergence: perplexity at 3 bits is an unsteady judge on the reference, see docs/bias.md."""
    base, ids, _ = reference
    options = f"bits=3,symmetric={symmetric}"

    rtn, awq = (
        divergence(base.model, compression.compress(base, recipe).model, ids[:16])
        for recipe in (f"rtn({options})", f"awq({options},samples=16,sequence_length=256)")
    )

    gained = rtn - awq
    assert gained.mean() > 2 * gained.std() / len(gained) ** 0.5  # paired over the samples


def test_a_saved_model_with_activation_order_opens_with_the_same_logits(base, tmp_path):
    result = compression.compress(base, f"gptq(group_size=32,static_groups=false,{SMALL})")
    ids = torch.arange(24).view(2, 12)
    result.save(tmp_path / "out")

    assert torch.equal(result.model(ids).logits, compression.load(tmp_path / "out").model(ids).logits)
    manifest = json.loads((tmp_path / "out" / "compression.json").read_text())
    assert all(layer["weight"]["permuted"] for layer in manifest["layers"].values())
