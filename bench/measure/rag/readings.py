"""Measurements of retrieval and of answers, as the metrics read them."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.errors import DataError, NotAvailable, OptionError
from bench.machine import device as machine
from bench.measure.rag.encoders import folder_of
from bench.measure.rag.pipeline import Asked, Retrieved, token_gains
from bench.measure.rag.prompts import Said, ask, prompts
from bench.measure.rag.records import (
    AnswersReading,
    Context,
    ContextReading,
    RankingReading,
    Replies,
    SimilarityReading,
    SpeedReading,
    Timed,
)
from compression.errors import install_command
from compression.files.libraries import failures_as, local_or_hub, no_code_from_outside

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A model that reads contexts: `model` in eval mode on `device`, up to `new_tokens` for an answer.

    `template` are arguments of the tokenizer's chat template.
    """

    model: Any
    tokenizer: "PreTrainedTokenizerFast"
    device: str
    new_tokens: int
    template: Mapping[str, Any] | None = None

    def answers(self, found: Retrieved, asked: Sequence[Asked], *, rag: bool, decoding: str, seed: int) -> list[Said]:
        """Answers in the order of the questions; one whose search failed has that error."""
        able = [each for each in asked if not (rag and each.error)]
        texts = prompts(found, able, self.tokenizer, self.template, rag=rag)
        form = found.collection.form
        said = iter(ask(self.model, self.tokenizer, texts, form=form, new_tokens=self.new_tokens, decoding=decoding,
                        seed=seed))  # fmt: skip
        return [Said(error=each.error) if rag and each.error else next(said) for each in asked]


def contexts(found: Retrieved) -> ContextReading:
    """The contexts of all questions that could be searched for.

    Raises:
        NotAvailable: the set has judgements alone.
    """
    _answered(found)
    relevant = found.collection.judged
    return ContextReading(
        contexts=tuple(
            Context(
                question=asked.question.text,
                answer=asked.question.answers[0],
                chunks=tuple(found.contexts(asked)),
                scores=tuple(hit.score for hit in asked.hits),
                relevant=tuple(found.chunks[hit.chunk].document in asked.question.gains for hit in asked.hits)
                if relevant
                else None,
            )
            for asked in found.answerable
            if not asked.error
        )
    )


def judged_contexts(found: Retrieved) -> ContextReading:
    """The contexts, where it is known which documents are relevant. Raises NotAvailable where it is not."""
    _judged(found)
    return contexts(found)


def rankings(found: Retrieved, relevance: str) -> RankingReading:
    """Rankings under one notion of relevance: of documents ("judged") or of chunks ("tokens").

    Raises:
        NotAvailable: nobody has judged, or there are no answers whose tokens could be compared.
    """
    asked = [each for each in found.answerable if not each.error]
    if relevance == "judged":
        _judged(found)
        ranked = tuple(found.documents(each) for each in asked)
        gains = tuple(each.question.gains for each in asked)
    else:
        _answered(found)
        ranked = tuple([str(chunk) for chunk in each.ranking] for each in asked)
        gains = tuple(token_gains([each.question.answers[0] for each in asked], found.chunks))
    return RankingReading(rankings=ranked, gains=gains)


def replies(found: Retrieved, reader: Reader, decoding: str, note: dict[str, Any]) -> AnswersReading:
    """All questions answered, with their contexts and, unless that is off, without.

    Args:
        decoding: "greedy", or "sampled" once for each seed of the setup.
        note: what goes before each line of the file of responses: run, recipe.

    Raises:
        NotAvailable: the set has judgements alone, or sampling is off.
    """
    _answered(found)
    setup, asked = found.setup, found.answerable
    seeds = range(setup.seeds) if decoding == "sampled" else range(1)
    if not seeds:
        raise NotAvailable("--rag-seeds 0: no answers are sampled")
    rag = [reader.answers(found, asked, rag=True, decoding=decoding, seed=seed) for seed in seeds]
    bare = [reader.answers(found, asked, rag=False, decoding=decoding, seed=seed) for seed in seeds if setup.compare]
    texts = prompts(found, asked, reader.tokenizer, reader.template, rag=True)
    reading = AnswersReading(
        tuple(
            Replies(
                id=each.question.id,
                question=each.question.text,
                prompt=texts[n],
                truths=each.question.answers,
                context="\n\n".join(found.contexts(each)),
                rag=tuple(said[n] for said in rag),
                bare=tuple(said[n] for said in bare),
            )
            for n, each in enumerate(asked)
        )
    )
    if setup.responses:
        _save(setup.responses, found, reading, {**note, "decoding": decoding})
    return reading


def comparing(found: Retrieved) -> None:
    """Raises NotAvailable where questions are not asked without a context too."""
    if not found.setup.compare:
        raise NotAvailable("--compare-no-rag no: no answers without context")


def encoding(found: Retrieved) -> None:
    """Raises NotAvailable where no encoder for BERTScore was given."""
    if found.setup.bertscore is None:
        raise NotAvailable("no encoder is set: --bertscore-encoder FOLDER (or a hub id) measures it")


def similarities(found: Retrieved, reading: AnswersReading, device: str) -> SimilarityReading:
    """BERTScore F1 of the answers with their references, by the bert-score library.

    The layer is the library's choice for a model that it knows by name, else the last.

    Raises:
        NotAvailable: no encoder was given.
        OptionError: the library is not installed, or there is no such encoder.
    """
    encoding(found)
    name = found.setup.bertscore
    try:
        from bert_score import BERTScorer
        from bert_score.utils import model2layers
        from transformers import AutoConfig, AutoTokenizer
    except ImportError as error:
        raise OptionError(f"--bertscore-encoder {name} needs bert-score: {install_command('rag')}") from error
    place = local_or_hub(folder_of(name), OptionError)
    with failures_as(lambda why: OptionError(
        f"--bertscore-encoder {name} cannot be loaded: {why}; give a folder with an encoder"
    )), no_code_from_outside():  # fmt: skip
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
        AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        layers = model2layers.get(Path(name).name) or config.num_hidden_layers
        scorer = BERTScorer(model_type=place, num_layers=layers, device=device)
    pairs = [(said.text, one.truths[0]) for one in reading.replies for said in one.rag]
    _, _, f1 = scorer.score(*(list(side) for side in zip(*pairs, strict=True)))
    return SimilarityReading(tuple(f1.tolist()))


def timed(found: Retrieved, readers: Sequence[Reader], count: int) -> list[SpeedReading]:
    """The first `count` questions answered one at a time by each reader in turn, after one that is not counted.

    Raises:
        NotAvailable: the set has judgements alone.
    """
    _answered(found)
    asked = [each for each in found.answerable if not each.error][:count]
    taken: list[list[Timed]] = [[] for _ in readers]
    for number, each in enumerate([asked[0], *asked]):
        for reader, list_ in zip(readers, taken, strict=True):
            rag_s, rag = _timed(found, reader, each, rag=True)
            bare_s, bare = _timed(found, reader, each, rag=False) if found.setup.compare else (0.0, Said())
            if number:
                list_.append(Timed(retrieval_s=each.seconds, rag_s=rag_s, rag_tokens=rag.tokens,
                                   bare_s=bare_s, bare_tokens=bare.tokens))  # fmt: skip
    return [SpeedReading(questions=tuple(each)) for each in taken]


def _timed(found: Retrieved, reader: Reader, asked: Asked, *, rag: bool) -> tuple[float, Said]:
    machine.synchronize(reader.device)
    begin = time.perf_counter()
    [said] = reader.answers(found, [asked], rag=rag, decoding="greedy", seed=0)
    machine.synchronize(reader.device)
    return time.perf_counter() - begin, said


def _answered(found: Retrieved) -> None:
    if not found.collection.answered:
        raise NotAvailable(f"{found.collection.name} has judgements but no answers")


def _judged(found: Retrieved) -> None:
    if not found.collection.judged:
        raise NotAvailable(f"{found.collection.name} does not say which documents are relevant")


def _save(path: Path, found: Retrieved, reading: AnswersReading, note: dict[str, Any]) -> None:
    lines = []
    for asked, one in zip(found.answerable, reading.replies, strict=True):
        chunks = [
            {"document": chunk.document, "begin": chunk.begin, "end": chunk.end, "score": hit.score}
            for hit in asked.hits
            for chunk in [found.chunks[hit.chunk]]
        ]
        line = {**note, "id": one.id, "question": one.question, "answers": one.truths, "chunks": chunks,
                "rag": [asdict(said) for said in one.rag], "no_rag": [asdict(said) for said in one.bare]}  # fmt: skip
        lines.append(json.dumps(line) + "\n")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.writelines(lines)
    except OSError as error:
        raise DataError(f"--save-detailed-responses {path} cannot be written: {error.strerror or error}") from error
