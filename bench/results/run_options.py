"""The options of `pytest bench`: pytest declares them, and the report reads by them the command of a recorded run."""

import os
from typing import TYPE_CHECKING, Any

from compression.files.strict_json import path_option

if TYPE_CHECKING:
    import pytest

OPTIONS: dict[str, dict[str, Any]] = {
    "--model": dict(
        metavar="RECIPES",
        help="recipes separated by commas, or all, or orderings, or report: those of its "
        "tables; default nf4, with -m ordering orderings, with -m recovery one of each family",
    ),
    "--set": dict(
        action="append",
        metavar="NAME=VALUE",
        help="a parameter for every step of every recipe that has it "
        "and leaves it at its default, such as group_size=64; may be given several times",
    ),
    "--base": dict(default="reference", help="reference, reference-teacher, random:<shape>, a folder or a hub id"),
    "--data": dict(
        default=os.environ.get("BENCH_DATA"),
        help="embedded, hub, or a folder; default $BENCH_DATA, or embedded for the reference",
    ),
    "--calibration": dict(
        help="text for methods that need some: embedded, hub, random or a folder; default embedded "
        "for the reference, random for random weights"
    ),
    "--teacher": dict(
        help="base that methods learn from that need one, or self for the uncompressed base; default "
        "reference-teacher for the reference"
    ),
    "--downstream": dict(
        metavar="TASK",
        help="what recover trains on: a task of the embedded reference or a folder of "
        "*.jsonl with prompt and answer; default arithmetic for the reference",
    ),
    "--cache": dict(
        type=path_option,
        metavar="DIR",
        help="what training left for later runs; default "
        "$COMPRESSION_CACHE, or compression-bench in the user's cache folder",
    ),
    "--device": dict(default="auto", help="cpu, cuda, cuda:N; default auto: cuda if there is one"),
    "--seed": dict(
        type=int, default=0, help="of prompts, random weights, calibration, and which questions of a set are asked"
    ),
    "--gate": dict(
        choices=("auto", "strict", "off"),
        default="auto",
        help="auto: gate what has a baseline; strict: also fail without one, and on improvements; off: measure only",
    ),
    "--against": dict(
        metavar="COMMIT",
        help="generate beside the code of a commit, round by round in turn, and fail "
        "where this code is slower; from a clone of the benchmarks' own repository",
    ),
    "--baselines": dict(type=path_option, metavar="DIR", help="folder of baselines; default ./baselines"),
    "--update-baselines": dict(action="store_true", help="record this run as the baseline, merged into what is there"),
    "--force-update": dict(
        action="store_true",
        help="with --update-baselines: also from a tree with changed files, and what a failed run did measure",
    ),
    "--journal": dict(type=path_option, metavar="FILE", help="journal of results; default ./.bench/journal.jsonl"),
    "--resume": dict(action="store_true", help="go on with the last unfinished run of the journal"),
    "--report": dict(
        type=path_option,
        metavar="DIR",
        help="write tables, results and summary at the end of the run, "
        "from all that the journal holds for this base and device",
    ),
    "--plan": dict(action="store_true", help="print memory, disk, downloads and time per recipe, and stop"),
    "--batch-size": dict(default="1", help="sequences generated at once; several separated by commas; default 1"),
    "--prompt-tokens": dict(type=int, default=128, help="length of the prompts; default 128"),
    "--max-new-tokens": dict(type=int, default=128, help="tokens generated per sequence; default 128"),
    "--runs": dict(type=int, default=10, help="measured rounds; default 10"),
    "--warmup-runs": dict(type=int, default=3, help="rounds before the measured ones; default 3"),
    "--tdp": dict(type=float, help="watts of the device for estimated energy; default detected"),
    "--protocol": dict(
        choices=("default", "e", "o"), default="default", help="perplexity protocol; see docs/methodology"
    ),
    "--samples": dict(type=int, default=100, help="perplexity samples; default 100"),
    "--length": dict(type=int, help="tokens per perplexity sample; default 512"),
    "--stride": dict(type=int, help="step of a sliding perplexity window; default none: disjoint windows"),
    "--dataset-path": dict(
        metavar="PATH",
        help="questions for RAG: a SQuAD file, a JSON list of question and answer, "
        "or a folder with Cranfield; default the embedded manuals",
    ),
    "--documents": dict(metavar="PATH", help="text file or folder that a list of questions is about"),
    "--num-questions": dict(type=int, help="questions asked, spread over the set; default 64, or as many as there are"),
    "--retriever": dict(default="bm25", help="bm25, dense or hybrid; the last two need --encoder"),
    "--encoder": dict(metavar="MODEL", help="folder or hub id of a sentence-transformers model"),
    "--index": dict(default="exact", help="of vectors: exact, faiss, qdrant:FOLDER or qdrant:http://HOST:PORT"),
    "--top-k": dict(type=int, default=3, help="chunks retrieved for a question; default 3"),
    "--similarity-threshold": dict(type=float, help="least score of a chunk; default 0.3 for dense, none for bm25"),
    "--chunking": dict(help="tokens, sentences, headings or documents; default tokens, sentences for the embedded set"),
    "--chunk-size": dict(type=int, help="tokens of a chunk, at most; default 512, 40 for the embedded set"),
    "--chunk-overlap": dict(type=int, help="tokens that two chunks share; default 50, 0 for the embedded set"),
    "--compare-no-rag": dict(choices=("yes", "no"), default="yes", help="also answer without a context; default yes"),
    "--rag-seeds": dict(type=int, default=3, help="samples of each answer, beside the greedy one; default 3"),
    "--save-detailed-responses": dict(type=path_option, metavar="FILE", help="append every answer as a line of JSON"),
    "--bertscore-encoder": dict(metavar="MODEL", help="folder or hub id of the encoder of BERTScore"),
    "--judge-url": dict(
        metavar="URL",
        help="OpenAI-compatible endpoint of a judge, such as https://host/v1; its key is read from $BENCH_JUDGE_KEY",
    ),
    "--judge-model": dict(metavar="NAME", help="model that judges there"),
    "--judge": dict(metavar="SPEC", help="a local model as judge: anything that --base takes"),
    "--judge-samples": dict(
        type=int, help="samples of a score where the endpoint gives no log-probabilities; default 20"
    ),
    "--judge-timeout": dict(type=float, help="seconds for one attempt of a request; default 60"),
    "--judge-attempts": dict(type=int, help="attempts of one request; default 6"),
    "--judge-wait": dict(type=float, help="seconds before the second attempt, doubled before each further; default 1"),
    "--judge-concurrency": dict(type=int, help="requests to the judge at once; default 4"),
    "--judge-cache": dict(
        type=path_option, metavar="FILE", help="replies of the judge; default judge.jsonl beside the journal"
    ),
    "--judge-decoding": dict(
        choices=("sampled", "greedy"), help="of the answers that are judged; default sampled, at temperature 0.7"
    ),
    "--judge-new-tokens": dict(type=int, help="of an answer that is judged; default 200"),
    "--fluency-model": dict(
        metavar="MODEL",
        help="folder or hub id of the language model of fluency; default for "
        "the embedded set the reference's teacher, else none",
    ),
    "--coherence-encoder": dict(metavar="MODEL", help="sentence-transformers model; default TF-IDF of words"),
    "--tasks": dict(default="core", help="core, full, none, or names separated by commas; see docs/methodology"),
    "--limit": dict(
        type=int,
        help="questions of each task (of MMLU: of each subject), the first, as lm-eval takes them; default all",
    ),
    "--task-rows": dict(type=int, help="sequences that tasks read in one forward pass; default by tokens"),
    "--chat-template": dict(action="store_true", help="put the tasks' prompts into the tokenizer's chat template"),
    "--chat-template-args": dict(
        metavar="ARGS",
        help="arguments of the tokenizer's chat template: name=value separated "
        "by commas, or a JSON object; default enable_thinking=false",
    ),
    "--allow-code-execution": dict(
        action="store_true",
        help="run programs that models write (code tasks), each in a sandbox; without it such tasks are not scored",
    ),
}


def declare(parser: "pytest.Parser") -> None:
    """Give pytest every option, with its help."""
    group = parser.getgroup("compression benchmarks")
    for name, facts in OPTIONS.items():
        group.addoption(name, **facts)


def takes_value(name: str) -> bool:
    """Whether a value follows the option. Raises KeyError for one that is not of the benchmarks.

    >>> takes_value("--model"), takes_value("--resume")
    (True, False)
    """
    return OPTIONS[name].get("action") != "store_true"
