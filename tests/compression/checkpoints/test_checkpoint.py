"""Bases: what opens, and with which words the rest is refused."""

import contextlib
import math

import pytest
import torch
from checkpoints import TINY, change_tensors, logits, rewrite, says, transformers_model
from hypothesis import given, settings
from hypothesis import strategies as st

import compression
from compression import CheckpointError
from compression.architectures.decoder import decoder_blocks
from compression.architectures.random_shapes import SHAPES
from compression.architectures.table import ARCHITECTURES
from compression.calibration.capture import Inputs
from compression.checkpoints.base import NAMED, build, byte_tokenizer, locate, open_base

TIED = ("Qwen2ForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "OPTForCausalLM")

# --- What opens -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_checkpoint_computes_what_transformers_computes(tmp_path, architecture, dtype, shards):
    from transformers import AutoModelForCausalLM

    row = ARCHITECTURES[architecture]
    model = transformers_model(architecture, tied=architecture in TIED, dtype=dtype)
    model.save_pretrained(tmp_path, **({"max_shard_size": "20KB"} if shards else {}))
    assert shards == (tmp_path / "model.safetensors.index.json").exists()

    base = open_base(str(tmp_path))

    attention = "sdpa" if row.sdpa else "eager"
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", attn_implementation=attention).eval()
    if row.fused or any(half.experts for half in row.mlps):  # one product there is several here
        loose = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(logits(base.model), logits(expected), **loose)
    else:
        assert torch.equal(logits(expected), logits(base.model))
    assert {dtype} == {parameter.dtype for parameter in base.model.parameters()}
    assert not any(p.requires_grad for p in base.model.parameters()) and not base.model.training
    assert architecture == type(base.model).__name__


def test_the_bias_of_a_router_keeps_fp32_in_a_checkpoint_of_16_bits(tmp_path):
    name, bias = "model.layers.1.mlp.gate.e_score_correction_bias", torch.tensor([5.0, 5.004, 5.008, 5.012])
    transformers_model("DeepseekV3ForCausalLM", dtype=torch.bfloat16).save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda t: t.update({name: bias}))

    base = open_base(str(tmp_path))

    assert torch.equal(bias, base.model.state_dict()[name])
    compression.compress(base, "rtn(group_size=8)").save(tmp_path / "saved")
    assert torch.equal(bias, compression.load(tmp_path / "saved").model.state_dict()[name])
    block = decoder_blocks(base.model)[1]
    inputs = Inputs([torch.zeros(1, 3, 32)], [{}, {}], at=1)
    assert torch.equal(bias, inputs.computing(block).mlp.gate.e_score_correction_bias)


def test_layers_that_predict_further_tokens_are_left_out(tmp_path):
    transformers_model("DeepseekV3ForCausalLM", num_nextn_predict_layers=1).save_pretrained(tmp_path)
    expected = logits(open_base(str(tmp_path)).model)
    change_tensors(tmp_path, lambda t: t.update({"model.layers.2.eh_proj.weight": torch.ones(32, 64)}))

    assert torch.equal(expected, logits(open_base(str(tmp_path)).model))


@pytest.mark.parametrize("architecture", ["OPTForCausalLM", "LlamaForCausalLM", "GPTNeoXForCausalLM"])
def test_names_without_that_of_the_model_around_them_are_read(tmp_path, architecture):
    transformers_model(architecture).save_pretrained(tmp_path)
    expected = logits(open_base(str(tmp_path)).model)
    change_tensors(tmp_path, lambda t: [t.update({name.split(".", 1)[1]: t.pop(name)}) for name in list(t)
                                        if name.startswith(("model.", "gpt_neox."))])  # fmt: skip

    assert torch.equal(expected, logits(open_base(str(tmp_path)).model))


def test_tied_embeddings_stay_one_tensor(tmp_path):
    transformers_model("Qwen2ForCausalLM", tied=True).save_pretrained(tmp_path)

    model = open_base(str(tmp_path)).model

    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_checkpoint_of_mixed_dtypes_takes_that_of_its_embeddings_as_transformers_does(tmp_path):
    from transformers import AutoModelForCausalLM

    transformers_model("LlamaForCausalLM", dtype=torch.bfloat16).save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda t: t.update({n: v.float() for n, v in t.items() if "norm" in n}))

    model = open_base(str(tmp_path)).model

    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", attn_implementation="sdpa").eval()
    assert {torch.bfloat16} == {parameter.dtype for parameter in model.parameters()}
    assert torch.equal(logits(expected), logits(model))


def test_the_rotary_table_that_older_exports_store_is_no_unknown_tensor(folder):
    before = logits(open_base(str(folder)).model)
    change_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))

    assert torch.equal(before, logits(open_base(str(folder)).model))


def test_a_folder_is_known_by_its_last_part_and_digests_by_its_content(folder):
    base = open_base(str(folder))
    before = base.digest

    change_tensors(folder, lambda t: t["model.norm.weight"].mul_(2))

    assert "tiny" == base.text == locate(f"{folder}/").label
    assert before == base.digest != open_base(str(folder)).digest


def test_weights_are_in_memory_of_their_own(folder):
    base = open_base(str(folder))
    before = logits(base.model)

    (folder / "model.safetensors").write_bytes(b"")

    assert torch.equal(before, logits(base.model))


# --- What is refused, and how -----------------------------------------------------------------------------------------


def test_missing_tensors_are_named(folder):
    change_tensors(folder, lambda t: [t.pop(name) for name in list(t) if "layers.1.mlp" in name])

    names = [f"model.layers.1.mlp.{part}_proj.weight" for part in ("down", "gate", "up")]
    with pytest.raises(CheckpointError, match=says(f"missing {', '.join(names)}", "LlamaForCausalLM")):
        open_base(str(folder))


def test_unknown_tensors_are_named(folder):
    change_tensors(folder, lambda t: t.update({f"model.extra.{i}": torch.ones(1) for i in range(6)}))

    words = says("unknown model.extra.0, model.extra.1, model.extra.2, model.extra.3 and 2 more")
    with pytest.raises(CheckpointError, match=words):
        open_base(str(folder))


def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder):
    change_tensors(folder, lambda t: t.update({"model.norm.weight": torch.ones(33)}))

    with pytest.raises(CheckpointError, match=says("model.norm.weight", "(33,)", "(32,)")):
        open_base(str(folder))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused_naming_the_tensor(folder, value):
    change_tensors(folder, lambda t: t["model.layers.0.mlp.up_proj.weight"][3].fill_(value))

    with pytest.raises(CheckpointError, match=says("model.layers.0.mlp.up_proj.weight has NaN or infinite values")):
        open_base(str(folder))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_of_another_kind_of_number_are_refused(folder, dtype):
    change_tensors(folder, lambda t: t.update({"model.norm.weight": torch.ones(32).to(dtype)}))

    with pytest.raises(CheckpointError, match=says("model.norm.weight is stored as", str(dtype))):
        open_base(str(folder))


def test_a_second_head_where_the_configuration_ties_it_is_refused(tmp_path):
    transformers_model("Qwen2ForCausalLM", tied=True).save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda t: t.update({"lm_head.weight": torch.ones(48, 32)}))

    words = says("lm_head.weight differs from model.embed_tokens.weight", "tie_word_embeddings to false")
    with pytest.raises(CheckpointError, match=words):
        open_base(str(tmp_path))


@pytest.mark.parametrize("keep", [0, 4, 300, -10])
def test_a_truncated_file_is_refused(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])

    words = says("model.safetensors is damaged or not safetensors", "download it again")
    with pytest.raises(CheckpointError, match=words):
        open_base(str(folder))


def test_a_pickle_is_not_opened_and_the_way_out_is_named(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")

    words = says(
        "has neither model.safetensors nor model.safetensors.index.json",
        "pytorch_model.bin can run code",
        "save_pretrained",
    )
    with pytest.raises(CheckpointError, match=words):
        open_base(str(folder))


def test_a_folder_without_weights_says_so(folder):
    (folder / "model.safetensors").unlink()

    with pytest.raises(CheckpointError, match=says("has neither model.safetensors")) as refused:
        open_base(str(folder))
    assert "can run code" not in str(refused.value)


def test_a_folder_without_a_configuration_says_what_it_holds(folder):
    (folder / "config.json").unlink()

    with pytest.raises(CheckpointError, match=says("config.json is missing; the folder has", "model.safetensors")):
        open_base(str(folder))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"not json"])
def test_a_configuration_that_is_not_json_is_refused(folder, content):
    (folder / "config.json").write_bytes(content)

    with pytest.raises(CheckpointError, match=says("config.json is not JSON")):
        open_base(str(folder))


def test_a_configuration_that_is_no_object_is_refused(folder):
    (folder / "config.json").write_text("[1]")

    with pytest.raises(CheckpointError, match=says("config.json must hold a JSON object")):
        open_base(str(folder))


@pytest.mark.parametrize(
    "names", [["GPT2LMHeadModel"], "GPT2LMHeadModel", ["LlamaForSequenceClassification"], [], ..., None]
)
def test_an_unsupported_architecture_is_named_with_those_that_are_supported(folder, names):
    rewrite(folder / "config.json", architectures=names)

    given_name = names[0] if isinstance(names, list) and names else names
    words = says(*ARCHITECTURES, "is not supported", given_name if isinstance(given_name, str) else "architecture")
    with pytest.raises(CheckpointError, match=words):
        open_base(str(folder))


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": ...},
        {"model_type": "no-such-type"},
        {"model_type": "gpt2"},
        {"model_type": "mistral"},
        {"hidden_size": "wide"},
        {"num_attention_heads": 0},
        {"num_hidden_layers": -1},
        {"hidden_size": 31},
        {"hidden_act": "no-such-function"},
    ],
    ids=str,
)
def test_a_configuration_that_describes_no_such_model_is_refused(folder, changes):
    rewrite(folder / "config.json", **changes)

    with pytest.raises(CheckpointError):
        open_base(str(folder))


@pytest.mark.parametrize(
    "method", [{"quant_method": "gptq", "bits": 4, "group_size": 8}, {"quant_method": "aqlm"}, {"bits": 4}, "awq"]
)
def test_a_quantized_checkpoint_is_refused(folder, method):
    rewrite(folder / "config.json", quantization_config=method)

    with pytest.raises(CheckpointError, match=says("already quantized", "give the uncompressed one")):
        open_base(str(folder))


def test_a_quantization_that_is_null_is_none(folder):
    plain = logits(open_base(str(folder)).model)
    rewrite(folder / "config.json", quantization_config=None)

    assert torch.equal(plain, logits(open_base(str(folder)).model))


def test_a_tokenizer_that_is_damaged_is_refused_when_it_is_asked_for(folder):
    (folder / "tokenizer.json").write_text("{")
    (folder / "tokenizer_config.json").write_text("{}")
    base = open_base(str(folder))

    with pytest.raises(CheckpointError, match="the tokenizer cannot be read"):
        _ = base.tokenizer


def test_no_tokenizer_is_none(folder):
    assert open_base(str(folder)).tokenizer is None


# --- Names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("referense", ["unknown base 'referense'", "did you mean reference", "random:mistral-7b"]),
        ("no-such-folder", ["unknown base", "no such folder, and not of the form owner/name"]),
        ("random:mistral-7", ["unknown shape 'mistral-7'", "did you mean mistral-7b", *SHAPES]),
        ("random:", ["unknown shape ''", *SHAPES]),
        ("a/b/c", ["unknown base", *NAMED]),
        ("/no/such/folder", ["unknown base"]),
        ("./no/such", ["unknown base"]),
        ("~nobody-of-that-name/x", ["unknown base"]),
        ("x" * 5000, ["unknown base"]),
        ("a\0b", ["unknown base"]),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_base_that_is_called_nothing_known_is_refused_with_near_misses(text, words):
    with pytest.raises(CheckpointError, match=says(*words)):
        open_base(str(text))


def test_a_file_in_the_place_of_a_folder_is_refused(folder):
    with pytest.raises(CheckpointError, match=says("is a file; give the folder that holds config.json")):
        open_base(str(folder / "model.safetensors"))


@given(st.text(max_size=12))
def test_any_text_locates_a_base_or_is_a_checkpoint_error(text):
    with contextlib.suppress(CheckpointError):
        assert locate(text).kind in ("named", "random", "folder", "hub")


def test_a_hub_that_does_not_answer_is_a_checkpoint_error_with_the_way_out(monkeypatch):
    def no_network(*arguments, **options):
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", no_network)

    words = says("cannot be loaded from the hub: OSError: no route", "give a folder", "random:<shape>")
    with pytest.raises(CheckpointError, match=words):
        open_base("owner/name")


def test_a_hub_id_is_opened_from_what_was_downloaded(monkeypatch, saved):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *arguments, **options: str(saved))

    base = open_base("owner/name")

    assert ("owner/name", "hub") == (base.text, base.source.kind)


# --- random:<shape> ---------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_shape(monkeypatch):
    config = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True,
              "dtype": "bfloat16", **TINY, "vocab_size": 258}  # fmt: skip
    monkeypatch.setitem(SHAPES, "tiny", config)


def test_random_weights_follow_the_seed_and_nothing_else(tiny_shape):
    torch.manual_seed(1)
    first, other = (open_base("random:tiny", seed=seed).model.state_dict() for seed in (0, 1))
    torch.manual_seed(2)
    again = open_base("random:tiny").model.state_dict()

    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_random_weights_are_the_published_initialisation(tiny_shape):
    model = open_base("random:tiny").model

    for name, parameter in model.named_parameters():
        value = parameter.float()
        if name.endswith("bias"):
            assert (value == 0).all(), name
        elif parameter.ndim == 1:
            assert (value == 1).all(), name
        else:
            assert abs(float(value.std()) - 0.02) <= 0.02 * 4 / math.sqrt(2 * value.numel()) + 1e-4, name
    assert {torch.bfloat16} == {parameter.dtype for parameter in model.parameters()}
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_random_base_computes_and_is_saved_with_its_tokenizer(tiny_shape, tmp_path):
    result = compression.compress("random:tiny", "rtn(group_size=32)")
    text = "Grüße, 世界!"

    opened = compression.load(result.save(tmp_path / "out"))

    ids = opened.tokenizer(text, return_tensors="pt").input_ids
    assert torch.equal(result.model(ids).logits, opened.model(ids).logits)
    assert ("random:tiny", text) == (opened.base[0], opened.tokenizer.decode(ids[0]))


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        ("mistral-7b", 7_241_732_096),
        ("llama-2-7b", 6_738_415_616),
        ("tinyllama-1.1b", 1_100_048_384),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-3b", 3_085_938_688),
        ("qwen2.5-7b", 7_615_616_512),
    ],
)
def test_a_shape_has_the_published_number_of_parameters(shape, parameters):
    config = SHAPES[shape]
    model = build(config, getattr(torch, config["dtype"]), device="meta")
    if config["tie_word_embeddings"]:
        model.lm_head.weight = model.model.embed_tokens.weight

    assert parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@given(text=st.text().filter(lambda text: "<s>" not in text and "</s>" not in text))
@settings(max_examples=100)
def test_the_byte_tokenizer_gives_one_token_to_a_byte_and_any_text_back(tokenizer, text):
    ids = tokenizer(text).input_ids

    assert len(text.encode()) == len(ids)
    assert all(0 <= i < 256 for i in ids)
    assert text == tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"num_experts_per_tok": 5}, "num_experts_per_tok=5 is more than the 4 experts"),
     ({"n_group": 3}, "n_group=3 does not divide the 4 experts"),
     ({"topk_group": 3}, "topk_group=3 is more than n_group=2")],
)  # fmt: skip
def test_experts_that_a_token_cannot_have_are_refused(tmp_path, changes, words):
    transformers_model("DeepseekV3ForCausalLM").save_pretrained(tmp_path)
    rewrite(tmp_path / "config.json", **changes)

    with pytest.raises(CheckpointError, match=words):
        open_base(str(tmp_path))


def test_a_decoder_of_another_anatomy_is_refused_by_its_setting(tmp_path):
    transformers_model("OPTForCausalLM").save_pretrained(tmp_path)
    rewrite(tmp_path / "config.json", do_layer_norm_before=False)

    with pytest.raises(CheckpointError, match="do_layer_norm_before must be True, not False"):
        open_base(str(tmp_path))
