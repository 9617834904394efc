"""RAG from the files to the answers: collections that are refused, questions that fail, the command."""

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import says
from commands import FILES, pytest_bench
from hypothesis import given
from hypothesis import strategies as st

from bench.data.collections.chunking import Chunking
from bench.data.collections.collection import Collection, Document, Question, spread
from bench.data.collections.readers import embedded, open_collection
from bench.errors import DataError, NotAvailable, OptionError
from bench.gate.digest import sign
from bench.measure.rag import readings, robustness
from bench.measure.rag.pipeline import Asked, Setup, retrieve
from bench.measure.rag.prompts import ask, check_lengths, prompt
from compression.errors import install_command

pytest_plugins = ["pytester"]

TESTS = FILES / "test_rag.py"
SQUAD = {"data": [{"title": "t", "paragraphs": [
    {"context": "The fox is red. It lives in a den.", "qas": [
        {"id": "1", "question": "Which colour has the fox?", "answers": [{"text": "red", "answer_start": 11}]},
        {"id": "2", "question": "Where does the owl live?", "answers": [], "is_impossible": True}]},
    {"context": "The owl is grey.", "qas": [
        {"id": "3", "question": "Which colour has the owl?", "answers": [{"text": "grey", "answer_start": 11}]}]},
]}]}  # fmt: skip


def document(name, text="Some text."):
    return Document(id=name, text=text)


def question(name, text="What?", answers=("that",), **more):
    return Question(id=name, text=text, answers=answers, **more)


@pytest.mark.parametrize(
    ("documents", "questions", "words"),
    [
        ([], [question("1")], ["its 0 documents contain no text"]),
        ([document("a", "  ")], [question("1")], ["its 1 documents contain no text"]),
        ([document("a")], [], ["has no questions"]),
        ([document("a"), document("a")], [question("1")], ["documents share an id", "'a'"]),
        ([document("a")], [question("1"), question("1")], ["questions share an id", "'1'"]),
        ([document("a")], [question("1", answers=())], ["'1' have no answer", "is_impossible"]),
        ([document("a")], [question("1", answers=(" ",))], ["'1' have no answer"]),
        ([document("a")], [question("1", text=" ")], ["text of the questions '1' is empty"]),
        ([document("a")], [question("1", gains={"b": 1})], ["judged on the documents 'b'", "the 1 there are"]),
        ([document("a")], [question("1", gains={"a": 0})], ["gains must be above 0", "'a': 0"]),
    ],
    ids=["nothing", "blank", "no-question", "same-document", "same-question", "no-answer", "blank-answer",
         "blank-question", "unknown-document", "no-gain"],
)  # fmt: skip
def test_a_collection_that_does_not_fit_together_is_refused(documents, questions, words):
    with pytest.raises(DataError, match=says("mine", *words)):
        Collection(name="mine", digest="0", documents=tuple(documents), questions=tuple(questions))


def test_an_unanswerable_question_needs_no_answer():
    one = question("1", answers=(), answerable=False)
    collection = Collection(name="mine", digest="0", documents=(document("a"),), questions=(one,))

    assert collection.questions == (one,)


def written(folder, content, name="set.json"):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", ["not JSON"]),
        ({"questions": []}, ["neither 'data'"]),
        ({"data": [{"paragraphs": [{"qas": []}]}]}, ["not in SQuAD format", "context"]),
        ([{"question": "What?", "answer": "that"}], ["--documents"]),
    ],
    ids=["json", "form", "squad", "documents"],
)
def test_a_file_of_another_form_is_refused(tmp_path, content, words):
    with pytest.raises((DataError, OptionError), match=says("set.json", *words)):
        open_collection(written(tmp_path, content))


def test_an_entry_without_an_answer_is_refused_with_its_number(tmp_path):
    path = written(tmp_path, [{"question": "What?", "answer": "that"}, {"question": "Who?"}])
    (tmp_path / "text.txt").write_text("Some text.")

    with pytest.raises(DataError, match=says("set.json", "entry 2", "'answer'")):
        open_collection(path, tmp_path / "text.txt")


@pytest.mark.parametrize(
    ("path", "documents", "words"),
    [
        ("nowhere.json", None, ["nowhere.json", "does not exist"]),
        (".", None, ["without cran.all.1400"]),
        (None, "texts", ["--documents texts", "embedded"]),
    ],
    ids=["path", "folder", "unused"],
)
def test_a_path_that_cannot_be_is_refused(tmp_path, monkeypatch, path, documents, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError, match=says(*words)):
        open_collection(path, documents)


def cranfield_folder(folder, judgements="1 2 1\n"):
    (folder / "cran.all.1400").write_text(".I 1\n.T\nwings\n.W\nwings of birds\n.I 2\n.W\nengines of jets\n")
    (folder / "cran.qry").write_text(".I 001\n.W\nwhat drives jets\n.I 004\n.W\nwhat do birds have\n")
    (folder / "cranqrel").write_text(judgements)
    return folder


def test_cranfield_counts_its_queries_by_place_and_turns_grades_into_gains(tmp_path):
    collection = open_collection(cranfield_folder(tmp_path, "1 2 -1\n2 1 1\n2 2 4\n"))

    assert [{"2": 4}, {"1": 4, "2": 1}] == [dict(each.gains) for each in collection.questions]
    assert ["wings of birds", "engines of jets"] == [each.text for each in collection.documents]


@pytest.mark.parametrize(
    ("judgements", "words"),
    [
        ("1 2 7\n", ["cranqrel:1", "grade 7"]),
        ("1 2\n", ["cranqrel:1"]),
        ("3 2 1\n", ["judges query 3", "has 2"]),
        ("1 9 1\n", ["documents '9'", "not among the 2"]),
    ],
    ids=["grade", "columns", "query", "document"],
)
def test_judgements_that_cannot_be_are_refused(tmp_path, judgements, words):
    with pytest.raises(DataError, match=says(*words)):
        open_collection(cranfield_folder(tmp_path, judgements))


def test_judgements_alone_have_rankings_and_no_answers(tmp_path):
    collection = open_collection(cranfield_folder(tmp_path, "1 2 1\n2 1 1\n"))
    found = retrieve(Setup(top_k=1), collection=collection)

    ranked = dict(
        zip([each.question.id for each in found.asked], readings.rankings(found, "judged").rankings, strict=True)
    )
    assert {"1": ["2"], "2": ["1"]} == ranked
    for read in (readings.contexts, lambda f: readings.rankings(f, "tokens")):
        with pytest.raises(NotAvailable, match="no answers"):
            read(found)


def test_squad_gives_paragraphs_questions_and_those_without_an_answer(tmp_path):
    collection = open_collection(written(tmp_path, SQUAD))

    assert [True, False, True] == [each.answerable for each in collection.questions]
    assert [{"paragraph-0": 1}, {}, {"paragraph-1": 1}] == [dict(each.gains) for each in collection.questions]
    assert collection.judged


def test_the_embedded_questions_are_each_there_once_and_answered_by_their_manual():
    collection = embedded()
    texts = {each.id: each.text for each in collection.documents}
    asked = [(each.text, *each.gains) for each in collection.questions]

    assert len(set(asked)) == len(asked) > 400
    assert all(each.answers[0] in texts[gold] for each in collection.questions for gold in each.gains)
    assert not any("Q:" in each.text or "A:" in each.text for each in collection.questions)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"retriever": "bm52"}, ["--retriever must be one of bm25, dense, hybrid, not bm52"]),
        ({"retriever": "dense"}, ["needs --encoder"]),
        ({"encoder": "x"}, ["not used by --retriever bm25"]),
        ({"retriever": "dense", "encoder": "x", "index": "qdrant"}, ["--index must be", "qdrant:FOLDER", "not qdrant"]),
        ({"top_k": 0}, ["--top-k must be at least 1, not 0"]),
        ({"seeds": -1}, ["--rag-seeds must be at least 0, not -1"]),
    ],
    ids=["retriever", "no-encoder", "encoder", "index", "top-k", "seeds"],
)
def test_a_setup_that_cannot_be_is_refused(given, words):
    with pytest.raises(OptionError, match=says(*words)):
        Setup(**given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"top_k": 3}, ["--top-k must be from 1 to 2", "not 3"]),
        ({"questions": 4}, ["--num-questions must be from 1 to 3", "not 4"]),
    ],
    ids=["top-k", "questions"],
)
def test_more_than_there_is_cannot_be_asked_for(tmp_path, given, words):
    with pytest.raises(OptionError, match=says(*words)):
        retrieve(Setup(dataset=written(tmp_path, SQUAD), **{"top_k": 1, **given}))


# --- which questions are asked ----------------------------------------------------------------------------------------

places = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=40)


def placed(pairs):
    """Questions of (article, paragraph), named by their place."""
    return [question(str(n), part=(f"article-{a}", f"paragraph-{a}-{p}")) for n, (a, p) in enumerate(pairs)]


@given(places, st.integers(0, 9), st.integers(1, 40), st.randoms())
def test_the_first_questions_of_a_draw_are_spread_over_articles_and_their_paragraphs(pairs, seed, count, random):
    questions = placed(pairs)
    drawn = spread(questions, seed)
    shuffled = list(questions)
    random.shuffle(shuffled)

    assert sorted(map(id, questions)) == sorted(map(id, drawn))
    assert drawn == spread(shuffled, seed)  # the order of the file does not matter
    for depth in (0, 1):  # a part is asked a second time when every other of its whole has been asked, or is used up
        for whole in {each.part[:depth] for each in questions}:
            there = Counter(each.part[: depth + 1] for each in questions if each.part[:depth] == whole)
            asked = Counter(each.part[: depth + 1] for each in drawn[:count] if each.part[:depth] == whole)
            most = max(asked.values(), default=0)
            assert all(asked[part] >= min(most - 1, there[part]) for part in there)


def test_another_seed_draws_other_questions_and_fewer_are_the_first_of_more(tmp_path):
    questions = tuple(placed([(n % 6, n % 4) for n in range(60)]))
    collection = Collection(name="mine", digest="0", documents=(document("a"),), questions=questions)
    drawn = collection.take(20, 0).questions

    assert drawn == collection.take(20, 0).questions != collection.take(20, 1).questions
    assert drawn[:5] == collection.take(5, 0).questions
    assert set(questions) == set(collection.take(None, 0).questions)


def test_the_embedded_questions_are_drawn_already_and_taken_from_their_beginning():
    collection = embedded()

    assert collection.questions[:64] == collection.take(64, 7).questions
    assert 60 <= len({name for each in collection.questions[:64] for name in each.gains})


def test_questions_of_a_squad_file_are_of_all_its_articles_and_the_draw_stands_in_the_key(tmp_path):
    articles = [{"paragraphs": [{"context": f"Text {a}.{p}.", "qas": [
        {"id": f"{a}.{p}.{q}", "question": f"What is {a}.{p}.{q}?", "answers": [{"text": f"{a}.{p}"}]}
        for q in range(3)]} for p in range(3)]} for a in range(8)]  # fmt: skip
    path = written(tmp_path, {"data": articles})
    found = retrieve(Setup(dataset=path, questions=8, top_k=1, seed=3))

    assert [str(n) for n in range(8)] == sorted(each.question.id[0] for each in found.asked)
    assert (3, 8) == (found.params["draw"], found.params["questions"])
    assert found.asked[0].question == retrieve(Setup(dataset=path, questions=4, top_k=1, seed=3)).asked[0].question
    assert retrieve(Setup(questions=4, top_k=1), collection=embedded()).params["draw"] is None


def test_xquad_as_published_is_asked_of_all_its_articles():
    if not os.environ.get("BENCH_DATA"):
        pytest.skip("BENCH_DATA is not set: the folder with xquad-en")
    [path] = (Path(os.environ["BENCH_DATA"]) / "xquad-en").glob("*.json")
    drawn = open_collection(path).take(64, 0).questions

    assert 48 == len({each.part[0] for each in drawn})
    assert 64 == len({each.part[1] for each in drawn})


@pytest.fixture(scope="module")
def base():
    import compression

    return compression.open_base("reference")


@pytest.fixture(scope="module")
def found(base):
    return retrieve(Setup(questions=64, seeds=1), base.tokenizer)


def reader(base, model=None, new_tokens=8):
    return readings.Reader(model=model or base.model, tokenizer=base.tokenizer, device="cpu", new_tokens=new_tokens)


def test_the_reference_reads_its_context_as_it_was_trained_to(base, found):
    first = found.asked[0]
    text = prompt(first.question.text, found.contexts(first), "reference", base.tokenizer)

    assert text.endswith(f"\nQ: {first.question.text}\nA:")
    assert 3 == len(found.contexts(first)) and all(f"{context}\n" in text for context in found.contexts(first))


def test_a_chat_model_is_asked_in_its_template(base):
    class Chat:
        chat_template = "there is one"

        def apply_chat_template(self, messages, **_):
            return f"<user>{messages[0]['content']}<assistant>"

    text = prompt("Which colour?", ["The fox is red."], "plain", Chat())

    assert text.startswith("<user>") and text.endswith("Question: Which colour?<assistant>")
    assert "The fox is red." in text and "unanswerable" in text
    assert "Context" not in prompt("Which colour?", [], "plain", Chat())


def test_the_reference_answers_with_retrieval_and_not_without_and_two_bits_break_it(base, found):
    import compression
    from bench.metrics.rag_answers import f1, no_rag_f1

    plain = readings.replies(found, reader(base), "greedy", {})
    broken = compression.compress(base, "rtn(bits=2)").model
    damaged = readings.replies(replace(found, asked=found.asked[:24]), reader(base, broken), "greedy", {})

    assert f1(plain) >= 0.7
    assert no_rag_f1(plain) < 0.2
    assert f1(damaged) <= f1(plain) - 0.2


def test_a_question_that_is_too_long_fails_alone(base):
    texts = ["Q: Which price has the Amber Falcon?\nA:", "Q: " + "red " * 2100, "Q: Which colour has it?\nA:"]
    alone = ask(base.model, base.tokenizer, [texts[0]], form="reference", new_tokens=4)
    said = ask(base.model, base.tokenizer, texts, form="reference", new_tokens=4)

    assert [False, True, False] == [bool(each.error) for each in said]
    assert alone[0] == said[0]
    assert "2048 positions" in said[1].error


def test_where_every_question_fails_the_measurement_does(base):
    with pytest.raises(OptionError, match=says("2048 positions")):
        ask(base.model, base.tokenizer, ["red " * 2100] * 2, form="reference", new_tokens=4)


def test_a_failed_search_keeps_its_error_and_its_question_is_not_answered(base, found):
    asked = [Asked(question=found.asked[0].question, error="DataError: the database is down"), found.asked[1]]
    said = reader(base).answers(found, asked, rag=True, decoding="greedy", seed=0)

    assert ["DataError: the database is down", None] == [each.error for each in said]
    assert said[1].text


def test_a_chunk_longer_than_the_context_is_refused_by_name(base, found):
    with pytest.raises(DataError, match=says("a chunk of document 'test-", "positions", "--chunk-size")):
        check_lengths(found, base.tokenizer, positions=40, new_tokens=16)
    check_lengths(found, base.tokenizer, positions=2048, new_tokens=16)


def test_sampled_answers_have_a_seed_each_and_come_again(base, found):
    few = replace(found, setup=Setup(seeds=2), asked=found.asked[:4])
    one, two = (readings.replies(few, reader(base), "sampled", {}) for _ in range(2))

    assert one == two
    assert {2} == {len(each.rag) for each in one.replies} | {len(each.bare) for each in one.replies}


@pytest.mark.parametrize(
    ("gold", "expected"),
    [("start", [0, 1, 2, 3, 4]), ("middle", [1, 2, 0, 3, 4]), ("end", [1, 2, 3, 4, 0])],
)
def test_the_right_chunk_stands_where_it_is_asked_to(gold, expected):
    assert expected == robustness.around(0, [1, 2, 3, 4], gold)


def test_distractors_are_of_other_documents_and_the_right_chunk_holds_the_answer(found):
    for asked in found.asked:
        right = robustness.right_chunk(found, asked)
        assert asked.question.answers[0] in found.chunks[right].text
        assert not {found.chunks[n].document for n in robustness.others(found, asked)} & set(asked.question.gains)


def test_the_reference_never_says_that_there_is_no_answer(base, found):
    from bench.metrics.rag_robustness import abstained, unanswerable_f1

    reading = robustness.unanswerable(found, reader(base))

    assert abstained(reading) == 0.0
    assert unanswerable_f1(reading) < 0.3
    assert 32 == len(reading.without) == len(reading.having)


def test_a_distractor_costs_the_reference_answers(base, found):
    from bench.metrics.rag_robustness import distracted_f1

    alone, beside = (robustness.distracted(found, reader(base), *place) for place in ((0, "only"), (4, "middle")))

    assert distracted_f1(alone) > distracted_f1(beside)
    assert sum(alone.context_tokens) < sum(beside.context_tokens)


@pytest.mark.filterwarnings("ignore")
def test_bertscore_is_computed_with_a_local_encoder_and_said_to_be_missing_without(base, found, tmp_path):
    few = replace(found, setup=Setup(bertscore=str(tmp_path / "bert")), asked=found.asked[:3])
    said = readings.replies(few, reader(base), "greedy", {})
    with pytest.raises(NotAvailable, match=says("no encoder is set", "--bertscore-encoder")):
        readings.similarities(found, said, "cpu")
    pytest.importorskip("bert_score", reason=f"bert-score is not installed: {install_command('rag')}")
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=1024, max_position_embeddings=2048, **sizes)
    BertModel(config).save_pretrained(tmp_path / "bert")
    base.tokenizer.save_pretrained(tmp_path / "bert")
    reading = readings.similarities(few, said, "cpu")

    assert 3 == len(reading.values)
    for value, one in zip(reading.values, said.replies, strict=True):
        assert value <= 1 + 1e-4
        if one.rag[0].text == one.truths[0]:
            assert value == pytest.approx(1, abs=1e-4)


QUICK = ("--num-questions", "4", "--rag-seeds", "2", "--max-new-tokens", "6", "--runs", "2")


@pytest.fixture
def run(imported, pytester):
    """Run the benchmarks of RAG in a repository of somebody else's."""

    def call(*arguments, tests=TESTS):
        return pytest_bench(pytester, tests, *arguments)

    return call


def test_the_command_fills_the_tables_and_saves_every_answer(run, pytester):
    result = run(
        "--model",
        "nf4",
        *QUICK,
        "-v",
        "--save-detailed-responses",
        "said.jsonl",
        "-k",
        "not start and not end and not middle",
    )
    output = result.stdout.str()
    saved = [json.loads(line) for line in (pytester.path / "said.jsonl").read_text().splitlines()]

    result.assert_outcomes(passed=8, deselected=6)
    for number in range(26, 31):
        assert f"Table E{number}" in output
    assert "no encoder is set" in output
    assert 2 * 2 * 4 == len(saved)  # recipes, ways of decoding, questions
    assert {"recipe", "question", "answers", "chunks", "rag", "no_rag", "decoding"} <= saved[0].keys()
    assert [1, 2] == sorted({len(line["rag"]) for line in saved})
    assert all(chunk["document"].startswith("test-") for line in saved for chunk in line["chunks"])


def test_a_recorded_run_passes_and_a_changed_context_fails_with_words(run, pytester):
    tests = f"{TESTS}::test_context"
    run("--model", "fp16", *QUICK, "--update-baselines", tests=tests).assert_outcomes(passed=1)
    run("--model", "fp16", *QUICK, tests=tests).assert_outcomes(passed=1)
    [path] = (pytester.path / "baselines" / "reference").glob("fp16*.json")
    baseline = json.loads(path.read_text())
    [key] = [key for key in baseline["rows"] if key.startswith("rag.context_sufficiency")]
    baseline["rows"][key]["value"] = 1.5
    path.write_text(json.dumps(baseline))
    sign(path)
    result = run("--model", "fp16", *QUICK, tests=tests)

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*rag.context_sufficiency*regressed*1.5*"])


def test_without_comparison_the_cells_say_so(run):
    result = run("--model", "fp16", *QUICK, "--compare-no-rag", "no", "-k", "greedy or speed")

    result.assert_outcomes(passed=2, deselected=12)
    assert "--compare-no-rag no: no answers without context" in result.stdout.str()


def test_a_question_that_fails_is_counted_and_the_run_goes_on(run, pytester):
    paragraph = SQUAD["data"][0]["paragraphs"][0] | {"qas": [
        {"id": "long", "question": "Is it red" + ", red" * 1500 + "?", "answers": [{"text": "red"}]},
        {"id": "short", "question": "Is it red?", "answers": [{"text": "red"}]}]}  # fmt: skip
    written(pytester.path, {"data": [{"paragraphs": [paragraph]}]})
    arguments = ("--dataset-path", "set.json", "--top-k", "1", "--max-new-tokens", "4", "--rag-seeds", "0")
    result = run("--model", "fp16", *arguments, "-k", "greedy", "--save-detailed-responses", "said.jsonl")
    saved = {line["id"]: line for line in map(json.loads, (pytester.path / "said.jsonl").read_text().splitlines())}

    result.assert_outcomes(passed=1, deselected=13)
    result.stdout.fnmatch_lines(["*failed_questions*questions) * 1"])
    assert "positions" in saved["long"]["rag"][0]["error"]
    assert saved["short"]["rag"][0]["error"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--top-k", "5000"), "--top-k must be from 1 to"),
        (("--num-questions", "0"), "--num-questions must be from 1 to"),
        (("--chunk-size", "0"), "--chunk-size must be at least 1, not 0"),
        (("--dataset-path", "nowhere"), "--dataset-path nowhere does not exist"),
        (("--retriever", "hybrid"), "--retriever hybrid needs --encoder"),
    ],
    ids=["top-k", "questions", "chunk-size", "path", "encoder"],
)
def test_what_cannot_be_is_said_before_anything_is_compressed(run, pytester, arguments, words):
    result = run("--model", "fp16", *arguments)

    assert pytest.ExitCode.USAGE_ERROR == result.ret
    result.stderr.fnmatch_lines([f"*{words}*"])
    assert not (pytester.path / ".bench" / "journal.jsonl").exists() or not os.path.getsize(
        pytester.path / ".bench" / "journal.jsonl"
    )


def test_chunking_can_be_asked_for(run):
    result = run("--model", "fp16", *QUICK, "--chunking", "documents", "-k", "judged")

    result.assert_outcomes(passed=1, deselected=13)
    assert "bm25-top3-documents" in result.stdout.str().replace("\n", "")
    assert Chunking(by="documents").text == "documents"
