"""The options of `pytest bench`: pytest declares them, and the report reads by them the command of a recorded run."""

import os

import pytest

from compression.files.strict_json import path_option


def declare(parser: pytest.Parser) -> None:
    """Every option of the benchmarks, with its help."""
    group = parser.getgroup("compression benchmarks")
    add = group.addoption
    add("--model", metavar="RECIPES", help="recipes separated by commas, or all, or orderings, or report: those of its "
        "tables; default nf4, with -m ordering orderings, with -m recovery one of each family")  # fmt: skip
    add("--set", action="append", metavar="NAME=VALUE", help="a parameter for every step of every recipe that has it "
        "and leaves it at its default, such as group_size=64; may be given several times")  # fmt: skip
    add("--base", default="reference", help="reference, reference-teacher, random:<shape>, a folder or a hub id")
    add("--data", default=os.environ.get("BENCH_DATA"), help="embedded, hub, or a folder; default $BENCH_DATA, or "
        "embedded for the reference")  # fmt: skip
    add("--calibration", help="text for methods that need some: embedded, hub, random or a folder; default embedded "
        "for the reference, random for random weights")  # fmt: skip
    add("--teacher", help="base that methods learn from that need one, or self for the uncompressed base; default "
        "reference-teacher for the reference")  # fmt: skip
    add("--downstream", metavar="TASK", help="what recover trains on: a task of the embedded reference or a folder of "
        "*.jsonl with prompt and answer; default arithmetic for the reference")  # fmt: skip
    add("--cache", type=path_option, metavar="DIR", help="what training left for later runs; default "
        "$COMPRESSION_CACHE, or compression-bench in the user's cache folder")  # fmt: skip
    add("--device", default="auto", help="cpu, cuda, cuda:N; default auto: cuda if there is one")
    add("--seed", type=int, default=0, help="of prompts, random weights, calibration, and which questions "
        "of a set are asked")  # fmt: skip
    add(
        "--gate",
        choices=("auto", "strict", "off"),
        default="auto",
        help="auto: gate what has a baseline; strict: also fail without one, and on improvements; off: measure only",
    )
    add("--against", metavar="COMMIT", help="generate beside the code of a commit, round by round in turn, and fail "
        "where this code is slower; from a clone of the benchmarks' own repository")  # fmt: skip
    add("--baselines", type=path_option, metavar="DIR", help="folder of baselines; default ./baselines")
    add("--update-baselines", action="store_true", help="record this run as the baseline, merged into what is there")
    add("--force-update", action="store_true", help="with --update-baselines: also from a tree with changed files, and "
        "what a failed run did measure")  # fmt: skip
    add("--journal", type=path_option, metavar="FILE", help="journal of results; default ./.bench/journal.jsonl")
    add("--resume", action="store_true", help="go on with the last unfinished run of the journal")
    add("--report", type=path_option, metavar="DIR", help="write tables, results and summary at the end of the run, "
        "from all that the journal holds for this base and device")  # fmt: skip
    add("--plan", action="store_true", help="print memory, disk, downloads and time per recipe, and stop")
    add("--batch-size", default="1", help="sequences generated at once; several separated by commas; default 1")
    add("--prompt-tokens", type=int, default=128, help="length of the prompts; default 128")
    add("--max-new-tokens", type=int, default=128, help="tokens generated per sequence; default 128")
    add("--runs", type=int, default=10, help="measured rounds; default 10")
    add("--warmup-runs", type=int, default=3, help="rounds before the measured ones; default 3")
    add("--tdp", type=float, help="watts of the device for estimated energy; default detected")
    add("--protocol", choices=("default", "e", "o"), default="default", help="perplexity protocol; see METHODOLOGY.md")
    add("--samples", type=int, default=100, help="perplexity samples; default 100")
    add("--length", type=int, help="tokens per perplexity sample; default 512")
    add("--stride", type=int, help="step of a sliding perplexity window; default none: disjoint windows")
    add("--dataset-path", metavar="PATH", help="questions for RAG: a SQuAD file, a JSON list of question and answer, "
        "or a folder with Cranfield; default the embedded manuals")  # fmt: skip
    add("--documents", metavar="PATH", help="text file or folder that a list of questions is about")
    add("--num-questions", type=int, help="questions asked, spread over the set; default 64, or as many as "
        "there are")  # fmt: skip
    add("--retriever", default="bm25", help="bm25, dense or hybrid; the last two need --encoder")
    add("--encoder", metavar="MODEL", help="folder or hub id of a sentence-transformers model")
    add("--index", default="exact", help="of vectors: exact, faiss, qdrant:FOLDER or qdrant:http://HOST:PORT")
    add("--top-k", type=int, default=3, help="chunks retrieved for a question; default 3")
    add("--similarity-threshold", type=float, help="least score of a chunk; default 0.3 for dense, none for bm25")
    add("--chunking", help="tokens, sentences, headings or documents; default tokens, sentences for the embedded set")
    add("--chunk-size", type=int, help="tokens of a chunk, at most; default 512, 40 for the embedded set")
    add("--chunk-overlap", type=int, help="tokens that two chunks share; default 50, 0 for the embedded set")
    add("--compare-no-rag", choices=("yes", "no"), default="yes", help="also answer without a context; default yes")
    add("--rag-seeds", type=int, default=3, help="samples of each answer, beside the greedy one; default 3")
    add("--save-detailed-responses", type=path_option, metavar="FILE", help="append every answer as a line of JSON")
    add("--bertscore-encoder", metavar="MODEL", help="folder or hub id of the encoder of BERTScore")
    add("--judge-url", metavar="URL", help="OpenAI-compatible endpoint of a judge, such as https://host/v1; its key is "
        "read from $BENCH_JUDGE_KEY")  # fmt: skip
    add("--judge-model", metavar="NAME", help="model that judges there")
    add("--judge", metavar="SPEC", help="a local model as judge: anything that --base takes")
    add("--judge-samples", type=int, help="samples of a score where the endpoint gives no log-probabilities; default "
        "20")  # fmt: skip
    add("--judge-timeout", type=float, help="seconds for one attempt of a request; default 60")
    add("--judge-attempts", type=int, help="attempts of one request; default 6")
    add("--judge-wait", type=float, help="seconds before the second attempt, doubled before each further; default 1")
    add("--judge-concurrency", type=int, help="requests to the judge at once; default 4")
    add("--judge-cache", type=path_option, metavar="FILE", help="replies of the judge; default judge.jsonl beside the "
        "journal")  # fmt: skip
    add("--judge-decoding", choices=("sampled", "greedy"), help="of the answers that are judged; default sampled, at "
        "temperature 0.7")  # fmt: skip
    add("--judge-new-tokens", type=int, help="of an answer that is judged; default 200")
    add("--fluency-model", metavar="MODEL", help="folder or hub id of the language model of fluency; default for "
        "the embedded set the reference's teacher, else none")  # fmt: skip
    add("--coherence-encoder", metavar="MODEL", help="sentence-transformers model; default TF-IDF of words")
    add("--tasks", default="core", help="core, full, none, or names separated by commas; see METHODOLOGY.md")
    add("--limit", type=int, help="questions of each task (of MMLU: of each subject), the first, as lm-eval "
        "takes them; default all")  # fmt: skip
    add("--task-rows", type=int, help="sequences that tasks read in one forward pass; default by tokens")
    add("--chat-template", action="store_true", help="put the tasks' prompts into the tokenizer's chat template")
    add("--chat-template-args", metavar="ARGS", help="arguments of the tokenizer's chat template: name=value separated "
        "by commas, or a JSON object; default enable_thinking=false")  # fmt: skip
    add(
        "--allow-code-execution",
        action="store_true",
        help="run programs that models write (code tasks), each in a sandbox; without it such tasks are not scored",
    )
