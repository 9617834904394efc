"""From a collection to the context of each question: computed once, because no recipe changes it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.data.collections import chunking
from bench.data.collections.chunking import Chunk, Chunking
from bench.data.collections.collection import Collection, Question
from bench.data.collections.readers import open_collection
from bench.data.scripts import token_spans as token_spans_of_words
from bench.errors import BenchError, DataError, OptionError
from bench.measure.rag import vectors
from bench.measure.rag.encoders import Encoder, content_name, model_read
from bench.measure.rag.overlap import share, tokens
from bench.measure.rag.retrieval import BM25, Dense, Hit, Hybrid, Retriever, checked
from compression.files.strict_json import at_least

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DEPTH = 1000  # places of a ranking that IR measures look at
QUESTIONS = 64  # asked of a set that has more; [E] asks 10
RELEVANT = 0.3  # share of the answer's tokens that makes a chunk relevant ([E], table 9)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is retrieved, and how; [E], tables 9, 11 and 13, where it says. Raises OptionError for what cannot be.

    Attributes:
        dataset, documents: see `readers.open_collection`.
        questions: so many of them, spread over the set; None is 64, or all of an IR set.
        seed: of the draw of questions.
        encoder: model of sentence-transformers, needed by the retrievers "dense" and "hybrid".
        threshold: least score of a chunk; None is that of the retriever.
        chunking: None is that of the collection.
        compare: also answer without a context.
        seeds: so many samples of every answer, beside the greedy one; 0 for none.
        responses: file that every answer is appended to as a line of JSON; None for none.
        bertscore: folder or hub id of the encoder of BERTScore.
    """

    dataset: str | None = None
    documents: str | None = None
    questions: int | None = None
    seed: int = 0
    retriever: str = "bm25"
    encoder: str | None = None
    index: str = "exact"
    top_k: int = 3
    threshold: float | None = None
    chunking: Chunking | None = None
    compare: bool = True
    seeds: int = 3
    responses: Path | None = None
    bertscore: str | None = None

    def __post_init__(self) -> None:
        checked(self.retriever)
        vectors.check(self.index)
        if self.retriever != "bm25" and not self.encoder:
            raise OptionError(
                f"--retriever {self.retriever} needs --encoder: a folder or hub id for sentence-transformers"
            )
        if self.retriever == "bm25" and (self.encoder or self.index != "exact"):
            raise OptionError(
                "--encoder and --index are not used by --retriever bm25; give --retriever dense or hybrid"
            )
        for name, value, least in (("--top-k", self.top_k, 1), ("--rag-seeds", self.seeds, 0)):
            at_least(name, value, least, OptionError)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question and what was found for it.

    Attributes:
        hits: the chunks that make its context, best first.
        ranking: chunks, best first, `DEPTH` deep, whatever their score.
        seconds: of the search for the context, one query at a time.
        error: why retrieval failed, in words.
    """

    question: Question
    hits: tuple[Hit, ...] = ()
    ranking: tuple[int, ...] = ()
    seconds: float = 0.0
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Retrieved:
    """A collection, its chunks, and what was found for each question."""

    setup: Setup
    collection: Collection
    chunking: Chunking
    chunks: tuple[Chunk, ...]
    asked: tuple[Asked, ...]

    def contexts(self, asked: Asked) -> list[str]:
        """The texts of a question's context, best first."""
        return [self.chunks[hit.chunk].text for hit in asked.hits]

    def documents(self, asked: Asked) -> list[str]:
        """The ranking as different documents, each at the place of its best chunk."""
        return list(dict.fromkeys(self.chunks[chunk].document for chunk in asked.ranking))

    @property
    def answerable(self) -> tuple[Asked, ...]:
        """The questions that have an answer, those whose search failed included."""
        return tuple(asked for asked in self.asked if asked.question.answerable)

    @cached_property
    def params(self) -> dict[str, Any]:
        """What belongs to the key of every row: texts, numbers, and inputs (`bench.results.row.Input`)."""
        setup = self.setup
        how = [setup.retriever, f"top{setup.top_k}", self.chunking.text]
        if setup.encoder:
            how += [setup.index.partition(":")[0]]
        if setup.threshold is not None:
            how += [f"above{setup.threshold:g}"]
        encoder = setup.encoder and model_read(setup.encoder)
        return {
            "data": self.collection.read,
            "questions": len(self.asked),
            "retrieval": "-".join(how),
            "encoder": encoder,
            "draw": None if self.collection.drawn else setup.seed,
        }


def token_spans(tokenizer: "PreTrainedTokenizerFast | None") -> chunking.Tokenize:
    """Tokens of a tokenizer as characters begin:end; words where there is none."""
    if tokenizer is None:
        return token_spans_of_words

    def spans(text: str) -> list[chunking.Span]:
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return found["offset_mapping"]

    return spans


def chunks_of(collection: Collection, how: Chunking, tokenize: chunking.Tokenize) -> tuple[Chunk, ...]:
    """All chunks of a collection in order."""
    return tuple(
        chunk for document in collection.documents for chunk in chunking.cut(document.id, document.text, how, tokenize)
    )


def retriever_of(setup: Setup, texts: Sequence[str], *, device: str = "cpu", cache: Path | None = None) -> Retriever:
    """The retriever of a setup over texts; what is built is kept in `cache` by content."""

    def bm25(threshold: float | None) -> BM25:
        import bm25s

        name = content_name("bm25", bm25s.__version__, *texts)
        return BM25(texts, folder=cache / name if cache else None, threshold=threshold)

    if setup.retriever == "bm25":
        return bm25(setup.threshold)
    assert setup.encoder is not None
    encoder = Encoder(setup.encoder, device=device, cache=cache)
    name = content_name("chunks", encoder.digest, *texts)
    dense = setup.threshold if setup.retriever == "dense" else None
    found = Dense(encoder, vectors.index_of(setup.index, encoder.documents(texts), name), threshold=dense)
    return found if setup.retriever == "dense" else Hybrid([bm25(None), found], threshold=setup.threshold)


def retrieve(
    setup: Setup,
    tokenizer: "PreTrainedTokenizerFast | None" = None,
    *,
    device: str = "cpu",
    cache: Path | None = None,
    collection: Collection | None = None,
) -> Retrieved:
    """Cut, index and search.

    A question whose search fails keeps its error; the others go on.

    Args:
        tokenizer: what tokens of a chunk are; None counts words.
        cache: folder for indexes and vectors.
        collection: opened already; None opens that of the setup.

    Raises:
        OptionError, DataError: see `readers.open_collection`, `Setup`; also where top_k exceeds the chunks, or every
            search failed.
    """
    found = collection or open_collection(setup.dataset, setup.documents)
    count = setup.questions
    if count is None and found.answered:
        count = min(QUESTIONS, len(found.questions))
    found = found.take(count, setup.seed)
    how = setup.chunking or found.chunking
    chunks = chunks_of(found, how, token_spans(tokenizer))
    if setup.top_k > len(chunks):
        raise OptionError(f"--top-k must be from 1 to {len(chunks)}, the chunks of {found.name}, not {setup.top_k}")
    retriever = retriever_of(setup, [chunk.text for chunk in chunks], device=device, cache=cache)
    depth = min(DEPTH, len(chunks))
    retriever.search(found.questions[0].text, setup.top_k)  # what is made at the first use is not a query's time
    asked = []
    for question in found.questions:
        try:
            begin = time.perf_counter()
            hits = retriever.search(question.text, setup.top_k)
            seconds = time.perf_counter() - begin
            ranking = [hit.chunk for hit in retriever.ranked(question.text, depth)]
            asked.append(Asked(question=question, hits=tuple(hits), ranking=tuple(ranking), seconds=seconds))
        except BenchError as error:
            asked.append(Asked(question=question, error=f"{type(error).__name__}: {error}"))
    if all(each.error for each in asked):
        raise DataError(f"search failed for every question of {found.name}: {asked[0].error}")
    return Retrieved(setup=setup, collection=found, chunking=how, chunks=chunks, asked=tuple(asked))


def token_gains(answers: Sequence[str], chunks: Sequence[Chunk]) -> list[dict[str, int]]:
    """For each answer the chunks that hold at least `RELEVANT` of its tokens, with a gain of 1 ([E], table 9).

    Ids are places among the chunks. Only chunks that share a token are compared.
    """
    having: dict[str, list[int]] = {}
    split = [set(tokens(chunk.text)) for chunk in chunks]
    for place, words in enumerate(split):
        for word in words:
            having.setdefault(word, []).append(place)
    found = []
    for answer in answers:
        words = tokens(answer)
        near = {place for word in set(words) for place in having.get(word, ())}
        found.append({str(place): 1 for place in sorted(near) if share(words, split[place]) >= RELEVANT})
    return found
