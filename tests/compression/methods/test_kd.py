"""Distillation as a step of recipes: what it learns from, what is kept for other recipes, and kills."""

import json
from itertools import permutations

import pytest
import torch
from checkpoints import says, transformers_model
from processes import killed_at

import compression
from compression import CheckpointError, Recipe, RecipeError
from compression.checkpoints import base as _checkpoint
from compression.engine import run as _compress
from compression.engine.kept_steps import StepCache
from compression.errors import TeacherError
from compression.files.atomic import cache_folder
from compression.recipes.registry import resolve

IDS = torch.randint(48, (8, 10), generator=torch.Generator().manual_seed(0))
P = "p(samples=8,sequence_length=10,round_to=32)"
KD = (
    "kd(alpha=0.9,samples=8,sequence_length=10,epochs=3,batch=2,accumulation=2,learning_rate=0.003,"
    "teacher_recipe=fp16,save_steps=1)"
)
Q = "nf4(group_size=32)"
ORDERS = ["-".join(order) for order in permutations((P, KD, Q))]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Texts of a student, and of a teacher that says something else."""
    found = []
    for name, sizes in (("student", {}), ("teacher", {"hidden_size": 48})):
        model = transformers_model("LlamaForCausalLM", **sizes)
        model.lm_head.weight.data *= 20 if sizes else 1
        folder = tmp_path_factory.mktemp("bases") / name
        model.save_pretrained(folder)
        _checkpoint.byte_tokenizer().save_pretrained(folder)
        found.append(str(folder))
    return found


@pytest.fixture
def run(bases, tmp_path):
    """`compress` of the student under its teacher."""
    base = compression.open_base(bases[0])

    def run(recipe, **options):
        given = {"calibration": IDS, "teacher": bases[1], "cache": tmp_path / "cache"} | options
        return compression.compress(base, recipe, **given)

    return run


def same(one, other):
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def taken(monkeypatch):
    """The steps on whole models as they are taken."""
    found = []
    for name in ("p", "kd"):
        cls = resolve(name)

        def apply(method, model, context, *, work=cls.apply):
            found.append(method.info.name)
            return work(method, model, context)

        monkeypatch.setattr(cls, "apply", apply)
    return found


def divergence(model, teacher):
    """Mean KL of what teacher and model say of the training text."""
    theirs, ours = (each(IDS, use_cache=False).logits.float().log_softmax(-1) for each in (teacher, model))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


def test_the_student_comes_nearer_to_its_teacher_than_labels_alone_bring_it(run, bases):
    teacher, student = (compression.open_base(text).model for text in reversed(bases))

    quickly = KD.replace("learning_rate=0.003", "learning_rate=0.02")

    taught, alone = run(quickly), run(quickly.replace("alpha=0.9", "alpha=0"))

    assert divergence(taught.model, teacher) < 0.9 * divergence(student, teacher)
    assert divergence(taught.model, teacher) < 0.9 * divergence(alone.model, teacher)
    assert (240, 6 * 40) == (taught.cost.trained_tokens, alone.cost.trained_tokens)
    assert taught.parameters == taught.cost.trained_parameters
    assert "by labels and teacher after fp16" in taught.report[0].detail
    assert "by labels alone" in alone.report[0].detail


def test_what_pruning_set_to_zero_stays_zero(run):
    pruned, taught = run("magnitude"), run(f"magnitude-{KD}")

    zeros = {name: weight == 0 for name, weight in pruned.model.state_dict().items() if "_proj" in name}
    assert zeros
    for name, weight in taught.model.state_dict().items():
        if name in zeros:
            assert torch.equal(zeros[name], weight == 0), name
            assert not torch.equal(weight, pruned.model.state_dict()[name]), name


def test_zeros_that_are_a_level_of_a_grid_are_trained(run):
    packed, taught = run(f"{Q}"), run(f"{Q}-{KD.replace('learning_rate=0.003', 'learning_rate=0.02')}")

    name = "model.layers.0.mlp.up_proj"
    before, after = (result.model.get_submodule(name).dequantize() for result in (packed, taught))
    zeros = before == 0
    assert 0.02 < zeros.float().mean() < 0.5
    assert (after[zeros] != 0).float().mean() > 0.2


def test_every_order_runs_with_what_had_to_be_inserted_and_all_store_the_same_bytes(run, tmp_path):
    p, kd, q = Recipe.parse(ORDERS[0]).text.split("-")
    results = {order: run(order, cache=StepCache(tmp_path / "cache", keep=lambda steps: True)) for order in ORDERS}

    executed = [result.executed for result in results.values()]
    assert [
        (p, kd, q), (p, q, "dequantize", kd, q), (kd, p, q), (kd, q, p), (q, p, "dequantize", kd, q),
        (q, "dequantize", kd, p, q),
    ] == executed  # fmt: skip
    assert 1 == len({result.stored_bytes for result in results.values()})
    for result in results.values():
        assert len(result.executed) == len(result.seconds)
        assert min(result.seconds) > 0
        assert sum(result.seconds) == pytest.approx(result.cost.seconds)


def test_pruning_packed_or_dense_weights_stores_the_same_bytes(tmp_path):
    """A row has 2 scales and 256 are stored together, so neurons that stay come out of several such blocks."""
    model = transformers_model("LlamaForCausalLM", hidden_size=64, intermediate_size=512)
    model.save_pretrained(tmp_path / "base")
    p = "p(samples=8,sequence_length=10)"

    before, after = (
        compression.compress(str(tmp_path / "base"), recipe, calibration=IDS) for recipe in (f"{p}-{Q}", f"{Q}-{p}")
    )

    name = "model.layers.0.mlp.up_proj"
    told = [entry.detail for entry in after.report if entry.name == name][-1]
    assert before.stored_bytes == after.stored_bytes
    assert after.model.get_submodule(name).weight_part.grid.double_quant
    moved = float(told.partition("moved its weights by ")[2].partition(" ")[0])
    assert 0 < moved < 0.02


def test_steps_that_recipes_share_are_taken_once_and_change_no_bit(run, taken, tmp_path):
    alone = {order: run(order, cache=tmp_path / f"alone {n}") for n, order in enumerate(ORDERS) if n in (1, 5)}
    assert ["p", "kd", "kd", "p"] == taken
    taken.clear()

    store = StepCache(tmp_path / "shared", keep=lambda steps: True)
    shared = {order: run(order, cache=store) for order in ORDERS}

    # p, p-kd, p-q-kd; kd, kd-p, kd-q-p; q-p, q-p-kd; q-kd, q-kd-p
    assert ["p", "kd", "kd", "kd", "p", "p", "p", "kd", "kd", "p"] == taken
    for order in alone:
        assert same(alone[order], shared[order]), order
        assert alone[order].report == shared[order].report, order
        assert alone[order].executed == shared[order].executed
        assert alone[order].cost.trained_tokens == shared[order].cost.trained_tokens


def test_a_result_that_is_kept_costs_what_it_cost_and_leaves_no_training_behind(run, taken, tmp_path):
    first = run(f"{KD}-{Q}")
    again = run(f"{KD}-{Q}")

    assert ["kd"] == taken
    assert same(first, again)
    assert (first.seconds, first.cost.seconds) == (again.seconds, again.cost.seconds)
    assert first.cost.trained_parameters == again.cost.trained_parameters
    assert [] == list((tmp_path / "cache/training").iterdir())


def test_recipes_that_do_not_train_keep_nothing(run, tmp_path):
    run(f"{P}-{Q}")

    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "options",
    [{"seed": 1}, {"teacher": "self"}, {"calibration": IDS.flip(0)}, {"recipe": KD.replace("alpha=0.9", "alpha=0.8")}],
    ids=lambda options: next(iter(options)),
)
def test_results_of_other_seeds_teachers_texts_and_settings_are_not_used(run, taken, options):
    run(KD)
    run(**{"recipe": KD} | options)

    assert ["kd", "kd"] == taken


def test_results_of_other_code_are_not_used(run, taken, monkeypatch):
    run(KD)
    monkeypatch.setattr(_compress, "code_digest", lambda: "changed")
    run(KD)

    assert ["kd", "kd"] == taken


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda kept: flip(kept / "model.safetensors"), "model.safetensors is corrupt: its SHA-256 does not match"),
        (lambda kept: (kept / "config.json").unlink(), "config.json is missing"),
        (lambda kept: (kept / "state.json").write_text("{"), "state.json is damaged"),
        (lambda kept: (kept / "state.json").write_text('{"identity": {}, "files": {}}'), "state.json is damaged"),
    ],
)
def test_a_result_that_was_changed_is_refused(run, tmp_path, damage, words):
    run(KD)
    (kept,) = (tmp_path / "cache/steps").iterdir()
    damage(kept)

    with pytest.raises(CheckpointError, match=says(words, f"delete {kept}")):
        run(KD)


def test_a_cache_that_cannot_be_written_is_said(run, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/steps").write_text("a file where a folder should be")

    with pytest.raises(CheckpointError, match=says("cannot be written", "give another cache")):
        run(KD)


CHILD = f"""
import sys
import torch
import compression
IDS = torch.tensor({IDS.tolist()})
def progress(done, total, what):
    if what.startswith("loss"):
        print(done, flush=True)
        if done == 4:
            sys.stdin.read()  # until killed: step 3 is done and step 4 not saved yet
_, recipe, student, teacher, cache = sys.argv
compression.compress(student, recipe, calibration=IDS, teacher=teacher, cache=cache, progress=progress)
"""


@pytest.mark.process
def test_a_killed_order_goes_on_and_ends_as_if_nothing_had_been(run, bases, tmp_path):
    recipe = f"{Q}-{KD}-{P}"
    killed_at(4, CHILD, recipe, *bases, tmp_path / "cache")
    steps = []

    resumed = run(recipe, progress=lambda done, total, what: what.startswith("loss") and steps.append(done))
    undisturbed = run(recipe, cache=tmp_path / "other")

    assert [4, 5, 6] == steps
    assert same(undisturbed, resumed)


# --- What is refused before anything is read --------------------------------------------------------------------------


def test_a_base_that_brings_no_teacher_asks_for_one(bases):
    with pytest.raises(TeacherError, match=says("kd needs a teacher", "'student' brings none", "--teacher", "self")):
        compression.plan(bases[0], "kd", calibration=IDS)


def test_the_reference_brings_its_own_teacher_and_labels_alone_need_none(bases):
    student = compression.locate(bases[0])

    assert "reference-teacher" == compression.plan("reference", "kd").teacher.text
    assert None is compression.plan(student, f"kd(alpha=0)-{Q}", calibration=IDS).teacher
    assert student is compression.plan(student, "kd", calibration=IDS, teacher="self").teacher


def test_a_teacher_of_another_tokenizer_is_refused_unless_that_is_allowed(bases):
    given = {"calibration": IDS, "teacher": "reference"}

    with pytest.raises(TeacherError, match=says("different tokenizers", "id 0 is", "allow_vocab_mismatch=true")):
        compression.plan(bases[0], "kd", **given)
    assert "reference" == compression.plan(bases[0], "kd(allow_vocab_mismatch=true)", **given).teacher.text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kd(samples=7)", ["samples=7", "2 x 4 = 8 texts", "give more samples"]),
        ("kd(top_k=0)", ["top_k=0", "allowed are 1 or more"]),
        ("kd(alpha=1.5)", ["alpha=1.5"]),
        ("kd(temperature=0)", ["temperature=0"]),
        ("kd(learning_rate=0.0)", ["learning_rate=0.0"]),
        ("kd(divergence=total)", ["divergence", "forward_kl"]),
        ("kd(teacher_recipe=gptq)", ["teacher_recipe=gptq", "without data"]),
        ("kd(teacher_recipe=nothing)", ["unknown method 'nothing'"]),
    ],
)
def test_settings_that_cannot_be_are_refused_with_the_recipe(text, words):
    with pytest.raises(RecipeError, match=says(*words)):
        Recipe.parse(text)


def test_the_folder_of_the_cache_is_the_users_unless_one_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("COMPRESSION_CACHE", str(tmp_path / "named"))
    assert tmp_path / "named" == cache_folder()
    monkeypatch.delenv("COMPRESSION_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tmp_path / "compression-bench" == cache_folder()


def test_the_manifest_tells_what_each_step_took(run, tmp_path):
    result = run(f"{KD}-{Q}")
    result.save(tmp_path / "saved")

    manifest = json.loads((tmp_path / "saved/compression.json").read_text())
    assert Recipe.parse(f"{KD}-{Q}").text == "-".join(manifest["executed"])
    assert list(result.seconds) == manifest["seconds"]
    assert result.seconds == compression.load(tmp_path / "saved").seconds


# --- Adapters ---------------------------------------------------------------------------------------------------------

DISTILLED = (
    "distilled(samples=8,sequence_length=10,epochs=2,batch=2,accumulation=2,warmup=0,learning_rate=0.01,rank=4,"
    "teacher_recipe=fp16)"
)


def test_distilled_changes_queries_and_values_alone_and_leaves_a_dense_model(run, bases):
    before, result = compression.open_base(bases[0]).model.state_dict(), run(DISTILLED)

    after = result.model.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in before if "q_proj" in name or "v_proj" in name} == changed
    assert {"q_proj", "v_proj"} == {e.name.rsplit(".", 1)[-1] for e in result.report if e.outcome == "replaced"}
    assert 2 * 4 * (32 + 32 + 32 + 16) == result.cost.trained_parameters


def test_distilled_on_packed_weights_keeps_every_code_and_stands_beside_them(run, tmp_path):
    packed, result = run(Q).model.state_dict(), run(f"{Q}-{DISTILLED}")

    after = result.model.state_dict()
    codes = [name for name in packed if name.endswith(".codes")]
    assert 14 == len(codes)
    for name in codes:
        adapted = "q_proj" in name or "v_proj" in name
        assert torch.equal(
            packed[name], after[name.replace(".weight_part.", ".weight_part.0.") if adapted else name]
        ), name
    assert 8 == len([name for name in after if ".weight_part.1." in name])
    result.save(tmp_path / "saved")
    opened = compression.load(tmp_path / "saved")
    assert torch.equal(result.model(IDS).logits, opened.model(IDS).logits)
    assert result.stored_bytes == opened.stored_bytes > run(Q).stored_bytes
