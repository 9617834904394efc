"""Chunks to ranked hits: BM25, dense vectors, and the two combined.

Every retriever answers `search(query, k)` with at most k hits, best first; equal scores stand in the order of the
chunks. `threshold` is the least score of a hit: [E]'s 0.3 (table 9) for dense retrieval, where a score is a cosine;
BM25 returns what shares a word with the query (score above 0), as its scores have no scale.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bench.data.scripts import search_terms
from bench.errors import OptionError
from bench.measure.rag.vectors import best

if TYPE_CHECKING:
    import numpy as np

    from bench.measure.rag.encoders import Encoder
    from bench.measure.rag.vectors import Vectors

RETRIEVERS = ("bm25", "dense", "hybrid")
COSINE = 0.3  # the least similarity of a dense hit ([E], table 9)
RRF = 60  # the constant of reciprocal rank fusion (Cormack, Clarke, Büttcher 2009)
POOL = 100  # hits of each side that a hybrid fuses, at least


class Hit(NamedTuple):
    """A chunk, by its place among all chunks, and its score."""

    chunk: int
    score: float


class Retriever(ABC):
    """See the module."""

    threshold: float

    @abstractmethod
    def ranked(self, query: str, k: int) -> list[Hit]:
        """The best k, whatever their score."""

    def search(self, query: str, k: int) -> list[Hit]:
        """At most k hits that reach the threshold."""
        return [hit for hit in self.ranked(query, k) if hit.score >= self.threshold]


class BM25(Retriever):
    """Okapi BM25 in Lucene's form (Robertson and Zaragoza 2009; k1 1.5, b 0.75) by the bm25s library.

    Texts are cut into runs of letters and digits in lower case; of scripts without spaces every two letters that follow
    each other are a term. The 33 English stop words of Lucene are left out, and words of a to z reduced by Porter's
    stemmer (1980), which is English: words of other languages are searched for as they stand.

    Args:
        texts: the chunks.
        folder: where the index is kept; made and saved if it is not there.
    """

    def __init__(self, texts: Sequence[str], *, folder: Path | None = None, threshold: float | None = None):
        import bm25s

        self.threshold = threshold if threshold is not None else 0.0
        if folder and (folder / "params.index.json").exists():
            self._index = bm25s.BM25.load(folder)
            return
        self._index = bm25s.BM25(k1=1.5, b=0.75, method="lucene")
        self._index.index([terms(text) for text in texts], show_progress=False)
        if folder:
            self._index.save(folder, show_progress=False)

    def ranked(self, query: str, k: int) -> list[Hit]:
        known = [term for term in terms(query) if term in self._index.vocab_dict]
        if not known:
            return []
        scores = self._index.get_scores(known)
        return [Hit(int(place), float(scores[place])) for place in best(scores, k) if scores[place] > 0]


class Dense(Retriever):
    """Cosine similarity of vectors, over any index of `vectors`."""

    def __init__(self, encoder: "Encoder", vectors: "Vectors", *, threshold: float | None = None):
        self._encoder, self._vectors = encoder, vectors
        self.threshold = threshold if threshold is not None else COSINE

    def ranked(self, query: str, k: int) -> list[Hit]:
        return self.near(self._encoder.queries([query])[0], k)

    def near(self, vector: "np.ndarray", k: int) -> list[Hit]:
        """The best k of a query that is encoded already."""
        return [Hit(place, score) for place, score in self._vectors.search(vector, k)]


class Hybrid(Retriever):
    """Reciprocal rank fusion: the sum over both rankings of 1 / (60 + place).

    Each side gives what reaches its own threshold, at least 100 hits deep; `threshold` is that of the sum.
    """

    def __init__(self, sides: Sequence[Retriever], *, threshold: float | None = None):
        self._sides = sides
        self.threshold = threshold if threshold is not None else 0.0

    def ranked(self, query: str, k: int) -> list[Hit]:
        sums = fused([[hit.chunk for hit in side.search(query, max(k, POOL))] for side in self._sides])
        return [Hit(chunk, score) for chunk, score in sums[:k]]


def fused(rankings: Sequence[Sequence[int]]) -> list[tuple[int, float]]:
    """Reciprocal rank fusion of rankings: (chunk, score), best first.

    >>> [chunk for chunk, _ in fused([[1, 2, 3], [3, 2]])]
    [3, 2, 1]
    """
    scores: dict[int, float] = {}
    for ranking in rankings:
        for place, chunk in enumerate(ranking, 1):
            scores[chunk] = scores.get(chunk, 0.0) + 1 / (RRF + place)
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))


def terms(text: str) -> list[str]:
    """The words that BM25 counts.

    >>> terms("What are the Ponies' names?")
    ['what', 'poni', 'name']
    """
    return [_stem(word) if word.isascii() else word for word in search_terms(text) if word not in _stop_words()]


@functools.cache
def _stop_words() -> frozenset[str]:
    from bm25s.tokenization import STOPWORDS_EN

    return frozenset(STOPWORDS_EN)


@functools.lru_cache(maxsize=2**20)
def _stem(word: str) -> str:
    return _stemmer().stem(word)


@functools.cache
def _stemmer():
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer()


def checked(name: str) -> str:
    """A retriever's name. Raises OptionError for an unknown one."""
    if name not in RETRIEVERS:
        raise OptionError(f"--retriever must be one of {', '.join(RETRIEVERS)}, not {name}")
    return name
