"""Vector search by inner product.

    Exact   one matrix product in memory; the default, and what the others are compared with
    Faiss   a graph (HNSW): approximate, for corpora whose exact search takes too long
    Qdrant  a vector database, in a folder or a server, for corpora that stay

`index_of` makes the one that `--index` names.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from bench.errors import DataError, OptionError
from compression.errors import install_command
from compression.files.strict_json import expanded

if TYPE_CHECKING:
    import numpy as np

INDEXES = "exact, faiss, qdrant:FOLDER or qdrant:http://HOST:PORT"
BLOCK = 512  # points sent to a database at once


class Vectors(ABC):
    """`search(vector, k)` gives (place, inner product) of at most k vectors, best first."""

    @abstractmethod
    def search(self, vector: "np.ndarray", k: int) -> list[tuple[int, float]]: ...


class Exact(Vectors):
    """All inner products; ties in the order of the vectors. `vectors` is (count, size)."""

    def __init__(self, vectors: "np.ndarray"):
        import numpy as np

        self._vectors = np.ascontiguousarray(vectors, np.float32)

    def search(self, vector: "np.ndarray", k: int) -> list[tuple[int, float]]:
        scores = self._vectors @ vector
        return [(int(place), float(scores[place])) for place in best(scores, k)]


class Faiss(Vectors):
    """HNSW of FAISS (Malkov, Yashunin, arXiv 1603.09320): 32 links, 80 candidates to build, at least 128 to search."""

    def __init__(self, vectors: "np.ndarray"):
        import numpy as np

        try:
            import faiss
        except ImportError as error:
            raise OptionError(f"--index faiss needs FAISS: {install_command('rag')}") from error
        self._index = faiss.IndexHNSWFlat(vectors.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
        self._index.hnsw.efConstruction = 80
        self._index.add(np.ascontiguousarray(vectors, np.float32))

    def search(self, vector: "np.ndarray", k: int) -> list[tuple[int, float]]:
        self._index.hnsw.efSearch = max(128, 2 * k)
        scores, places = self._index.search(vector[None].astype("float32"), k)
        found = zip(places[0].tolist(), scores[0].tolist(), strict=True)
        return sorted(((p, s) for p, s in found if p >= 0), key=lambda hit: (-hit[1], hit[0]))


class Qdrant(Vectors):
    """A collection of a Qdrant database, made once and found again under its name.

    Args:
        place: a folder (the client's local mode, one process at a time) or the address of a server.
        name: of the collection; says what the vectors are, so that a collection of that name is the same one.

    Raises:
        OptionError: the client is not installed, or the database does not answer.
        DataError: it stopped answering, or holds another number of vectors under this name.
    """

    def __init__(self, vectors: "np.ndarray", place: str, name: str):
        try:
            from qdrant_client import QdrantClient, models
        except ImportError as error:
            raise OptionError(f"--index qdrant needs its client: {install_command('rag')}") from error
        self._place, self._name = place, name
        self._server = server = place.startswith(("http://", "https://"))
        with self._reached(OptionError):
            self._client = QdrantClient(url=place, check_compatibility=False) if server else QdrantClient(path=place)
            there = self._client.collection_exists(name)
        if not there:
            with self._reached(DataError):
                size = models.VectorParams(size=vectors.shape[1], distance=models.Distance.DOT)
                self._client.create_collection(name, vectors_config=size)
                for first in range(0, len(vectors), BLOCK):
                    block = vectors[first : first + BLOCK]
                    ids = list(range(first, first + len(block)))
                    self._client.upsert(name, models.Batch(ids=ids, vectors=block.tolist()), wait=True)
        with self._reached(DataError):
            count = self._client.count(name, exact=True).count
        if count != len(vectors):
            self.close()
            raise DataError(
                f"the collection {name} of the vector database {place} holds {count} vectors, not {len(vectors)}: an "
                "upload was cut short; delete the collection, and it is made anew"
            )

    def search(self, vector: "np.ndarray", k: int) -> list[tuple[int, float]]:
        from qdrant_client import models

        exactly = models.SearchParams(exact=True) if self._server else None  # local mode knows no other way
        with self._reached(DataError):
            found = self._client.query_points(
                self._name, query=vector.tolist(), limit=k, search_params=exactly, with_payload=False
            ).points
        return sorted(((int(p.id), float(p.score)) for p in found), key=lambda hit: (-hit[1], hit[0]))

    def close(self) -> None:
        """Let go of the database; a folder can then be opened by another process."""
        self._client.close()

    @contextmanager
    def _reached(self, kind: type[Exception]) -> Iterator[None]:
        from qdrant_client.http.exceptions import ApiException

        try:
            yield
        except (ApiException, OSError, RuntimeError) as error:
            raise kind(
                f"the vector database {self._place} does not answer ({type(error).__name__}: {error}); start it, or "
                f"choose another index: {INDEXES}"
            ) from error


def check(spec: str) -> None:
    """Raises OptionError for what is no index."""
    kind, _, place = spec.partition(":")
    if kind not in ("exact", "faiss", "qdrant") or (kind == "qdrant") != bool(place):
        raise OptionError(f"--index must be {INDEXES}, not {spec}")


def index_of(spec: str, vectors: "np.ndarray", name: str) -> Vectors:
    """The index that `--index` names, over vectors (count, size); `name` says what they are."""
    check(spec)
    kind, _, place = spec.partition(":")
    if kind == "qdrant":
        return Qdrant(vectors, place if "://" in place else str(expanded(place, OptionError)), name)
    return Faiss(vectors) if kind == "faiss" else Exact(vectors)


def best(scores: "np.ndarray", k: int) -> "np.ndarray":
    """Places of the k largest scores, largest first, ties by place.

    >>> import numpy as np
    >>> best(np.array([1.0, 3.0, 1.0, 3.0, 0.0]), 3).tolist()
    [1, 3, 0]
    """
    import numpy as np

    if k < len(scores):
        edge = np.partition(scores, len(scores) - k)[len(scores) - k]
        above = np.flatnonzero(scores > edge)
        chosen = np.sort(np.concatenate([above, np.flatnonzero(scores == edge)[: k - len(above)]]))
    else:
        chosen = np.arange(len(scores))
    return chosen[np.argsort(-scores[chosen], kind="stable")]
