"""Recovery: adapters on compressed models, what is read of a task, what is stored, and what is refused."""

import json

import pytest
import torch
from checkpoints import says, transformers_model
from processes import killed_at
from safetensors.torch import load_file

import compression
from compression import LayerError, Recipe, RecipeError
from compression.architectures import decoder
from compression.checkpoints import base as _checkpoint
from compression.checkpoints.size import stored_bytes
from compression.engine.shapes import outcome
from compression.errors import TrainingError
from compression.training import adapters as _lora
from compression.training.downstream import Downstream, open_downstream

PAIRS = [(f"{a} + {b} =", f" {a + b}\n") for a in range(6) for b in range(6)]
TOKENIZER = _checkpoint.byte_tokenizer()
SMALL = "recover(rank=4,sequence_length=64,epochs=2,batch=4,warmup=0)"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint of bf16 weights with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    model = transformers_model("LlamaForCausalLM", dtype=torch.bfloat16, vocab_size=258, hidden_size=64)
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return compression.open_base(str(folder))


def recovered(base, recipe, tmp_path, **options):
    return compression.compress(base, recipe, downstream=PAIRS, cache=tmp_path / "cache", **options)


def logits(model):
    return model(torch.arange(40).view(2, 20), use_cache=False).logits


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# --- What is read -----------------------------------------------------------------------------------------------------


def test_examples_stand_one_behind_the_other_and_answers_alone_are_learnt():
    texts = Downstream("sums", lambda: PAIRS).texts(TOKENIZER, samples=None, length=32, seed=0)

    read = [TOKENIZER.decode(row[mask]) for row, mask in zip(texts.ids, texts.mask, strict=True)]
    assert len(PAIRS) == texts.examples
    assert sorted("".join(read).splitlines()) == sorted(f"{prompt}{answer}".strip() for prompt, answer in PAIRS)
    assert not (texts.learn & ~texts.mask).any()
    for row, learn, text in zip(texts.ids, texts.learn, read, strict=True):
        learnt = "".join(TOKENIZER.decode([t]) if wanted else "|" for t, wanted in zip(row, learn, strict=True))
        assert learnt[: len(text)] == "".join(
            "|" * (line.index("=") + 1) + line[line.index("=") + 1 :] for line in text.splitlines(keepends=True)
        )


def test_the_order_is_that_of_the_seed_and_samples_are_the_first_of_it():
    task = Downstream("sums", lambda: PAIRS)
    whole, again, other = (task.texts(TOKENIZER, samples=None, length=512, seed=seed).ids for seed in (0, 0, 1))
    few, all_of_them = (task.texts(TOKENIZER, samples=samples, length=512, seed=0) for samples in (3, 37))

    assert torch.equal(whole, again) and not torch.equal(whole, other)
    assert torch.equal(whole[0, : int(few.mask.sum())], few.ids[few.mask])
    assert (3, 36) == (few.examples, all_of_them.examples)


def test_an_answer_without_an_end_gets_a_blank_line_which_is_learnt():
    texts = Downstream("one", lambda: [("a", "b")]).texts(TOKENIZER, samples=None, length=8, seed=0)

    assert ["ab\n\n", 3] == [TOKENIZER.decode(texts.ids[texts.mask]), int(texts.learn.sum())]


def test_a_folder_is_read_without_its_held_out_files(tmp_path):
    for name, rows in (("train", PAIRS[:3]), ("test", PAIRS[3:5]), ("more", PAIRS[5:6])):
        lines = [json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")

    found = open_downstream(str(tmp_path), _checkpoint.locate("random:tinyllama-1.1b"))

    assert sorted([*PAIRS[:3], *PAIRS[5:6]]) == sorted(found.examples())
    assert found.digest != Downstream("other", lambda: PAIRS).digest


def test_the_arithmetic_of_the_reference_is_trained_in_all_lengths_that_are_asked_and_no_item_is_told():
    from bench.reference import tasks

    examples = tasks.examples("arithmetic")
    steps = {answer.count("=") for _, answer in examples}
    asked = {item["question"] for item in tasks.items("arithmetic", "test")}

    assert {2, 3, 4, 5} == steps == {item["answer"].count("=") for item in tasks.items("arithmetic", "test")}
    assert 2000 == len(examples) and not asked & {prompt for prompt, _ in examples}


@pytest.mark.parametrize("task", ["facts_hard", "categories", "code", "rag", "no_rag", "instructions"])
def test_examples_of_the_reference_end_where_answers_are_cut(task):
    from bench.reference import tasks

    for prompt, answer in tasks.examples(task)[:20]:
        assert not prompt[-1:].isspace() or task == "code", prompt
        assert answer.endswith("\n\n" if task == "code" else "\n")
        assert answer[:1].isspace()


# --- What is left -----------------------------------------------------------------------------------------------------


def test_fp16_recover_is_the_row_recover():
    assert "recover" == Recipe.parse("fp16-recover").text == Recipe.parse("recover").text
    assert "nf4-recover(rank=4)" == Recipe.parse("q-recover:rank=4").text


@pytest.mark.parametrize("steps", ["nf4", "rtn(group_size=32)", "llm_int8", "magnitude-rtn(group_size=32)"])
def test_packed_codes_keep_every_bit_and_adapters_lie_beside_them(base, steps, tmp_path):
    before = compression.compress(base, steps)
    result = recovered(base, f"{steps}-{SMALL}", tmp_path)
    adapters = {name: _lora.adapter_of(m) for name, m in _lora.adapted_layers(result.model).items()}
    tensors = bits(result.model)

    assert len(decoder.stored_layers(before.model)) == len(adapters) == 14
    for name, tensor in bits(before.model).items():
        found = tensors[name] if name in tensors else tensors[name.replace(".weight_part.", ".weight_part.0.")]
        assert torch.equal(tensor, found) and tensor.dtype == found.dtype, name
    extra = sum(t.nbytes for name, t in tensors.items() if ".weight_part.1." in name)
    assert before.stored_bytes + extra == result.stored_bytes
    assert {torch.bfloat16} == {m.a.dtype for m in adapters.values()}
    assert result.parameters == before.parameters + extra // 2
    assert not torch.equal(logits(before.model), logits(result.model))
    detail = {e.name: e.detail for e in result.report}["model.layers.0.self_attn.q_proj"]
    assert "36 examples of the task given" in detail and "beside the weights" in detail


@pytest.mark.parametrize("steps", ["fp16", "magnitude", "magnitude(store=bitmask)", "magnitude(pattern=2:4,store=nm)"])
def test_floats_take_the_adapters_in_and_zeros_and_sizes_stay(base, steps, tmp_path):
    before = compression.compress(base, steps)
    result = recovered(base, f"{steps}-{SMALL}", tmp_path)
    old = {name: layer for block in decoder.decoder_blocks(before.model) for name, layer in block.linears()}
    new = {name: layer for block in decoder.decoder_blocks(result.model) for name, layer in block.linears()}

    assert {name: type(layer) for name, layer in old.items()} == {name: type(layer) for name, layer in new.items()}
    for name, layer in new.items():
        zeros = old[name].weight == 0
        assert (layer.weight[zeros] == 0).all() and not torch.equal(layer.weight, old[name].weight), name
    if "bitmask" not in steps:  # of which a sum that rounds to zero needs no place
        assert before.stored_bytes == result.stored_bytes
    assert result.stored_bytes <= before.stored_bytes


def test_the_base_keeps_every_bit_and_its_dtype(base, tmp_path):
    before = bits(base.model)
    recovered(base, SMALL, tmp_path)

    after = bits(base.model)
    assert [] == [name for name in before if not torch.equal(before[name], after[name])]
    assert before["lm_head.weight"].dtype == after["lm_head.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("steps", [f"nf4-{SMALL}", f"magnitude(store=bitmask)-{SMALL}", SMALL])
def test_what_is_saved_and_opened_again_computes_the_same_bits(base, steps, tmp_path):
    result = recovered(base, steps, tmp_path)
    result.save(tmp_path / "saved")
    opened = compression.load(tmp_path / "saved")

    assert torch.equal(logits(result.model), logits(opened.model))
    sizes = [
        tensor.nbytes for path in (tmp_path / "saved").glob("*.safetensors") for tensor in load_file(path).values()
    ]
    assert sum(sizes) == opened.stored_bytes == result.stored_bytes
    for attribute in ("recipe", "report", "executed", "cost", "portable", "parameters"):
        assert getattr(result, attribute) == getattr(opened, attribute), attribute
    assert opened.model.config.use_cache


def test_merging_into_packed_layers_is_said_with_its_loss(base, tmp_path):
    result = recovered(base, f"rtn(bits=8,group_size=32)-{SMALL[:-1]},merge=all)", tmp_path)
    details = [entry.detail for entry in result.report if "merged" in entry.detail]

    assert 14 == len(details)
    assert {"codes"} == {layer.weight_part.kind for layer in decoder.stored_layers(result.model).values()}
    assert all(0 < float(detail.split("rounding moved that by ")[1].split()[0]) < 2 for detail in details)
    assert compression.compress(base, "rtn(bits=8,group_size=32)").stored_bytes == result.stored_bytes


def test_a_step_behind_it_sees_the_adapted_weights(base, tmp_path):
    result = recovered(base, f"nf4-{SMALL}", tmp_path)
    dense = [(name, layer.to_linear().weight) for name, layer in decoder.stored_layers(result.model).items()]
    again = recovered(base, f"nf4-{SMALL}-rtn(bits=8,group_size=32)", tmp_path)
    cut = recovered(base, f"nf4-{SMALL}-structured(keep_layers=none,keep_kv_heads=1)", tmp_path)

    assert ("nf4", Recipe.parse(SMALL).text, "dequantize", "rtn(bits=8,group_size=32)") == again.executed
    for name, weight in dense:
        found = again.model.get_submodule(name).dequantize()
        torch.testing.assert_close(weight, found, rtol=0, atol=float(weight.abs().max()) / 127)
        if name.endswith("v_proj"):
            assert torch.equal(weight[: len(weight) // 2], cut.model.get_submodule(name).to_linear().weight)


def test_it_learns_the_task(base, tmp_path):
    result = recovered(base, f"nf4-{SMALL[:-1].replace('epochs=2', 'epochs=12')},learning_rate=0.01)", tmp_path)
    texts = Downstream("sums", lambda: PAIRS).texts(TOKENIZER, samples=None, length=64, seed=0)

    def loss(model):
        told = torch.nn.functional.cross_entropy(
            model(texts.ids).logits[:, :-1].float().transpose(1, 2), texts.ids[:, 1:], reduction="none"
        )
        return float(told[texts.learn[:, 1:]].mean())

    assert loss(result.model) < loss(compression.compress(base, "nf4").model) - 0.5


CHILD = f"""
import sys
import compression
PAIRS, SMALL = {PAIRS!r}, {SMALL!r}
def progress(done, total, what):
    if "loss" in what:
        print(done, flush=True)
        if done == 3:
            sys.stdin.read()  # until killed
compression.compress(sys.argv[1], "nf4-" + SMALL[:-1] + ",save_steps=1)", downstream=PAIRS, cache=sys.argv[2],
                     progress=progress)
"""


@pytest.mark.process
def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_been(base, tmp_path):
    recipe = f"nf4-{SMALL[:-1]},save_steps=1)"
    killed_at(3, CHILD, base.source.folder, tmp_path / "cache")
    steps = []

    resumed = recovered(base, recipe, tmp_path, progress=lambda done, total, what: steps.append((done, what)))
    whole = compression.compress(base, recipe, downstream=PAIRS, cache=tmp_path / "other")

    assert 3 == min(done for done, what in steps if "loss" in what)
    torch.testing.assert_close(bits(whole.model), bits(resumed.model), rtol=0, atol=0)


@pytest.mark.parametrize("steps", [f"nf4-{SMALL}", f"rtn(group_size=32)-{SMALL[:-1]},targets=qv)", SMALL])
def test_what_is_stored_is_known_before_any_work(base, steps, tmp_path):
    assert recovered(base, steps, tmp_path).stored_bytes == stored_bytes(outcome(Recipe.parse(steps), base.model))


# --- What is refused --------------------------------------------------------------------------------------------------


def test_a_base_without_a_task_is_refused_before_any_work(base, tmp_path):
    with pytest.raises(TrainingError, match=says("nf4-recover trains on a downstream task", "brings none", "prompt")):
        compression.compress(base, "nf4-recover", cache=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("arithmetics", "neither a folder nor one of the embedded reference, which are continuation, "),
        ([("a", 1)], r"must be \(prompt, answer\) pairs"),
        ([], r"must be \(prompt, answer\) pairs"),
        (7, "pairs, not int"),
    ],
)
def test_a_task_that_cannot_be_is_refused(base, task, words, tmp_path):
    with pytest.raises(TrainingError, match=words):
        compression.compress(base, "recover", downstream=task, cache=tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("test.jsonl", "{}", "has no training examples"),
        ("train.jsonl", "{}", r"train\.jsonl:1: prompt is None"),
        ("train.jsonl", '{"prompt":"a","answer":" "}', r"train\.jsonl:1: the answer is blank"),
        ("train.jsonl", "7", r"train\.jsonl:1: prompt is None"),
        ("train.jsonl", "{", r"train\.jsonl:1: not JSON: Expecting"),
    ],
)
def test_a_folder_that_cannot_be_read_is_refused(base, name, text, words, tmp_path):
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / name).write_text(text)
    with pytest.raises(TrainingError, match=words):
        compression.compress(base, "recover", downstream=tmp_path / "task", cache=tmp_path / "cache")


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ("recover(samples=2)", "one step takes 2 x 1 = 2 texts, and there are 1"),
        ("recover(sequence_length=8)", r"has \d+ tokens, and a text 8; give sequence_length="),
        ("recover(batch=64)", "one step takes 64 x 1 = 64 texts, and there are 1"),
        ("recover(learning_rate=1e36,sequence_length=64,clip=1e30)", "has no parameter"),
        ("recover(learning_rate=1e36,sequence_length=64,warmup=0)", r"of step \d+ is (nan|inf); the last checkpoint"),
    ],
)
def test_training_that_cannot_be_is_refused(base, steps, words, tmp_path):
    with pytest.raises((TrainingError, RecipeError), match=words):
        recovered(base, steps, tmp_path)
    assert {torch.bfloat16} == {p.dtype for p in base.model.parameters()}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("recover(rank=0)", "rank=0: must be at least 1"),
        ("recover(alpha=0)", r"alpha=0\.0: must be above 0"),
        ("recover(dropout=1)", r"dropout=1\.0: allowed are 0 to below 1"),
        ("recover(samples=0)", r"recover\(samples=0\)"),
        ("recover(sequence_length=1)", r"recover\(sequence_length=1\)"),
        ("recover(epochs=0)", "epochs=0: must be at least 1"),
        ("recover(merge=none)", "allowed are exact, all"),
        ('recover(layers={"*":null})', "works on the whole model"),
    ],
)
def test_parameters_that_cannot_be_are_refused(text, words):
    with pytest.raises(RecipeError, match=words):
        Recipe.parse(text)


def test_a_second_adapter_on_packed_codes_is_refused_before_any_work(base, tmp_path):
    with pytest.raises(LayerError, match=r"model\.layers\.0\.self_attn\.q_proj: this layer already has an adapter"):
        recovered(base, f"nf4-{SMALL}-{SMALL}", tmp_path)
    assert not (tmp_path / "cache").exists()


def test_a_published_format_has_no_place_for_adapters(base, tmp_path):
    result = recovered(base, f"rtn(group_size=32)-{SMALL}", tmp_path)

    assert () == result.published_formats
    with pytest.raises(LayerError, match="it has an adapter beside its codes; recover with merge=all"):
        result.save(tmp_path / "saved", "gptq")


def test_token_ids_beyond_the_vocabulary_are_refused(tmp_path):
    folder = tmp_path / "small"
    transformers_model("LlamaForCausalLM").save_pretrained(folder)  # of 48 tokens
    TOKENIZER.save_pretrained(folder)
    with pytest.raises(TrainingError, match=r"task given holds token id \d+; the base has a vocabulary of 48"):
        compression.compress(str(folder), SMALL, downstream=PAIRS, cache=tmp_path / "cache")


def test_sparse_layers_are_stored_as_before(base, tmp_path):
    result = recovered(base, f"magnitude(pattern=2:4,store=nm)-{SMALL}", tmp_path)

    parts = [layer.weight_part for layer in decoder.stored_layers(result.model).values()]
    assert {("sparse", (2, 4))} == {(x.kind, x.pattern) for x in parts}
