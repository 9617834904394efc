"""The embedded reference: its world, its tokenizer, its training, and the weights that are shipped."""

import hashlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench._errors import OptionError
from bench.reference import NAMES, folder, world
from bench.reference import train as training

ROOT = Path(__file__).parents[1]
DIGEST = "3acda27f6401b821f14742cf67279ef7a1368a2f15955c552decca6e76f6cd61"
LIMITS = {"student": 16_000_000, "teacher": 40_000_000}  # bytes of the weights
TWIN = training.Shape(hidden=64, intermediate=128, layers=2, heads=4, kv_heads=2, rate=8e-3)


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def card(name: str) -> dict:
    return json.loads((folder(name) / "card.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def vocabulary():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder("student"), local_files_only=True)


class TestWorld:
    def test_the_test_split_has_the_pinned_bytes(self):
        assert DIGEST == world.digest()

    @pytest.mark.parametrize("seed", ["0", "1"])
    def test_the_bytes_do_not_depend_on_the_hash_seed(self, seed):
        code = "from bench.reference import world; print(world.digest())"

        assert DIGEST == python(code, PYTHONHASHSEED=seed)

    def test_a_stream_repeats_itself_and_differs_between_seeds(self):
        first, again, other = (list(itertools.islice(world.stream("train", seed), 50)) for seed in (3, 3, 4))

        assert first == again
        assert not set(first) & set(other)

    def test_no_document_is_in_two_splits(self):
        splits = [world.texts("train", limit=6000), world.texts("validation"), world.texts("test")]

        for one, another in itertools.combinations(splits, 2):
            assert not set(one) & set(another)

    def test_no_device_is_in_two_groups(self):
        names = [device.name for group in world.GROUPS for device in world.devices(group)]

        assert sum(world.GROUPS.values()) == len(set(names)) == len(names)

    @pytest.mark.parametrize("split", ["validation", "test"])
    def test_held_out_devices_are_written_about_only_in_their_split(self, split):
        names = {device.name for device in world.devices(split)}
        pairs = re.compile(r"(?=\b([A-Z]\w+ [A-Z]\w+)\b)")  # every two capitalised words in a row, overlaps too

        assert len(names & set(pairs.findall("\n".join(world.texts(split))))) >= 20
        for other in sorted(set(world.SPLITS) - {split}):
            assert not names & set(pairs.findall("\n".join(world.texts(other, limit=6000))))

    def test_every_sum_is_right(self):
        sums = re.findall(r"(\d+) ([*+-]) (\d+) = (\d+)", "\n".join(world.texts("test")))
        apply = {"*": int.__mul__, "+": int.__add__, "-": int.__sub__}

        assert len(sums) > 500
        for left, sign, right, result in sums:
            assert int(result) == apply[sign](int(left), int(right))

    def test_products_of_held_out_text_are_not_in_training_text(self):
        asked = re.compile(r"buys (\d+) \w+ for (\d+) coins")
        seen, held = (set(asked.findall("\n".join(world.texts(s, limit=6000)))) for s in ("train", "test"))

        assert seen
        assert held
        assert not seen & held

    @pytest.mark.parametrize("call", [world.texts, lambda split: world.stream(split, 0), world.devices])
    def test_an_unknown_name_is_refused_with_the_known_ones(self, call):
        with pytest.raises(ValueError, match=r"'tset' is unknown; .*validation, test"):
            call("tset")

    def test_a_negative_limit_is_refused(self):
        with pytest.raises(ValueError, match="limit=-1"):
            world.texts("test", limit=-1)


class TestTokenizer:
    @given(text=st.text())
    def test_any_text_comes_back(self, vocabulary, text):
        ids = vocabulary.encode(text)

        assert text == vocabulary.decode(ids)

    def test_nothing_is_added_to_a_text(self, vocabulary):
        assert [] == vocabulary.encode("")
        assert "ab" == vocabulary.decode(vocabulary.encode("a") + vocabulary.encode("b"))

    def test_digits_stand_alone(self, vocabulary):
        assert ["1", "9", "7", "5"] == vocabulary.tokenize("1975")

    def test_held_out_text_has_enough_tokens_to_measure_on(self, vocabulary):
        assert len(vocabulary.encode("\n\n".join(world.texts("test")), verbose=False)) >= 60_000


@pytest.mark.parametrize("name", NAMES)
class TestShipped:
    def test_the_card_is_of_these_weights_and_this_world(self, name):
        facts = card(name)

        assert facts["finished"]
        assert hashlib.sha256((folder(name) / "model.safetensors").read_bytes()).hexdigest() == facts["weights_sha256"]
        assert world.digest() == facts["world_sha256"]

    def test_the_weights_are_small_and_in_bfloat16(self, name):
        import torch
        from safetensors.torch import load_file

        path = folder(name) / "model.safetensors"
        weights = load_file(path)

        assert path.stat().st_size <= LIMITS[name]
        assert {torch.bfloat16} == {tensor.dtype for tensor in weights.values()}
        assert card(name)["parameters"] == sum(tensor.numel() for tensor in weights.values())

    def test_the_architecture_is_what_the_methods_need(self, name):
        config = json.loads((folder(name) / "config.json").read_text(encoding="utf-8"))

        assert ["MistralForCausalLM"] == config["architectures"]
        assert config["num_hidden_layers"] >= 8
        assert config["num_key_value_heads"] >= 4
        assert config["max_position_embeddings"] >= 2048
        assert config["hidden_size"] % 128 == config["intermediate_size"] % 128 == 0
        assert config["sliding_window"] is None
        assert not config["tie_word_embeddings"]

    def test_held_out_text_scores_as_the_card_says(self, name, vocabulary):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder(name), local_files_only=True).float()

        assert card(name)["test"]["loss"] == pytest.approx(
            training.evaluate(model, vocabulary, "test", limit=40), abs=0.2
        )


def test_student_and_teacher_share_their_tokenizer():
    student, teacher = ((folder(name) / "tokenizer.json").read_bytes() for name in NAMES)

    assert student == teacher


def test_an_unknown_reference_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'pupil' is no embedded reference; there are student, teacher"):
        folder("pupil")


@pytest.fixture
def one_thread():
    """Small matrices gain nothing from more, and lose much where another process wants the core."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
class TestTraining:
    def test_a_small_twin_learns_what_counting_tokens_cannot(self, tmp_path, vocabulary):
        tokens = Counter(vocabulary.encode("\n\n".join(world.texts("validation")), verbose=False))
        entropy = sum(n * math.log(tokens.total() / n) for n in tokens.values()) / tokens.total()  # nat per token
        lengths = ((0.0, 128), (0.8, 512))

        twin = training.train(TWIN, training.Budget(steps=120), out=tmp_path, lengths=lengths)

        assert twin["validation"]["loss"] < 0.8 * entropy
        assert (folder("student") / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()

    def test_a_resumed_run_ends_as_an_uninterrupted_one(self, tmp_path, vocabulary):
        options = {"lengths": ((0.0, 32), (0.5, 64)), "tokens_per_step": 128, "vocabulary": vocabulary}

        def interrupt(progress: training.Progress) -> None:
            if progress.step == 3:
                raise KeyboardInterrupt

        whole = training.train(TWIN, training.Budget(steps=8), out=tmp_path / "whole", **options)
        with pytest.raises(KeyboardInterrupt):
            training.train(TWIN, training.Budget(steps=8), out=tmp_path / "cut", report=interrupt, **options)
        resumed = training.train(TWIN, training.Budget(steps=8), out=tmp_path / "cut", resume=True, **options)

        assert (8, whole["tokens"]) == (resumed["steps"], resumed["tokens"])
        assert whole["weights_sha256"] == resumed["weights_sha256"]
        assert not (tmp_path / "cut" / training.CHECKPOINT).exists()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["student", "--resume"], "nothing to resume: .*training.pt does not exist"),
            (["student", "--out", "file"], "'file' is not a folder that can be written"),
            (["student", "--device", "gpu"], "'gpu' is no device of torch"),
            (["student", "--device", "meta"], "'meta' is not there; take cpu"),
            (["student", "--steps", "0"], "steps=0.* must be more than 0"),
            (["student", "--minutes", "nan"], "minutes=nan.* must be more than 0"),
            (["pupil"], "invalid choice: 'pupil'"),
        ],
    )
    def test_bad_options_are_refused_before_any_work(self, options, message, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "file").touch()
        if "--out" not in options:
            options = [*options, "--out", "out"]

        with pytest.raises(SystemExit, match="2"):
            training.main(options)
        assert re.search(message, capsys.readouterr().err)

    def test_a_checkpoint_of_another_seed_is_refused(self, tmp_path, vocabulary):
        options = {"lengths": ((0.0, 32),), "vocabulary": vocabulary}

        def interrupt(progress: training.Progress) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            training.train(TWIN, training.Budget(steps=2), out=tmp_path, report=interrupt, **options)
        with pytest.raises(OptionError, match="start without --resume"):
            training.train(TWIN, training.Budget(steps=2), out=tmp_path, resume=True, seed=1, **options)

    def test_a_budget_is_steps_or_minutes(self):
        with pytest.raises(OptionError, match="give one of the two"):
            training.Budget(steps=1, minutes=1.0)


def test_importing_the_reference_imports_no_torch():
    code = (
        "import sys, bench.reference.world, bench.reference.train; print({'torch', 'transformers'} & set(sys.modules))"
    )

    assert "set()" == python(code)
