# ruff: noqa: F811 - fixtures of another file
"""Perplexity against a slow, obvious reference: one window at a time, all logits, cross-entropy by hand."""

import json
import math
import os
import sys
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from bytewise_llama import TEXTS, VOCABULARY, data, data_of, model, tokenizer  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st
from processes import completed

from bench.data.sources import open_data
from bench.errors import DataError, MetricError, OptionError
from bench.measure import perplexity as module
from bench.measure.perplexity import perplexity
from bench.measure.perplexity_windows import PerplexityProtocol, samples_of, spread, windows
from bench.results.row import Input

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A model this small only loses time when its threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def read(model, tokenizer, data, **settings):
    return perplexity(model, tokenizer, data, PerplexityProtocol(**settings), device="cpu")


def reference_nll(model, ids, first_scored=1):
    """Nats of ids[first_scored:], from the whole logits of one sequence."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    return sum(-torch.log_softmax(logits[t - 1], 0)[ids[t]].item() for t in range(first_scored, len(ids)))


def check_windows(cut, n_tokens, length, stride):
    """The law of `windows`, as assertions."""
    found = cut(n_tokens, length, stride)
    scored = [t for w in found for t in range(w.first_scored, w.end)]
    unscored = {0} if stride < length else {w.begin for w in found} | set(range(0, n_tokens, length))

    assert scored == sorted(set(range(n_tokens)) - unscored)
    for w in found:
        assert 2 <= w.end - w.begin <= length
        assert w.begin < w.first_scored < w.end
        assert w.begin == 0 or stride == length or w.first_scored - w.begin >= length - stride


@st.composite
def cuts(draw):
    length = draw(st.integers(2, 40))
    return draw(st.integers(0, 300)), length, draw(st.integers(1, length))


@given(cuts())
def test_every_token_is_scored_once_and_with_context(cut):
    check_windows(windows, *cut)


BROKEN_CUTS = {
    "scored-twice": lambda n, length, stride: [
        w._replace(first_scored=w.begin + 1) for w in windows(n, length, stride)
    ],
    "tail-forgotten": lambda n, length, stride: [w for w in windows(n, length, stride) if w.end - w.begin == length],
    "no-context": lambda n, length, stride: windows(n, stride, stride),
}


@pytest.mark.parametrize("broken", BROKEN_CUTS.values(), ids=BROKEN_CUTS)
def test_the_law_of_windows_catches_a_broken_cut(broken):
    with pytest.raises(AssertionError):
        check_windows(broken, 101, 16, 8)


@pytest.mark.parametrize("stride", [0, -1, 5])
def test_a_stride_that_would_leave_tokens_out_is_refused(stride):
    with pytest.raises(OptionError, match="from 1 to the window length"):
        windows(10, 4, stride)


@given(st.integers(1, 5000), st.integers(1, 200))
def test_spread_positions_are_distinct_sorted_and_as_many_as_can_be(count, samples):
    found = spread(count, samples)

    assert len(found) == min(count, samples)
    assert found == sorted(set(found))
    assert found[0] == 0 and found[-1] < count


@pytest.mark.parametrize("stride", [None, 32, 24, 1])
def test_windows_of_the_joined_text_score_as_one_by_one(model, tokenizer, data, stride):
    reading = read(model, tokenizer, data, samples=9, length=32, stride=stride)

    ids = tokenizer("\n\n".join(TEXTS), add_special_tokens=False)["input_ids"]
    whole = windows(len(ids), 32, stride)
    parts = [whole[place] for place in spread(len(whole), 9)]
    expected = [reference_nll(model, ids[w.begin : w.end], w.first_scored - w.begin) for w in parts]
    tokens = [w.end - w.first_scored for w in parts]
    assert reading.nll == pytest.approx(sum(expected), rel=1e-5)
    assert reading.tokens == sum(tokens)
    assert reading.perplexity == pytest.approx(math.exp(sum(expected) / sum(tokens)), rel=1e-5)
    assert reading.sample_means == pytest.approx([nll / n for nll, n in zip(expected, tokens, strict=True)], rel=1e-5)


def test_a_perplexity_that_forgets_to_shift_the_labels_is_another_number(model, tokenizer, data):
    reading = read(model, tokenizer, data, samples=3, length=32)

    ids = tokenizer("\n\n".join(TEXTS), add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(ids[:96]).view(3, 32)).logits
    unshifted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(ids[:96])).item()
    assert abs(unshifted - reading.mean_nll) > 0.01


def test_a_model_without_a_preference_has_the_size_of_its_vocabulary_as_perplexity(model, tokenizer, data):
    indifferent = deepcopy(model)
    torch.nn.init.zeros_(indifferent.lm_head.weight)

    assert read(indifferent, tokenizer, data, samples=5, length=16).perplexity == pytest.approx(VOCABULARY, rel=1e-6)


def test_protocol_e_scores_rows_spread_over_the_split_each_alone(model, tokenizer, tmp_path):
    texts = ["", " a heading \n", *TEXTS, "  \n", *TEXTS]
    reading = read(model, tokenizer, data_of(tmp_path, texts), name="e", samples=21, length=100)

    rows = [text for i in spread(len(texts), 21) if len(text := texts[i].strip()) > 10]
    ids = [tokenizer(row)["input_ids"][:100] for row in rows]
    assert ids[0][0] == tokenizer.bos_token_id
    assert len(reading.sample_means) == len(rows) < 21
    assert reading.tokens == sum(len(row) - 1 for row in ids)
    assert reading.perplexity == pytest.approx(
        math.exp(sum(reference_nll(model, row) for row in ids) / reading.tokens), rel=1e-5
    )
    assert reading.truncated == sum(len(row) + 1 > 100 for row in rows) > 0


def test_protocol_e_with_a_stride_goes_on_where_a_row_is_longer(model, tokenizer, data):
    reading = read(model, tokenizer, data, name="e", samples=4, length=60, stride=60)

    assert reading.truncated == 0
    ids = [tokenizer(TEXTS[i].strip())["input_ids"] for i in spread(len(TEXTS), 4)]
    expected = sum(reference_nll(model, row[at : at + 60]) for row in ids for at in range(0, len(row), 60))
    assert reading.nll == pytest.approx(expected, rel=1e-5)


CHATS = [
    [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": "Yes, indeed. " * (1 + 3 * i)}]
    for i in range(6)
]


@pytest.mark.parametrize(
    ("template", "line"),
    [(None, "{role}: {content}"), (TEMPLATE, "<{role}>{content}")],
    ids=["plain", "template"],
)
def test_protocol_o_averages_the_means_of_whole_conversations(model, tokenizer, tmp_path, monkeypatch, template, line):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    reading = read(model, tokenizer, data_of(tmp_path, TEXTS, CHATS), name="o", samples=4)

    means = []
    for i in spread(6, 4):
        text = "\n".join(line.format(**message) for message in CHATS[i]) + ("\n" if template else "")
        ids = tokenizer(text, add_special_tokens=template is None)["input_ids"]
        means.append(reference_nll(model, ids) / (len(ids) - 1))
    assert reading.sample_means == pytest.approx(means, rel=1e-5)
    assert reading.perplexity == pytest.approx(math.exp(sum(means) / 4), rel=1e-5)
    assert reading.perplexity != pytest.approx(math.exp(reading.nll / reading.tokens), rel=1e-5)


def test_a_conversation_the_template_refuses_is_named(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")

    with pytest.raises(DataError, match=r"conversation 0 .*roles must alternate"):
        read(model, tokenizer, data_of(tmp_path, TEXTS, CHATS), name="o")


@pytest.mark.parametrize("name", ["default", "e"])
@pytest.mark.parametrize("batch_size", [2, 7, 100])
def test_the_score_does_not_depend_on_the_batch(model, tokenizer, data, name, batch_size):
    alone = read(model, tokenizer, data, name=name, samples=20, length=64, batch_size=1)
    together = read(model, tokenizer, data, name=name, samples=20, length=64, batch_size=batch_size)

    assert together.sample_means == pytest.approx(alone.sample_means, rel=1e-5)
    assert (alone.batch_size, together.batch_size) == (1, min(batch_size, 20))


def test_the_batch_fits_the_token_budget(model, tokenizer, data):
    protocol = PerplexityProtocol(samples=20, length=64)

    assert perplexity(model, tokenizer, data, protocol, device="cpu", token_budget=256).batch_size == 4
    assert perplexity(model, tokenizer, data, protocol, device="cpu", token_budget=1).batch_size == 1


@pytest.mark.parametrize(
    ("tokens", "elements", "largest"), [(50, 2**25, 50), (1024, 30 * VOCABULARY, 30), (1024, 1, 1)]
)
def test_logits_exist_only_for_one_chunk_of_positions(model, tokenizer, data, monkeypatch, tokens, elements, largest):
    whole = read(model, tokenizer, data, samples=4, length=64)
    monkeypatch.setattr(module, "CHUNK_TOKENS", tokens)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", elements)
    rows = []
    hook = model.lm_head.register_forward_hook(lambda _, __, out: rows.append(out.numel() // VOCABULARY))
    try:
        chunked = read(model, tokenizer, data, samples=4, length=64)
    finally:
        hook.remove()

    assert (max(rows), sum(rows)) == (largest, chunked.tokens)
    assert chunked.nll == pytest.approx(whole.nll, rel=1e-6)


def test_a_loss_that_is_not_finite_names_the_sample(model, tokenizer, tmp_path):
    broken = deepcopy(model)
    broken.model.embed_tokens.weight.data[tokenizer.convert_tokens_to_ids("Z")] = math.nan
    data = data_of(tmp_path, ["a plain row of text", "a row with a Z in it", "another plain row"])

    with pytest.raises(MetricError, match=r"sample 2 of 3 \(row 1\) is nan"):
        read(broken, tokenizer, data, name="e")


def test_a_perplexity_beyond_a_float_is_an_error(model, tokenizer, data):
    reading = read(model, tokenizer, data, samples=1, length=16)

    with pytest.raises(MetricError, match="beyond a float"):
        _ = replace(reading, nll=1e6, tokens=10).perplexity


def test_a_model_in_training_mode_is_refused(model, tokenizer, data, monkeypatch):
    monkeypatch.setattr(model, "training", True)

    with pytest.raises(MetricError, match="training mode"):
        read(model, tokenizer, data)


@pytest.mark.parametrize("name", ["default", "e"])
def test_data_too_short_says_how_much_there_is_and_what_is_needed(model, tokenizer, tmp_path, name):
    with pytest.raises(DataError, match=r"sha256 .*(has 6 tokens; one window needs 512|no row of 2 tokens)"):
        read(model, tokenizer, data_of(tmp_path, ["short."]), name=name)


def test_the_tokenizer_of_a_larger_vocabulary_is_refused(model, tokenizer, data, monkeypatch):
    monkeypatch.setattr(model.config, "vocab_size", 20)

    with pytest.raises(DataError, match="the model has a vocabulary of 20"):
        read(model, tokenizer, data)


def test_a_window_longer_than_the_context_of_the_model_is_refused(model, tokenizer, data):
    with pytest.raises(OptionError, match="length=2048 exceeds the 1024 positions"):
        read(model, tokenizer, data, length=2048)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "f"}, "must be one of default, e, o, not 'f'"),
        ({"samples": 0}, "samples must be at least 1, not 0"),
        ({"length": 1}, "length must be at least 2, not 1"),
        ({"stride": 600}, "stride must be at most 512, not 600"),
        ({"name": "o", "stride": 8}, "must be left out"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
    ],
)
def test_a_protocol_that_cannot_be_is_refused(settings, words):
    with pytest.raises(OptionError, match=words):
        PerplexityProtocol(**settings)


def test_the_row_records_what_was_scored_not_what_was_asked_for(model, tokenizer, data, tmp_path):
    reading = read(model, tokenizer, data, samples=1000, length=500)

    tokens = len("\n\n".join(TEXTS))
    expected = {"protocol": "default", "data": data.digest[:12], "split": "test", "length": 500, "stride": 500}
    assert reading.params == {**expected, "samples": math.ceil(tokens / 500), "batch": 4}
    assert reading.digest == data.digest
    assert {"data": Input(tmp_path.name, data.digest)} == reading.inputs
    assert json.loads(json.dumps(reading.params)) == reading.params


def test_bits_per_byte_counts_the_bytes_of_the_scored_text(model, tokenizer, tmp_path):
    text = "Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich."
    reading = read(model, tokenizer, data_of(tmp_path, [text]), name="e")

    assert reading.bits_per_byte == pytest.approx(reading.nll / math.log(2) / len(text.encode()))


def test_bits_per_byte_are_left_out_where_a_window_cuts_a_character(model, tokenizer, tmp_path):
    data = data_of(tmp_path, ["x" + "ä" * 100])

    assert [
        sample.n_bytes for sample in samples_of(tokenizer, data, PerplexityProtocol(length=50, samples=2), context=1024)
    ] == [None, None]
    assert read(model, tokenizer, data, length=50, samples=2).bits_per_byte is None


class WithoutOffsets:
    """A tokenizer in Python, as some checkpoints still have: it cannot tell which characters a token stands for."""

    is_fast = False

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, text, *, return_offsets_mapping, **settings):
        assert not return_offsets_mapping
        return {"input_ids": self.tokenizer(text, **settings)["input_ids"]}


def test_a_tokenizer_without_offsets_gives_the_same_score_without_bits_per_byte(model, tokenizer, data):
    fast = read(model, tokenizer, data, samples=2, length=32)
    slow = read(model, WithoutOffsets(tokenizer), data, samples=2, length=32)

    assert (slow.nll, slow.bits_per_byte) == (fast.nll, None)


def test_progress_reaches_the_number_of_samples(model, tokenizer, data):
    seen = []
    protocol = PerplexityProtocol(samples=7, length=32, batch_size=3)
    perplexity(model, tokenizer, data, protocol, device="cpu", progress=lambda done, total: seen.append((done, total)))

    assert seen == [(3, 7), (6, 7), (7, 7)]


def test_the_embedded_reference_data_can_be_scored(model, tokenizer):
    reading = read(model, tokenizer, open_data(None, base="reference"), samples=2, length=64)

    assert (reading.data, len(reading.sample_means)) == ("embedded", 2)


def test_importing_the_metric_imports_neither_torch_nor_transformers():
    code = (
        "import sys, bench.metrics.perplexity; print(sorted(set(sys.modules) & {'torch', 'transformers', 'datasets'}))"
    )

    assert completed([sys.executable, "-c", code], check=True).stdout == "[]\n"


@pytest.mark.parametrize("name", ["default", "e"])
def test_wikitext_of_the_shared_folder_is_scored_under_its_own_name(model, tokenizer, name):
    if "BENCH_DATA" not in os.environ:
        pytest.skip("BENCH_DATA is not set: point it at a folder that holds wikitext-2/")
    data = open_data(os.environ["BENCH_DATA"], base="some/model")
    reading = read(model, tokenizer, data, name=name, samples=5)

    assert "wikitext-2 (tokenised)" == reading.inputs["data"].name
    assert math.isfinite(reading.perplexity)
