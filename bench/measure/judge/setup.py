"""The judging options of the command line, checked, and the judge that they select."""

from dataclasses import dataclass, field
from pathlib import Path

from bench.errors import NotAvailable, OptionError
from bench.measure.judge.answers import DECODING, NEW_TOKENS
from bench.measure.judge.asking import Judge
from bench.measure.judge.endpoint import Endpoint, Patience, Url
from bench.measure.judge.key import Key
from bench.measure.judge.local import LocalJudge
from bench.measure.judge.remote import SAMPLES, RemoteJudge
from bench.measure.judge.reply_cache import Cache
from compression.files.strict_json import at_least

NO_JUDGE = (
    "no judge is set: --judge-url URL --judge-model NAME uses an OpenAI-compatible endpoint (key in the environment "
    "variable BENCH_JUDGE_KEY), --judge SPEC a local model"
)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How answers are made and judged. Raises OptionError for what cannot be.

    Attributes:
        url, model: of an endpoint; both or none.
        local: base that judges instead.
        cache: file of the endpoint's replies; None: `judge.jsonl` beside the journal.
        fluency: language model of fluency; None: that of the embedded reference, for its own set.
        encoder: model of sentence-transformers for coherence; None: TF-IDF.
    """

    url: Url | None = None
    model: str | None = None
    local: str | None = None
    samples: int = SAMPLES
    concurrency: int = 4
    patience: Patience = field(default_factory=Patience)
    cache: Path | None = None
    decoding: str = "sampled"
    new_tokens: int = NEW_TOKENS
    questions: int | None = None
    fluency: str | None = None
    encoder: str | None = None

    def __post_init__(self) -> None:
        if (self.url is None) != (self.model is None):
            given, lacking = ("--judge-url", "--judge-model") if self.url else ("--judge-model", "--judge-url")
            raise OptionError(f"{given} needs {lacking}")
        if self.url is not None and self.local is not None:
            raise OptionError("give either --judge-url or --judge, not both")
        if self.decoding not in DECODING:
            raise OptionError(f"--judge-decoding must be one of {', '.join(DECODING)}, not {self.decoding}")
        for name, value in (("samples", self.samples), ("concurrency", self.concurrency),
                            ("new-tokens", self.new_tokens)):  # fmt: skip
            at_least(f"--judge-{name}", value, 1, OptionError)

    def judge(self, folder: Path, device: str) -> Judge:
        """The judge; `folder` is where replies are kept unless `cache` says where.

        Raises:
            NotAvailable: none was given.
            OptionError, JudgeError, CheckpointError: it cannot be had.
        """
        if self.local is not None:
            return LocalJudge(self.local, device)
        if self.url is None or self.model is None:
            raise NotAvailable(NO_JUDGE)

        endpoint = Endpoint(self.url, key=Key.from_environment(), patience=self.patience)
        cache = Cache(self.cache or folder / "judge.jsonl")
        return RemoteJudge(endpoint, self.model, cache, samples=self.samples, concurrency=self.concurrency)
