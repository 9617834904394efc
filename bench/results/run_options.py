"""The options of `pytest bench`: pytest declares them, and the report reads by them the command of a recorded run."""

import os
from typing import TYPE_CHECKING, Any

from compression.files.strict_json import path_option

if TYPE_CHECKING:
    import pytest

OPTIONS: dict[str, dict[str, Any]] = {
    "--model": dict(
        metavar="RECIPES",
        help="recipes separated by commas, or a list: all, orderings, or report (those of its "
        "tables); default nf4; orderings with -m ordering, one of each family with -m recovery",
    ),
    "--set": dict(
        action="append",
        metavar="NAME=VALUE",
        help="a parameter for every step that has it "
        "and leaves it at its default, such as group_size=64; may be repeated",
    ),
    "--base": dict(
        default="reference",
        help="reference, reference-teacher, smollm2, random:<shape>, a folder, a GGUF file or a hub id",
    ),
    "--data": dict(
        default=os.environ.get("BENCH_DATA"),
        help="embedded, hub, or a folder; default $BENCH_DATA, or embedded for the reference",
    ),
    "--calibration": dict(
        help="calibration text: embedded, hub, random or a folder; default embedded "
        "for the reference, random for random weights"
    ),
    "--teacher": dict(
        help="teacher for distillation: a base, or self for the uncompressed base; default "
        "reference-teacher for the reference"
    ),
    "--downstream": dict(
        metavar="TASK",
        help="training task of recover: a task of the embedded reference or a folder of "
        "*.jsonl with prompt and answer; default arithmetic for the reference",
    ),
    "--cache": dict(
        type=path_option,
        metavar="DIR",
        help="cached results of training, reused by later runs; default "
        "$COMPRESSION_CACHE, or compression-bench in the user's cache folder",
    ),
    "--device": dict(default="auto", help="cpu, cuda, cuda:N; default auto: cuda if available"),
    "--compute-dtype": dict(
        choices=("auto", "stored", "float32"),
        default="auto",
        help="arithmetic of quality, RAG, judging and recovery: stored, float32, or auto (float32 if the processor is "
        "slower in the 16 bits of the base); default auto. Time, memory and size are always measured as stored",
    ),
    "--runtime": dict(
        default="native",
        metavar="NAMES",
        help="what runs the models: native, transformers, vllm and llama.cpp, separated by commas; default native. "
        "Engines serve what is exported, in processes of their own",
    ),
    "--runtime-python": dict(
        action="append",
        metavar="NAME=PATH",
        help="the Python in whose environment an engine is installed; may be repeated; default the current one, or "
        "that of $COMPRESSION_VLLM_PYTHON, $COMPRESSION_LLAMA_CPP_PYTHON, $COMPRESSION_TRANSFORMERS_PYTHON",
    ),
    "--runtime-dtype": dict(
        choices=("auto", "float32", "float16", "bfloat16"),
        default="auto",
        help="dtype in which engines serve base and compressed model; default auto: the engine's choice, mostly that "
        "of the checkpoint",
    ),
    "--runtime-devices": dict(
        type=int,
        default=1,
        metavar="N",
        help="devices among which an engine divides one model (vllm, by tensor parallelism); on a CPU as many "
        "processes; default 1",
    ),
    "--request-rate": dict(
        metavar="RATES",
        help="requests per second to engines that take them while they compute others (vllm), at random times; several "
        "rates are separated by commas. At most the largest --batch-size is computed at once, others wait",
    ),
    "--requests": dict(type=int, default=32, help="requests of a round of --request-rate; default 32"),
    "--seed": dict(
        type=int, default=0, help="seed of prompts, random weights, calibration and the choice of questions"
    ),
    "--gate": dict(
        choices=("auto", "strict", "off"),
        default="auto",
        help="auto: compare with baselines where there are any; strict: also fail without one, and on improvements; "
        "off: measure only",
    ),
    "--against": dict(
        metavar="COMMIT",
        help="A/B timing: this code against a commit, in alternating rounds; fails if this "
        "code is slower; needs a clone of the benchmarks' own repository",
    ),
    "--baselines": dict(type=path_option, metavar="DIR", help="folder of baselines; default ./baselines"),
    "--update-baselines": dict(
        action="store_true", help="record this run as the baseline, merged into the existing one"
    ),
    "--force-update": dict(
        action="store_true",
        help="with --update-baselines: also record with uncommitted changes, and what a failed run did measure",
    ),
    "--journal": dict(type=path_option, metavar="FILE", help="journal of results; default ./.bench/journal.jsonl"),
    "--resume": dict(action="store_true", help="resume the last unfinished run of the journal"),
    "--ray": dict(
        metavar="ADDRESS",
        help="give each recipe to a node of a Ray cluster: its HOST:PORT, or auto for that of $RAY_ADDRESS, else one "
        "that is started here for the run; journal, base and data are on a disk that all nodes see",
    ),
    "--report": dict(
        type=path_option,
        metavar="DIR",
        help="write tables, results and summary at the end of the run, "
        "from all rows of the journal for this base and device",
    ),
    "--plan": dict(
        action="store_true",
        help="print memory, disk, downloads and time per recipe, and stop; times a few batches for quality and RAG",
    ),
    "--batch-size": dict(
        default="1", help="sequences generated at once; one or several sizes separated by commas; default 1"
    ),
    "--prompt-tokens": dict(type=int, default=128, help="length of the prompts; default 128"),
    "--max-new-tokens": dict(type=int, default=128, help="tokens generated per sequence; default 128"),
    "--runs": dict(type=int, default=10, help="measured rounds; default 10"),
    "--warmup-runs": dict(type=int, default=3, help="rounds before the measured ones; default 3"),
    "--tdp": dict(type=float, help="power of the device in watts, for estimated energy; default detected"),
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
    "--documents": dict(metavar="PATH", help="text file or folder that answers a list of questions"),
    "--num-questions": dict(type=int, help="number of questions, spread over the set; default 64, or all if fewer"),
    "--retriever": dict(default="bm25", help="bm25, dense or hybrid; the last two need --encoder"),
    "--encoder": dict(metavar="MODEL", help="minilm, or a folder or hub id of a sentence-transformers model"),
    "--index": dict(default="exact", help="vector index: exact, faiss, qdrant:FOLDER or qdrant:http://HOST:PORT"),
    "--top-k": dict(type=int, default=3, help="chunks retrieved for a question; default 3"),
    "--similarity-threshold": dict(type=float, help="minimum score of a chunk; default 0.3 for dense, none for bm25"),
    "--chunking": dict(
        help="how documents are cut: tokens, sentences, headings or documents; default tokens, sentences for the "
        "embedded set"
    ),
    "--chunk-size": dict(type=int, help="maximum tokens of a chunk; default 512, 40 for the embedded set"),
    "--chunk-overlap": dict(type=int, help="tokens that two chunks share; default 50, 0 for the embedded set"),
    "--compare-no-rag": dict(choices=("yes", "no"), default="yes", help="also answer without a context; default yes"),
    "--rag-seeds": dict(type=int, default=3, help="samples of each answer, besides the greedy one; default 3"),
    "--save-detailed-responses": dict(type=path_option, metavar="FILE", help="append every answer as a line of JSON"),
    "--bertscore-encoder": dict(metavar="MODEL", help="minilm, or a folder or hub id of the encoder of BERTScore"),
    "--judge-url": dict(
        metavar="URL",
        help="OpenAI-compatible endpoint of a judge, such as https://host/v1; its key is read from $BENCH_JUDGE_KEY",
    ),
    "--judge-model": dict(metavar="NAME", help="name of the judge at that endpoint"),
    "--judge": dict(metavar="SPEC", help="a local model as judge: anything that --base accepts"),
    "--judge-samples": dict(
        type=int, help="samples per score if the endpoint returns no log-probabilities; default 20"
    ),
    "--judge-timeout": dict(type=float, help="time-out of one attempt, in seconds; default 60"),
    "--judge-attempts": dict(type=int, help="attempts per request; default 6"),
    "--judge-wait": dict(type=float, help="seconds before the second attempt, doubled after each; default 1"),
    "--judge-concurrency": dict(type=int, help="concurrent requests to the judge; default 4"),
    "--judge-cache": dict(
        type=path_option, metavar="FILE", help="cached replies of the judge; default judge.jsonl beside the journal"
    ),
    "--judge-decoding": dict(
        choices=("sampled", "greedy"), help="decoding of the judged answers; default sampled, at temperature 0.7"
    ),
    "--judge-new-tokens": dict(type=int, help="maximum tokens of a judged answer; default 200"),
    "--fluency-model": dict(
        metavar="MODEL",
        help="language model that scores fluency: folder or hub id; default for "
        "the embedded set the reference's teacher, else none",
    ),
    "--coherence-encoder": dict(
        metavar="MODEL", help="minilm, or a sentence-transformers model that scores coherence; default TF-IDF of words"
    ),
    "--tasks": dict(default="core", help="core, full, none, or names separated by commas; see docs/methodology"),
    "--limit": dict(
        type=int,
        help="questions of each task: the first ones, and those of each part (such as the subjects of MMLU) in "
        "proportion to its size; default all",
    ),
    "--task-rows": dict(type=int, help="sequences per forward pass of tasks; default by token count"),
    "--chat-template": dict(action="store_true", help="wrap the prompts of tasks in the tokenizer's chat template"),
    "--chat-template-args": dict(
        metavar="ARGS",
        help="arguments of the tokenizer's chat template: name=value separated "
        "by commas, or a JSON object; default enable_thinking=false",
    ),
    "--allow-code-execution": dict(
        action="store_true",
        help="run programs that a model writes (code tasks), each in a sandbox; without this option such tasks are "
        "not scored",
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
