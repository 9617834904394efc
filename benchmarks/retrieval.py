"""Time and memory of retrieval beside rank_bm25 and FAISS, over chunks and queries that are made up.

    python benchmarks/retrieval.py [--chunks 100000] [--queries 1000]
                                   [--contenders bm25,rank_bm25,exact,faiss,hnsw]

A chunk is 60 words of a vocabulary of 50,000 with Zipf's frequencies; its vector is 384 normal numbers of length 1. A
query is six words of one chunk, or its vector with noise of half its length added, so that the chunk which must be
found first is known. Words are cut and stemmed the same way for both BM25s, on the clock: for the index within `index`,
for a query within `query`. `exact` searches the vectors where they are; `faiss` is FAISS's exact index (IndexFlatIP),
which copies them, `hnsw` the graph that `--index faiss` makes.

Each contender runs in a process of its own. `memory` is the most that the process held while building and searching,
beyond what it held with texts and vectors made. What was found is checked off the clock: `first` is the share of
queries whose chunk came first, `same` the share of the first ten that are also among the reference's (`bm25`, `exact`),
in the same places for `faiss`. BM25s differ in their form of IDF, and so in some places. Times are of the processor, so
that a shared machine hardly shows in them; set OMP_NUM_THREADS=1, or threads of FAISS and BLAS are added up.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.measure.memory_process import Peak, anonymous_memory
from bench.measure.rag.retrieval import BM25, terms
from bench.measure.rag.vectors import Exact, Faiss, best

REFERENCE = {"bm25": None, "rank_bm25": "bm25", "exact": None, "faiss": "exact", "hnsw": "exact"}
TOP, WORDS, VOCABULARY, SIZE = 10, 60, 50_000, 384


def words(chunks: int, queries: int) -> tuple[list[str], list[str]]:
    """Texts of chunks, and queries; query n is about chunk n * (chunks // queries)."""
    generator = np.random.default_rng(0)
    shares = 1 / np.arange(1, VOCABULARY + 1)
    drawn = generator.choice(VOCABULARY, (chunks, WORDS), p=shares / shares.sum())
    about = drawn[:: chunks // queries][:queries]
    asked = [generator.choice(np.sort(np.unique(row))[-12:], 6, replace=False) for row in about]  # of its rarer words
    name = [f"w{n}x" for n in range(VOCABULARY)]
    return [" ".join(name[n] for n in row) for row in drawn], [" ".join(name[n] for n in row) for row in asked]


def vectors(chunks: int, queries: int) -> tuple[np.ndarray, np.ndarray]:
    """(chunks, SIZE) and (queries, SIZE), float32 of length 1; query n is near chunk n * (chunks // queries)."""
    generator = np.random.default_rng(0)

    def unit(rows: np.ndarray) -> np.ndarray:
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    made = unit(generator.standard_normal((chunks, SIZE), dtype=np.float32))
    about = made[:: chunks // queries][:queries]
    return made, unit(about + 0.5 * unit(generator.standard_normal((queries, SIZE), dtype=np.float32)))


class RankBM25:
    """rank_bm25's Okapi with the same words, k1 and b."""

    def __init__(self, texts: list[str]):
        from rank_bm25 import BM25Okapi

        self._index = BM25Okapi([terms(text) for text in texts], k1=1.5, b=0.75)

    def search(self, query: str, k: int) -> list[tuple[int, float]]:
        scores = self._index.get_scores(terms(query))
        return [(int(place), float(scores[place])) for place in best(scores, k)]


class Flat:
    """FAISS's exact index."""

    def __init__(self, made: np.ndarray):
        import faiss

        self._index = faiss.IndexFlatIP(made.shape[1])
        self._index.add(made)

    def search(self, vector: np.ndarray, k: int) -> list[tuple[int, float]]:
        scores, places = self._index.search(vector[None], k)
        return list(zip(places[0].tolist(), scores[0].tolist(), strict=True))


CONTENDERS: dict[str, Any] = {"bm25": BM25, "rank_bm25": RankBM25, "exact": Exact, "faiss": Flat, "hnsw": Faiss}


def run(name: str, chunks: int, queries: int) -> dict[str, Any]:
    """The figures of one contender, in this process."""
    make = CONTENDERS[name]
    things, asked = (words if name in ("bm25", "rank_bm25") else vectors)(chunks, queries)
    small = make(things[:100])  # what a library takes and makes at its first use
    small.search(asked[0], TOP)
    del small
    read, _ = anonymous_memory()
    before = read()
    with Peak(read) as peak:
        begin = time.process_time()
        index = make(things)
        built = time.process_time()
        found = [[hit[0] for hit in index.search(query, TOP)] for query in asked]
        done = time.process_time()
    first = [places[:1] == [n * (chunks // queries)] for n, places in enumerate(found)]
    return {"index_s": built - begin, "query_ms": 1e3 * (done - built) / len(asked),
            "memory_mib": (peak.bytes - before) / 2**20, "first": sum(first) / len(first), "found": found}  # fmt: skip


def child(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one contender from a process of its own. Raises RuntimeError where it failed."""
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, __file__, "--child", name, "--chunks", str(options.chunks), "--queries",
               str(options.queries)]  # fmt: skip
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: exit status {done.returncode}: {done.stderr[-500:]}")
    return json.loads(done.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description="Time and memory of retrieval.")
    parser.add_argument("--chunks", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.contenders.split(",")
    if unknown := set(names) - {*CONTENDERS}:
        parser.error(f"unknown contenders {', '.join(sorted(unknown))}; there are {', '.join(CONTENDERS)}")
    if not 1 <= options.queries <= options.chunks or options.chunks < 100:
        parser.error(
            f"--chunks {options.chunks} --queries {options.queries}: at least 100 chunks, at most one query each"
        )
    if options.child:
        print(json.dumps(run(options.child, options.chunks, options.queries)))
        return 0
    print(f"{options.chunks} chunks, {options.queries} queries, first {TOP}; in brackets theirs / ours")
    print("| | index, s | query, ms | memory, MiB | first | same |\n| --- | ---: | ---: | ---: | ---: | ---: |")
    done: dict[str, dict[str, Any]] = {}
    wrong = []
    for name in names:
        figures = done[name] = child(name, options)
        ours = done.get(REFERENCE[name] or "")
        cells, same = [], ""
        for column in ("index_s", "query_ms", "memory_mib"):
            ratio = f" ({figures[column] / ours[column]:.2g})" if ours else ""
            cells.append(f"{figures[column]:.3g}{ratio}")
        if ours:
            pairs = list(zip(figures["found"], ours["found"], strict=True))
            same = f"{sum(len({*a} & {*b}) / TOP for a, b in pairs) / len(pairs):.3f}"
            if name == "faiss" and sum(a == b for a, b in pairs) < 0.99 * len(pairs):  # equal sums may round apart
                wrong.append("faiss and exact do not rank alike")
        if figures["first"] < 0.95:
            wrong.append(f"{name} finds {figures['first']:.3f} of the chunks first")
        print(f"| {name} | {' | '.join(cells)} | {figures['first']:.3f} | {same} |", flush=True)
    print(*wrong, sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
