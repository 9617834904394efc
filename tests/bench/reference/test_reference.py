"""The embedded reference: its tokenizer, its training, and the weights that are shipped."""

import hashlib
import itertools
import json
import math
import re
import statistics
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.commands import card_of_reference, training_run
from bench.commands import train_reference as training
from bench.errors import OptionError
from bench.measure import reference_scores
from bench.reference import NAMES, folder, lessons, tokenizer, word_lists, world
from bench.reference import model as architecture
from bench.reference.batches import batch
from bench.reference.world import Draw

LIMITS = {"student": 16_000_000, "teacher": 40_000_000}  # bytes of the weights
TWIN = architecture.Shape(hidden=64, intermediate=128, layers=2, heads=4, kv_heads=2, rate=8e-3, curriculum=1)
QUICK = {"lengths": ((0.0, 128),), "long": 0}


def facts(name: str) -> dict:
    return json.loads((folder(name) / "card.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def vocabulary():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder("student"), local_files_only=True)


@pytest.fixture(scope="module")
def student():
    return reference_scores.load("student")


class TestTokenizer:
    @given(text=st.text())
    def test_any_text_comes_back(self, vocabulary, text):
        assert text == vocabulary.decode(vocabulary.encode(text))

    def test_nothing_is_added_to_a_text(self, vocabulary):
        assert [] == vocabulary.encode("")
        assert "ab" == vocabulary.decode(vocabulary.encode("a") + vocabulary.encode("b"))

    def test_every_word_that_can_be_an_answer_is_one_token(self, vocabulary):
        said = {f" {value}" for values in word_lists.VALUES.values() for value in values}
        said |= {f" {word}" for word in (*word_lists.FIRST, *word_lists.SECOND, *word_lists.KINDS)}

        assert [] == [word for word in sorted(said) if len(vocabulary.encode(word)) != 1]

    @given(st.integers(0, 10**6), st.floats(0, 1))
    def test_the_pieces_of_a_lesson_have_the_tokens_of_the_whole(self, vocabulary, seed, share):
        lesson = lessons.lesson(Draw(seed), share)
        pieces = [vocabulary.encode(text, verbose=False) for text, _ in lesson]
        whole = vocabulary.encode("".join(text for text, _ in lesson), verbose=False)

        assert list(itertools.chain.from_iterable(pieces)) == whole

    def test_the_shipped_one_is_built_from_the_lessons(self, vocabulary, tmp_path):
        built = tokenizer.build(lessons.samples(), context=architecture.CONTEXT)

        assert built.get_vocab() == vocabulary.get_vocab()
        assert len(built) == tokenizer.ENTRIES

    def test_too_many_pieces_are_refused(self):
        with pytest.raises(ValueError, match="need 262 entries, not entries=260"):
            tokenizer.build(["one two three"], entries=260)

    def test_held_out_text_has_enough_tokens_to_measure_on(self, vocabulary):
        assert len(vocabulary.encode("\n\n".join(world.texts("test")), verbose=False)) >= 100 * 512


@pytest.mark.parametrize("name", NAMES)
class TestShipped:
    def test_the_card_is_of_these_weights_and_this_world(self, name):
        said = facts(name)

        assert hashlib.sha256((folder(name) / "model.safetensors").read_bytes()).hexdigest() == said["weights_sha256"]
        assert world.digest() == said["world_sha256"]

    def test_the_weights_are_small_and_in_bfloat16(self, name):
        import torch
        from safetensors.torch import load_file

        path = folder(name) / "model.safetensors"
        weights = load_file(path)

        assert path.stat().st_size <= LIMITS[name]
        assert {torch.bfloat16} == {tensor.dtype for tensor in weights.values()}
        assert facts(name)["parameters"] == sum(tensor.numel() for tensor in weights.values())

    def test_the_architecture_is_what_the_methods_need(self, name):
        config = json.loads((folder(name) / "config.json").read_text(encoding="utf-8"))

        assert ["MistralForCausalLM"] == config["architectures"]
        assert config["num_hidden_layers"] >= 8
        assert 4 <= config["num_key_value_heads"] < config["num_attention_heads"]
        assert config["max_position_embeddings"] >= 2048
        assert config["hidden_size"] % 128 == config["intermediate_size"] % 128 == 0
        assert config["sliding_window"] is None
        assert not config["tie_word_embeddings"]


class TestScores:
    """What must be true of the shipped student for compression to be seen in its scores."""

    @pytest.mark.process
    def test_it_scores_as_its_card_says(self, student):
        quick = reference_scores.scores(*student, names=("facts_easy", "no_rag", "perplexity"), limit=60)

        for task, found in quick.items():
            said = facts("student")["scores"]["as it is"][task]
            assert found.low <= said["high"]
            assert found.high >= said["low"]

    def test_the_student_is_competent_and_leaves_room(self):
        said = {task: row["value"] for task, row in facts("student")["scores"]["as it is"].items()}

        assert min(said[task] for task in reference_scores.CHOICES) >= 0.8
        assert min(said["arithmetic"], said["code"]) >= 0.3
        assert max(said[task] for task in card_of_reference.TASKS) <= 0.97
        assert said["rag"] >= 0.7
        assert said["no_rag"] < 0.2

    def test_compression_can_be_seen(self):
        scores = facts("student")["scores"]
        means = {
            recipe: statistics.mean(rows[task]["value"] for task in card_of_reference.TASKS)
            for recipe, rows in scores.items()
        }
        lost = {recipe: means["as it is"] - mean for recipe, mean in means.items()}

        assert lost["rtn(bits=4)"] < 0.02 <= lost["rtn(bits=3)"]
        assert lost["rtn(bits=2)"] >= 0.20
        assert scores["rtn(bits=2)"]["perplexity"]["value"] >= 2 * scores["as it is"]["perplexity"]["value"]

    def test_the_last_tenth_of_the_steps_gained_less_than_a_hundredth_of_the_loss(self):
        late, end = facts("student")["held_out_nat"].values()

        assert late - end < 0.01 * late

    def test_the_teacher_is_ahead_on_held_out_text_and_on_rare_facts(self):
        student, teacher = (facts(name)["scores"]["as it is"] for name in NAMES)

        assert math.log(student["perplexity"]["value"] / teacher["perplexity"]["value"]) >= 0.05
        assert teacher["facts_hard"]["value"] - student["facts_hard"]["value"] >= 0.05

    def test_readme_has_the_table_of_the_cards(self):
        readme = (folder("student").parent / "README.md").read_text(encoding="utf-8")
        cards = {name: facts(name) for name in NAMES}

        assert (
            card_of_reference.table(cards)
            == readme.partition(card_of_reference.START)[2].partition(card_of_reference.END)[0].strip()
        )

    def test_likelihoods_are_those_of_one_choice_at_a_time_without_a_cache(self, student):
        import torch

        model, vocabulary = student
        item = reference_scores.tasks.items("categories", "test")[0]
        start = vocabulary.encode(reference_scores.tasks.prompt(item))
        expected = []
        for choice in item["choices"]:
            ids = torch.tensor([start + vocabulary.encode(choice)])
            with torch.inference_mode():
                logs = model(input_ids=ids).logits.log_softmax(-1)[0, len(start) - 1 : -1]
            expected.append(float(logs.gather(1, ids[0, len(start) :, None]).mean()))

        assert expected == pytest.approx(reference_scores.likelihoods(model, vocabulary, [item])[0], abs=1e-3)

    def test_an_unknown_task_is_refused_with_the_known_ones(self, student):
        with pytest.raises(OptionError, match="tasks fact are not scored; tasks must be among continuation"):
            reference_scores.scores(*student, names=("fact",))


class TestMeasures:
    @pytest.mark.parametrize(
        ("answer", "truth", "expected"),
        [("The 42 coins.", "42 coins", 1), ("red", "blue", 0), ("42", "42 coins", 2 / 3), ("", "red", 0)],
    )
    def test_f1_is_that_of_squad(self, answer, truth, expected):
        assert reference_scores.f1(answer, truth) == pytest.approx(expected)

    @given(st.text(), st.text())
    def test_f1_is_symmetric_and_a_share(self, one, other):
        assert 0 <= reference_scores.f1(one, other) == reference_scores.f1(other, one) <= 1

    @given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=200))
    def test_an_interval_holds_its_value(self, points):
        found = reference_scores._share(points)

        assert 0 <= found.low <= found.value <= found.high <= 1
        assert found.high - found.low > 0

    def test_kurtosis_is_zero_for_a_gaussian_and_large_with_an_outlier(self):
        import torch

        values = torch.randn(100_000, generator=torch.Generator().manual_seed(0))

        assert card_of_reference.kurtosis(values) == pytest.approx(0, abs=0.1)
        assert card_of_reference.kurtosis(torch.cat([values, torch.tensor([100.0])])) > 100
        assert card_of_reference.channel_ratio(torch.tensor([[1.0, -8.0, 2.0], [0.5, 1.0, 1.0]])) == 4


def test_student_and_teacher_share_their_tokenizer():
    student, teacher = ((folder(name) / "tokenizer.json").read_bytes() for name in NAMES)

    assert student == teacher


def test_an_unknown_reference_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="name must be one of student, teacher, not 'pupil'"):
        folder("pupil")


class TestTraining:
    @pytest.mark.process
    def test_a_small_twin_learns_what_counting_tokens_cannot(self, tmp_path, vocabulary):
        import torch

        ids, following, weights = batch(vocabulary, seed=99, step=0, share=1.0, rows=16, length=512)
        tokens = Counter(following[weights > 0].tolist())
        entropy = sum(n * math.log(tokens.total() / n) for n in tokens.values()) / tokens.total()  # nat per token

        training.train(TWIN, out=tmp_path, steps=160, vocabulary=vocabulary, lengths=((0.0, 512),), long=0)

        twin = _open(tmp_path)
        with torch.inference_mode():
            assert training_run.loss(twin, ids, following, weights) < 0.6 * entropy

    def test_a_resumed_run_ends_as_an_uninterrupted_one(self, tmp_path, vocabulary):
        options = {"steps": 8, "vocabulary": vocabulary, "score_every": 100, **QUICK}

        def interrupt(progress: training_run.Progress) -> None:
            if progress.step == 3:
                raise KeyboardInterrupt

        whole = training.train(TWIN, out=tmp_path / "whole", **options)
        with pytest.raises(KeyboardInterrupt):
            training.train(TWIN, out=tmp_path / "cut", report=interrupt, **options)
        resumed = training.train(TWIN, out=tmp_path / "cut", resume=True, **options)

        assert (8, whole["tokens"]) == (resumed["steps"], resumed["tokens"])
        assert whole["weights_sha256"] == resumed["weights_sha256"]

    def test_a_grown_model_computes_what_the_smaller_one_did(self, tmp_path, vocabulary):
        import torch

        training.train(TWIN, out=tmp_path, steps=2, vocabulary=vocabulary, **QUICK)
        (tmp_path / architecture.TAUGHT).unlink(missing_ok=True)
        small = _open(tmp_path)
        large = architecture.build(_of(TWIN, layers=6), vocabulary, seed=1)
        ids = torch.arange(60).view(2, 30)

        architecture.grow(large, tmp_path)

        with torch.inference_mode():
            torch.testing.assert_close(small(input_ids=ids).logits, large(input_ids=ids).logits)

    def test_spreading_its_channels_leaves_the_function_and_makes_them_unlike(self, vocabulary):
        import torch

        model = architecture.build(TWIN, vocabulary, seed=0).eval()
        linears = [module.weight.detach() for name, module in model.named_modules() if name.endswith("_proj")]
        before = [weight.norm(dim=0) for weight in linears]
        ids = torch.arange(60).view(2, 30)

        with torch.inference_mode():
            expected = model(input_ids=ids).logits
        architecture.spread_channels(model)

        with torch.inference_mode():
            torch.testing.assert_close(expected, model(input_ids=ids).logits, rtol=1e-3, atol=1e-4)
        for was, weight in zip(before, linears, strict=True):
            by = was / weight.norm(dim=0)
            assert 0.35 < float(by[was > 0].log().std()) < 0.75

    def test_a_model_that_is_too_sure_is_tempered_and_answers_as_before(self, vocabulary):
        import torch

        model = architecture.build(TWIN, vocabulary, seed=0).eval()
        ids = torch.arange(60).view(2, 30)
        with torch.no_grad():
            trained = model.lm_head.weight.clone()
            answers = model(input_ids=ids).logits.argmax(-1)

        def loss() -> float:
            return abs(float(model.lm_head.weight[0, 1] / trained[0, 1]) - 0.72)

        factor = architecture.temper(model, loss)

        assert factor == pytest.approx(0.7)
        torch.testing.assert_close(model.lm_head.weight, trained * factor)
        with torch.inference_mode():
            assert torch.equal(answers, model(input_ids=ids).logits.argmax(-1))

    def test_the_loss_on_held_out_text_is_told_before_and_after_the_last_tenth(self, tmp_path, vocabulary):
        facts = training.train(TWIN, out=tmp_path, steps=10, vocabulary=vocabulary, **QUICK)

        late, end = facts["held_out_nat"].values()
        assert 0 < end < late

    @pytest.mark.parametrize(
        ("change", "message"),
        [({"layers": 3}, "cannot be grown to this shape"), ({"hidden": 128}, "cannot be grown to this shape")],
    )
    def test_a_shape_that_cannot_be_grown_to_is_refused(self, change, message, tmp_path, vocabulary):
        training.train(TWIN, out=tmp_path, steps=1, vocabulary=vocabulary, **QUICK)

        with pytest.raises(OptionError, match=message):
            architecture.grow(architecture.build(_of(TWIN, **change), vocabulary, seed=0), tmp_path)

    def test_no_row_of_a_batch_cuts_a_lesson_and_only_marked_words_count(self, vocabulary):
        ids, following, weights = batch(vocabulary, seed=0, step=5, share=0.3, rows=4, length=256)

        assert (4, 256) == tuple(ids.shape) == tuple(weights.shape)
        assert bool((ids[:, 1:] == following[:, :-1]).all())
        assert 0.05 < float((weights > 0).float().mean()) < 0.9
        for row in following.tolist():
            ended = [token for token in row if token != vocabulary.pad_token_id]
            assert ended[-1] == vocabulary.eos_token_id

    def test_the_rate_rises_stays_and_falls_to_zero(self):
        rates = [training_run.rate_at(step, 1000) for step in range(1001)]

        assert rates[:100] == sorted(rates[:100])
        assert {1.0} == set(rates[100:500])
        assert rates[500:] == sorted(rates[500:], reverse=True)
        assert 0 == rates[1000] < rates[999] < 0.01 < rates[899] < 0.05

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["student", "--resume"], "nothing to resume: .*training.pt does not exist"),
            (["student", "--out", "file"], "cannot write to the folder '.*file'"),
            (["student", "--device", "gpu"], "device must be cpu or cuda, not 'gpu'"),
            (["student", "--device", "meta"], "'meta' is not available; use cpu"),
            (["student", "--steps", "0"], "steps must be at least 1, not 0"),
            (["teacher", "--grow", "nowhere"], "nothing to grow from: nowhere has neither"),
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
        training.train(TWIN, out=tmp_path, steps=1, vocabulary=vocabulary, **QUICK)

        with pytest.raises(OptionError, match="start without --resume"):
            training.train(TWIN, out=tmp_path, steps=2, resume=True, seed=1, vocabulary=vocabulary, **QUICK)


def _of(shape: architecture.Shape, **change: int) -> architecture.Shape:
    return architecture.Shape(**(training.asdict(shape) | change))


def _open(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, local_files_only=True).float().eval()
