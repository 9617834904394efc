"""From generated ids to answers: decoded behind the prompt, up to any end token, without thinking."""

import pytest
from checkpoints import rewrite, says
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from transformers import AutoModelForCausalLM, LlamaTokenizer
from wordings import tokenizer_of, tokenizers, wide_texts, words_tokenizer, writing

import compression
from bench.data.tasks.table import SUITE
from bench.errors import JudgeError
from bench.measure.answering import Answer, answer
from bench.measure.decoding import THINKING, Answering, Decoder, begun, parts, thinking_in
from bench.measure.judge.local import LocalJudge
from bench.measure.rag.overlap import squad_f1
from bench.measure.rag.prompts import ask, prompt
from bench.measure.scoring.lm_eval import Scorer
from bench.measure.scoring.programs import CONFIGURATIONS, passes
from bench.metrics.tasks import TaskReading
from compression.checkpoints.tokens import encode
from compression.errors import CheckpointError

MARKS = [mark for pair in THINKING.items() for mark in pair]


class TestSpaces:
    @given(tokenizers(), wide_texts, st.lists(st.integers(0, 300), max_size=12))
    def test_prompt_and_continuation_are_the_text_of_all_their_ids(self, tokenizer, text, ids):
        before = encode(tokenizer, text)
        ids = [n % len(tokenizer) for n in ids]

        found = Decoder(tokenizer).behind(before, ids)

        known, whole = (tokenizer.decode(each, skip_special_tokens=True) for each in (before, before + ids))
        if whole.startswith(known):
            assert known + found == whole
        else:  # the first bytes make no character, and spoil the last one of the prompt
            assert "\ufffd" in whole

    @pytest.mark.parametrize("stops", [(), ("\n\n",)])
    def test_a_program_keeps_the_space_that_it_begins_with(self, stops):
        words = ["<unk>", "<s>", "</s>", "\u2581", "\u2581" * 2, "\u2581" * 4, "\u25811", "\n", *"def():return"]
        merges = [("\u2581", "\u2581"), ("\u2581" * 2, "\u2581" * 2), ("\u2581", "1"),
                  ("r", "e"), ("re", "t"), ("ret", "u"), ("retu", "r"), ("retur", "n")]  # fmt: skip
        known = [*dict.fromkeys([*words, *("".join(pair) for pair in merges), "1"])]
        tokenizer = LlamaTokenizer(vocab={word: n for n, word in enumerate(known)}, merges=merges)
        prompt = "def f():\n"
        body = tokenizer.convert_tokens_to_ids(["\u2581" * 4, "return", "\u25811", "</s>"])
        model = writing([encode(tokenizer, prompt)[-1], *body], len(known), eos_token_id=2, bos_token_id=1)

        [said] = answer(model, tokenizer, [prompt], new_tokens=8, stops=stops)

        assert Answer("    return 1", 4, "end") == said
        doc = {"prompt": prompt, "entry_point": "f", "test": "def check(f):\n    assert f() == 1\n"}
        assert [1.0] == passes([CONFIGURATIONS["humaneval"]["process_results"](doc, [said.text])["pass@1"]])

    def test_a_stop_that_begins_with_the_first_space_is_seen(self):
        tokenizer = tokenizer_of(pieces=True)
        space, letter = tokenizer.convert_tokens_to_ids(["\u2581", "a"])
        model = writing([tokenizer.encode("b:")[-1], space, letter, letter], len(tokenizer), eos_token_id=1)

        assert [Answer("", 2, "stop")] == answer(model, tokenizer, ["b:"], new_tokens=9, stops=(" a",))


class TestEnds:
    words = ("<eos>", "<eot>", "Q", "Paris", "assistant", "It")

    @pytest.fixture
    def chatty(self, tmp_path):
        """A folder whose generation_config.json alone says that <eot> ends an answer."""
        tokenizer = words_tokenizer(*self.words, special=["<eot>"])
        model = writing([2, 3, 1, 4, 5, 0], len(self.words), eos_token_id=0)
        model.generation_config.eos_token_id = [0, 1]
        model.save_pretrained(tmp_path / "chatty")
        tokenizer.save_pretrained(tmp_path / "chatty")
        return tmp_path / "chatty"

    def test_end_tokens_of_generation_config_end_answers_before_and_after_compressing(self, chatty, tmp_path):
        base = compression.open_base(str(chatty))
        compressed = compression.compress(base, "magnitude(scope=row,sparsity=0.01)")
        expected = AutoModelForCausalLM.from_pretrained(chatty).generation_config.eos_token_id

        for model in (base.model, compressed.model):
            assert expected == model.generation_config.eos_token_id
            assert [" Paris"] == [each.text for each in answer(model, base.tokenizer, ["Q"], new_tokens=9)]
            asked = {"until": [], "max_gen_toks": 9, "do_sample": False}
            assert [" Paris"] == Scorer(model, base.tokenizer).generate_until([Instance("g", {}, ("Q", asked), 0)])

    def test_without_a_file_the_configuration_says(self, chatty):
        (chatty / "generation_config.json").unlink()
        base = compression.open_base(str(chatty))

        assert base.model.generation_config is None
        [said] = answer(base.model, base.tokenizer, ["Q"], new_tokens=9)
        assert Answer(" Paris assistant It", 5, "end") == said

    @pytest.mark.parametrize("ends", ["</s>", [0, "1"], -1, [True]])
    def test_end_tokens_that_are_no_ids_are_refused(self, chatty, ends):
        rewrite(chatty / "generation_config.json", eos_token_id=ends)

        with pytest.raises(CheckpointError, match=says("generation_config.json", "must be a token id or a list")):
            compression.open_base(str(chatty))


class TestThinking:
    @pytest.mark.parametrize("pair", THINKING.items(), ids=lambda pair: pair[0])
    def test_text_up_to_the_end_of_thinking_is_no_answer(self, pair):
        first, last = pair
        assert (f"{first}hm{last}", "Paris", True) == parts(f"{first}hm{last}Paris")
        assert (f"hm{last}", "Paris", True) == parts(f"hm{last}Paris", begun=True)
        assert (f"hm{last}", "Paris", True) == parts(f"hm{last}Paris")  # a template that wrote the first mark alone
        assert (f"{first}hm", "", False) == parts(f"{first}hm")
        assert ("hm", "", False) == parts("hm", begun=True)
        assert (f"{first}a{last}{first}b{last}", "c", True) == parts(f"{first}a{last}{first}b{last}c")
        assert (f"{first}b", "a", False) == parts(f"a{first}b")
        assert ("", "Paris", True) == parts("Paris")
        assert begun(f"Where?{first}\n")
        assert not begun(f"Where?{first}{last}")

    @given(st.lists(st.sampled_from(["a", "\n", " ", "<", "think", *MARKS[:4]]), max_size=12),
           st.lists(st.integers(1, 5), max_size=40), st.booleans())  # fmt: skip
    def test_a_stop_ends_an_answer_and_no_thinking_however_the_text_comes(self, pieces, cuts, begun):
        text = "".join(pieces)
        follower, at = Answering(("\n", "aa"), begun=begun), 0
        stopped = None
        for width in [*cuts, len(text)]:
            if at < len(text) and stopped is None and follower.stopped(text[at : at + width]):
                stopped = text[: at + width]
            at += width

        seen = text if stopped is None else stopped
        thinking, at, hits = begun, 0, False
        while at < len(seen):  # letter by letter
            mark = next((m for m in (THINKING.values() if thinking else THINKING) if seen.startswith(m, at)), None)
            hits = hits or (not thinking and any(seen.startswith(stop, at) for stop in ("\n", "aa")))
            thinking, at = (not thinking, at + len(mark)) if mark else (thinking, at + 1)
        assert hits == (stopped is not None)

    def asking(self, words, chain, special=(), **config):
        tokenizer = words_tokenizer(*words, special=special)
        tokenizer.chat_template = (
            "{% for m in messages %}user {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}assistant "
            "{% if enable_thinking is false %}<think> </think> {% endif %}{% endif %}"
        )
        return writing(chain, len(words), eos_token_id=0, **config), tokenizer

    words = ("<eos>", "user", "assistant", "<think>", "hm", "Question:", "</think>", "Paris")

    @pytest.mark.parametrize("special", [(), ("<think>", "</think>")], ids=["text", "special"])
    def test_a_thinking_model_is_asked_not_to_and_what_it_thinks_all_the_same_is_cut(self, special):
        model, tokenizer = self.asking(self.words, [2, 3, 4, 5, 6, 7, 0], special)

        quiet, loud = (prompt("Where?", ["Paris"], "plain", tokenizer, {"enable_thinking": on}) for on in (False, True))

        assert quiet == prompt("Where?", ["Paris"], "plain", tokenizer)
        assert quiet == loud + "<think> </think> "
        said = ask(model, tokenizer, [quiet, loud], form="plain", new_tokens=16)
        assert ["Paris", "Paris"] == [each.text for each in said]
        assert ["", "<think> hm Question: </think>"] == [each.thought.strip() for each in said]
        assert 1.0 == squad_f1(said[1].text, ["Paris"])
        assert "1 of 2 answers came with thinking: it was cut" == thinking_in(said).remark

    def test_thinking_without_an_end_is_no_answer_and_is_counted(self):
        model, tokenizer = self.asking(self.words, [2, 3, 4, 4])

        scorer = Scorer(model, tokenizer)
        asked = {"until": ["\n"], "max_gen_toks": 9, "do_sample": False}
        found = scorer.generate_until([Instance("g", {}, ("user assistant", asked), 0)])

        assert [""] == [each.strip() for each in found]
        remark = "1 of 1 answers came with thinking, which 1 never ended: it was cut"
        assert remark == scorer.thinking.remark
        reading = TaskReading(task=SUITE["gsm8k"], data="d", values=(0.0,), hashes=("a",), thinking=remark)
        assert remark == reading.remark

    def test_a_local_judge_that_never_ends_thinking_is_said_to(self, tmp_path):
        model, tokenizer = self.asking(self.words, [6, 3, 4, 4], max_position_embeddings=512)
        model.save_pretrained(tmp_path / "judge")
        tokenizer.save_pretrained(tmp_path / "judge")

        with pytest.raises(JudgeError, match=says("local:judge", "still thinking after 256 tokens")):
            LocalJudge(str(tmp_path / "judge")).write("user")
