"""The teacher's outputs on disk: what they are, that they are paid for once, and what is never used."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import change_tensors, rewrite, transformers_model
from processes import completed, environment, killed_at
from teachers import teacher_outputs
from tokenizers import Tokenizer, models, pre_tokenizers

import compression
from compression.checkpoints import base as _checkpoint
from compression.errors import RecipeError, TeacherError
from compression.files.atomic import locked
from compression.numeric.losses_in_chunks import TopK
from compression.training.teacher import DESCRIPTION
from compression.training.vocabulary import shared_vocabulary, tokenizer_digest

IDS = torch.arange(60).view(6, 10) * 7 % 48


@pytest.fixture
def teacher(folder):
    _checkpoint.byte_tokenizer().save_pretrained(folder)
    return str(folder)


def direct(teacher, ids=IDS, **inputs):
    """Logits by transformers' own forward pass."""
    with torch.inference_mode():
        return compression.open_base(teacher).model(ids, use_cache=False, **inputs).logits


def only(cache):
    """The folder of the one cache there is."""
    (found,) = Path(cache).iterdir()
    return found


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def unopened(monkeypatch):
    """From now on no teacher can be opened."""

    def refuse(*_, **__):
        raise AssertionError("the teacher was opened again")

    monkeypatch.setattr(_checkpoint, "open_base", refuse)


# --- What is kept ---------------------------------------------------------------------------------------------------


def test_all_logits_are_those_of_the_teacher(teacher, tmp_path):
    outputs = teacher_outputs(tmp_path / "cache", teacher, IDS, batch=2)

    assert 6 == len(outputs)
    torch.testing.assert_close(direct(teacher), outputs.batch(range(6)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(direct(teacher)[[4, 0]], outputs.batch([4, 0]), rtol=1e-6, atol=1e-6)


def test_the_top_k_are_those_of_the_teacher(teacher, tmp_path):
    found = teacher_outputs(tmp_path / "cache", teacher, IDS, k=5).batch(torch.tensor([3, 1]))
    want = TopK.of(direct(teacher)[[3, 1]], 5)

    assert torch.equal(want.ids, found.ids.long())
    torch.testing.assert_close(want.log_probs, found.log_probs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(want.log_tail, found.log_tail, rtol=1e-5, atol=1e-5)
    assert 48 == found.vocabulary


def test_a_shared_vocabulary_cuts_before_anything_is_normalised(teacher, tmp_path):
    logits = teacher_outputs(tmp_path / "cache", teacher, IDS, vocabulary=40).batch([2])
    top = teacher_outputs(tmp_path / "cache", teacher, IDS, vocabulary=40, k=3).batch([2])

    torch.testing.assert_close(direct(teacher)[[2], :, :40], logits, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(TopK.of(logits, 3).log_tail, top.log_tail, rtol=1e-5, atol=1e-5)


def test_k_of_the_whole_vocabulary_is_all(teacher, tmp_path):
    teacher_outputs(tmp_path / "cache", teacher, IDS)
    teacher_outputs(tmp_path / "cache", teacher, IDS, k=48)

    assert only(tmp_path / "cache")


def test_padding_is_not_read(teacher, tmp_path):
    mask = torch.ones_like(IDS)
    mask[:, :3] = 0  # on the left, where it would be seen
    found = teacher_outputs(tmp_path / "cache", teacher, IDS, mask=mask).batch(range(6))

    torch.testing.assert_close(direct(teacher, attention_mask=mask)[:, 3:], found[:, 3:], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(direct(teacher)[:, 3:], found[:, 3:])


@pytest.mark.parametrize(
    ("settings", "stored"),
    [
        ({}, torch.bfloat16),
        ({"arithmetic": "float32"}, torch.float32),
        ({"arithmetic": "float32", "dtype": "float16"}, torch.float16),
    ],
    ids=str,
)
def test_the_dtypes_of_arithmetic_and_disk_are_those_asked_for(tmp_path, settings, stored):
    folder = tmp_path / "teacher"
    transformers_model("MistralForCausalLM", dtype=torch.bfloat16).save_pretrained(folder)
    _checkpoint.byte_tokenizer().save_pretrained(folder)
    found = teacher_outputs(tmp_path / "cache", str(folder), IDS, **settings).batch(range(6))
    model = compression.open_base(str(folder)).model
    with torch.inference_mode():
        exact = model.float()(IDS).logits

    assert stored == found.dtype
    error = float((exact - found.float()).norm() / exact.norm())
    assert error <= {torch.bfloat16: 0.02, torch.float16: 5e-4, torch.float32: 1e-6}[stored]


def test_a_compressed_teacher_answers_as_it_does(teacher, tmp_path):
    with torch.inference_mode():
        want = compression.compress(teacher, "rtn(bits=2,group_size=32)").model(IDS).logits
    found = teacher_outputs(tmp_path / "cache", teacher, IDS, recipe="rtn(bits=2,group_size=32)").batch(range(6))

    torch.testing.assert_close(want, found, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(direct(teacher), found)


# --- Paid for once --------------------------------------------------------------------------------------------------


def test_a_finished_cache_opens_no_teacher(teacher, tmp_path, monkeypatch):
    first = teacher_outputs(tmp_path / "cache", teacher, IDS, k=4).batch(range(6))
    unopened(monkeypatch)
    again = teacher_outputs(tmp_path / "cache", teacher, IDS, k=4).batch(range(6))

    assert torch.equal(first.log_probs, again.log_probs)
    with pytest.raises(AssertionError, match="opened again"):
        teacher_outputs(tmp_path / "cache", teacher, IDS, k=3)


def other_weights(folder):
    change_tensors(folder, lambda tensors: tensors["lm_head.weight"].mul_(1.01))


def other_tokenizer(folder):
    state = json.loads((folder / "tokenizer.json").read_text())
    state["model"]["vocab"]["new"] = len(state["model"]["vocab"]) + 10
    (folder / "tokenizer.json").write_text(json.dumps(state))


@pytest.mark.parametrize("change", [other_weights, other_tokenizer], ids=lambda each: each.__name__)
def test_another_teacher_is_another_cache(teacher, tmp_path, change):
    teacher_outputs(tmp_path / "cache", teacher, IDS)
    change(Path(teacher))
    teacher_outputs(tmp_path / "cache", teacher, IDS)

    assert 2 == len(list((tmp_path / "cache").iterdir()))


@pytest.mark.parametrize(
    "settings",
    [
        {"ids": (IDS + 1) % 48},
        {"ids": IDS.view(10, 6)},
        {"mask": torch.ones_like(IDS)},
        {"k": 3},
        {"vocabulary": 47},
        {"recipe": "rtn(bits=2,group_size=32)"},
        {"arithmetic": "float32"},
        {"dtype": "bfloat16"},
        {"batch": 3},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_every_setting_that_the_numbers_depend_on_makes_another_cache(teacher, tmp_path, settings):
    teacher_outputs(tmp_path / "cache", teacher, IDS)
    teacher_outputs(tmp_path / "cache", teacher, **{"ids": IDS} | settings)

    assert 2 == len(list((tmp_path / "cache").iterdir()))


CHILD = """
import sys, torch
from teachers import teacher_outputs
cache, teacher = sys.argv[1:]
ids = torch.arange(400).view(40, 10) * 7 % 48
def progress(done, total, what):
    print(done, flush=True)
    if done >= 6:
        sys.stdin.read()  # until killed
teacher_outputs(cache, teacher, ids, k=4, batch=2, shard_bytes=1, progress=progress)
"""


@pytest.mark.process
def test_a_killed_run_goes_on_behind_the_last_finished_shard_and_ends_the_same(teacher, tmp_path):
    ids = torch.arange(400).view(40, 10) * 7 % 48
    killed_at(6, CHILD, tmp_path / "killed", teacher)
    half = only(tmp_path / "killed")
    (half / ".outputs-00003.safetensors.part").write_bytes(b"torn")  # what a kill while writing leaves
    (half / "outputs-00003.safetensors").write_bytes(b"not named yet")
    steps = []

    settings = {"k": 4, "batch": 2, "shard_bytes": 1}
    teacher_outputs(tmp_path / "killed", teacher, ids, progress=lambda *step: steps.append(step[0]), **settings)
    teacher_outputs(tmp_path / "whole", teacher, ids, **settings)

    assert list(range(6, 41, 2)) == steps
    assert contents(only(tmp_path / "whole")) == contents(half)


def test_the_size_of_a_shard_changes_no_output(teacher, tmp_path):
    small = teacher_outputs(tmp_path / "small", teacher, IDS, batch=2, shard_bytes=1)
    large = teacher_outputs(tmp_path / "large", teacher, IDS, batch=2)

    assert (3, 1) == tuple(len(list(each.folder.glob("*.safetensors"))) for each in (small, large))
    assert torch.equal(small.batch(range(6)), large.batch(range(6)))
    assert small.stored_bytes >= 6 * 10 * 48 * 4


READER = """
import sys, torch
from compression.cost import anonymous_bytes, give_back
from teachers import teacher_outputs
ids = torch.zeros(32, 64, dtype=torch.int64)
teacher_outputs(*sys.argv[1:], ids).batch([0])
give_back()
before = anonymous_bytes()
outputs = teacher_outputs(*sys.argv[1:], ids)
sums = [float(outputs.batch([number]).sum()) for number in range(0, 32, 4)]  # nothing that pins the heap is kept
print(anonymous_bytes() - before)
everything = outputs.batch(range(32))
print(anonymous_bytes() - before)
"""


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is told by Linux alone")
def test_a_batch_is_read_without_the_rest(tmp_path):
    folder = tmp_path / "teacher"
    transformers_model("LlamaForCausalLM", vocab_size=4096).save_pretrained(folder)
    _checkpoint.byte_tokenizer().save_pretrained(folder)
    ids = torch.zeros(32, 64, dtype=torch.int64)
    written = teacher_outputs(tmp_path / "cache", str(folder), ids)
    assert written.stored_bytes >= 2**25

    child = [sys.executable, "-c", READER, str(tmp_path / "cache"), str(folder)]  # whose heap holds nothing else
    told = completed(child, env=environment(), check=True).stdout

    batch, everything = map(int, told.split())
    assert batch < 2**23
    assert everything >= 2**25


# --- What is never used -------------------------------------------------------------------------------------------


def flip_a_bit(folder):
    path = folder / "outputs-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def cut_off(folder):
    path = folder / "outputs-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-64])


def take_away(folder):
    (folder / "outputs-00001.safetensors").unlink()


def exchange(folder):
    first, second = (folder / f"outputs-0000{i}.safetensors" for i in (0, 1))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


@pytest.mark.parametrize("damage", [flip_a_bit, cut_off, take_away, exchange], ids=lambda each: each.__name__)
def test_a_damaged_cache_is_refused(teacher, tmp_path, damage):
    teacher_outputs(tmp_path / "cache", teacher, IDS, batch=2, shard_bytes=1)
    damage(only(tmp_path / "cache"))

    with pytest.raises(TeacherError, match=r"(is missing|is corrupt: its SHA-256 does not match); delete"):
        teacher_outputs(tmp_path / "cache", teacher, IDS, batch=2, shard_bytes=1)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"identity": 1, "shards": []}', '{"identity": {}, "shards": [{}]}'])
def test_a_damaged_description_is_refused(teacher, tmp_path, text):
    teacher_outputs(tmp_path / "cache", teacher, IDS)
    (only(tmp_path / "cache") / DESCRIPTION).write_text(text)

    with pytest.raises(TeacherError, match=r"teacher\.json is damaged: .* delete .* to have it computed again"):
        teacher_outputs(tmp_path / "cache", teacher, IDS)


def test_a_cache_of_other_settings_under_this_name_is_refused(teacher, tmp_path):
    teacher_outputs(tmp_path / "one", teacher, IDS)
    teacher_outputs(tmp_path / "other", teacher, IDS, k=4)
    shutil.copytree(only(tmp_path / "one"), only(tmp_path / "other"), dirs_exist_ok=True)

    with pytest.raises(TeacherError, match="made with another k: None, now 4; its name says otherwise"):
        teacher_outputs(tmp_path / "other", teacher, IDS, k=4)


def as_schema_1_wrote_it(folder, shards):
    """The same cache with the digests of shards beside their places, and only so many of them finished."""
    seal = json.loads((folder / DESCRIPTION).read_text())
    described = [shard | {"sha256": seal["files"][shard["file"]]} for shard in seal["shards"]][:shards]
    (folder / DESCRIPTION).write_text(json.dumps({"identity": seal["identity"], "shards": described}))


def test_a_cache_that_an_earlier_version_wrote_is_read_checked_and_completed(teacher, tmp_path, monkeypatch):
    settings, steps = {"batch": 2, "shard_bytes": 1}, []
    written = teacher_outputs(tmp_path / "cache", teacher, IDS, **settings).batch(range(6))
    folder = only(tmp_path / "cache")
    whole = contents(folder)

    as_schema_1_wrote_it(folder, shards=2)
    teacher_outputs(tmp_path / "cache", teacher, IDS, progress=lambda *step: steps.append(step[0]), **settings)
    assert [4, 6] == steps
    assert whole == contents(folder)

    as_schema_1_wrote_it(folder, shards=3)
    unopened(monkeypatch)
    assert torch.equal(written, teacher_outputs(tmp_path / "cache", teacher, IDS, **settings).batch(range(6)))
    flip_a_bit(folder)
    with pytest.raises(TeacherError, match=r"outputs-00001\.safetensors is corrupt: .* not match; delete"):
        teacher_outputs(tmp_path / "cache", teacher, IDS, **settings)


def test_two_processes_do_not_write_one_cache(teacher, tmp_path):
    teacher_outputs(tmp_path / "cache", teacher, IDS)
    folder = only(tmp_path / "cache")
    rewrite(folder / DESCRIPTION, shards=[])  # begun, nothing finished
    with locked(folder, TeacherError, "busy"), pytest.raises(TeacherError, match="another process is writing"):
        teacher_outputs(tmp_path / "cache", teacher, IDS)


def test_outputs_that_are_not_finite_are_refused(teacher, tmp_path, monkeypatch):
    base = compression.open_base(teacher)
    monkeypatch.setattr(_checkpoint, "open_base", lambda *_, **__: base)
    base.model.lm_head.weight[3] = 1e6

    with pytest.raises(TeacherError, match=r"text 0 is not finite at position 0 in torch\.float16; try arithmetic"):
        teacher_outputs(tmp_path / "cache", teacher, IDS, dtype="float16")
    assert [] == list(only(tmp_path / "cache").glob("*.safetensors"))


class LastIsNaN(torch.nn.Module):
    """A head that fails at the last position of what it is given."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, states):
        logits = self.head(states)
        logits[-1] = math.nan
        return logits


def test_outputs_at_padding_may_be_anything(teacher, tmp_path, monkeypatch):
    base = compression.open_base(teacher)
    base.model.lm_head = LastIsNaN(base.model.lm_head)
    monkeypatch.setattr(_checkpoint, "open_base", lambda *_, **__: base)
    mask = torch.ones_like(IDS)
    mask[:, -1] = 0

    assert teacher_outputs(tmp_path / "cache", teacher, IDS, mask=mask, batch=1).batch([1])[0, 9].isnan().all()
    with pytest.raises(TeacherError, match="text 0 is not finite at position 9"):
        teacher_outputs(tmp_path / "cache", teacher, IDS, batch=1)


def test_a_disk_that_is_too_small_is_told_before_the_teacher_is_opened(teacher, tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    unopened(monkeypatch)

    with pytest.raises(TeacherError, match=r"for 6 texts take 0\.0 GB, and .* has 0\.0; keep fewer tokens"):
        teacher_outputs(tmp_path / "cache", teacher, IDS)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"ids": IDS.float()}, TeacherError, "token ids must be integers"),
        ({"ids": IDS[0]}, TeacherError, "token ids must be integers"),
        ({"ids": IDS + 1}, TeacherError, "token ids go from 1 to 48; the teacher has 48 tokens"),
        ({"ids": IDS - 1}, TeacherError, "token ids go from -1"),
        ({"mask": IDS[:2]}, TeacherError, "the mask"),
        ({"k": 0}, TeacherError, "k=0: allowed are 1 to the vocabulary of 48"),
        ({"k": 41, "vocabulary": 40}, TeacherError, "k=41: allowed are 1 to the vocabulary of 40"),
        ({"vocabulary": 49}, TeacherError, "vocabulary=49: allowed are 1 to 48"),
        ({"batch": 0}, TeacherError, "batch=0"),
        ({"arithmetic": "float64"}, RecipeError, "arithmetic='float64'"),
        ({"arithmetic": "float32", "recipe": "nf4"}, RecipeError, "arithmetic='float32' of a teacher by nf4"),
        ({"dtype": "int8"}, RecipeError, "dtype='int8': allowed are float32, bfloat16, float16"),
        ({"recipe": "nothing"}, RecipeError, "nothing"),
        ({"teacher": "nowhere"}, compression.CheckpointError, "unknown base"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(teacher, tmp_path, settings, error, words):
    with pytest.raises(error, match=words):
        teacher_outputs(tmp_path / "cache", **{"teacher": teacher, "ids": IDS} | settings)
    assert not (tmp_path / "cache").exists()


def test_a_text_that_is_not_there_is_an_error(teacher, tmp_path):
    with pytest.raises(IndexError, match="text 6; the teacher's outputs are of 6 texts"):
        teacher_outputs(tmp_path / "cache", teacher, IDS).batch([0, 6])


# --- Tokenizers -----------------------------------------------------------------------------------------------------


def words(*tokens, splitter=pre_tokenizers.Whitespace):
    """A tokenizer of whole words, with these ids in order."""
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["[UNK]", *tokens])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = splitter()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def test_the_same_tokenizer_shares_the_smaller_embedding():
    assert 258 == shared_vocabulary(_checkpoint.byte_tokenizer(), _checkpoint.byte_tokenizer(), (320, 258))
    assert 3 == shared_vocabulary(words("a", "b"), words("a", "b", "zebra"), (3, 8))  # merely another size


def test_another_tokenizer_is_refused_with_the_first_tokens_that_differ():
    with pytest.raises(TeacherError, match=r"2 of 4 tokens: id 2 is 'b' and 'c'; id 3 is 'c' and 'b'; give a teacher"):
        shared_vocabulary(words("a", "b", "c"), words("a", "c", "b"), (4, 4))
    assert 4 == shared_vocabulary(words("a", "b", "c"), words("a", "c", "b"), (4, 5), allow_vocab_mismatch=True)


def test_the_same_tokens_that_are_cut_otherwise_are_refused():
    tokens = ("quick", "foxes", "foxes'", "The")
    with pytest.raises(TeacherError, match=r"same tokens but cut text otherwise: \['foxes', '.*\] and \[\"foxes'\""):
        shared_vocabulary(words(*tokens), words(*tokens, splitter=pre_tokenizers.WhitespaceSplit), (5, 5))


@pytest.mark.parametrize(
    ("pair", "missing"), [((None, words("a")), "student"), ((words("a"), None), "teacher")], ids=["student", "teacher"]
)
def test_a_missing_tokenizer_cannot_be_compared(pair, missing):
    with pytest.raises(TeacherError, match=f"the {missing} has no tokenizer to compare; .*allow_vocab_mismatch"):
        shared_vocabulary(*pair, (2, 2))


def test_the_reference_and_its_teacher_share_their_tokenizer():
    student, teacher = (_checkpoint.locate(name) for name in ("reference", "reference-teacher"))
    rows = student.config["vocab_size"], teacher.config["vocab_size"]

    assert min(rows) == shared_vocabulary(student.tokenizer, teacher.tokenizer, rows)
    with pytest.raises(TeacherError, match="different tokenizers"):
        shared_vocabulary(student.tokenizer, _checkpoint.byte_tokenizer(), rows)


def test_the_digest_of_a_tokenizer_does_not_see_how_it_was_called():
    tokenizer = words("a", "b")
    before = tokenizer_digest(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[UNK]"})
    tokenizer(["a b", "a"], padding=True, truncation=True, max_length=2)

    assert before == tokenizer_digest(tokenizer) != tokenizer_digest(words("b", "a"))
    assert "none" == tokenizer_digest(None)
