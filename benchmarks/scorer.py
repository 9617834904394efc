"""Our scorer beside lm-eval's HFLM: the same scores, and how much sooner, in one run.

    BENCH_DATA=DIR python benchmarks/scorer.py [--base random:qwen2.5-0.5b] [--dtype float32] [--tasks mmlu,...]
        [--limit 20] [--subjects 5] [--equal]

HFLM runs at the fastest of the batch sizes 1, 4, 16 and 64, found on a tenth of the requests (at least 8). Both get the
same requests, built by lm-eval from the folder, tokenised within the clock; --equal has HFLM take them one at a time,
and its time says nothing. A row gives the seconds of each and their ratio, on the clock and of the processor (which a
machine that does other work besides leaves comparable), the largest difference of a log-likelihood (or how many answers
are the same text), how many greedy flags differ, and the accuracy by either.

A base with random weights has one token to a byte; here it gets byte-pair tokens learnt from the questions instead
(8,192 entries, three to four bytes each), so that prompts have about the tokens they would have with its own tokenizer.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from transformers import GenerationConfig, PreTrainedTokenizerFast

import compression
from bench.data.sources import open_data
from bench.data.tasks.table import SEED, SUITE
from bench.measure.scoring.lm_eval import Scorer
from bench.measure.scoring.prepare import Prepared, prepare

LIMITS = {"mmlu": 20, "hellaswag": 100, "gsm8k": 10}  # questions; of MMLU of each subject
EQUAL = ("hellaswag", "arc_easy", "arc_challenge", "mmlu", "gsm8k", "boolq", "piqa", "winogrande")
BATCHES = (1, 4, 16, 64)


def byte_pairs(folder: Path, entries: int = 8192) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learnt from the texts of HellaSwag, GSM8K and MMLU in the folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    files = [*folder.glob("hellaswag/*.jsonl"), *folder.glob("gsm8k/train.jsonl"), *folder.glob("mmlu/test/*.csv")]
    trainer = trainers.BpeTrainer(
        vocab_size=entries, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["</s>"],
        show_progress=False,
    )  # fmt: skip
    tokenizer.train([str(path) for path in sorted(files)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


def ask(lm: Any, prepared: Prepared, limit: int) -> tuple[tuple[float, float], list[Any], float]:
    """Seconds and seconds of processor, responses in order of the requests, and accuracy."""
    parts = list(prepared.parts.values())
    for part in parts:
        part.set_fewshot_seed(seed=SEED)
        part.build_all_requests(limit=limit, rank=0, world_size=1)
    requests = [instance for part in parts for instance in part.instances]
    begin = time.perf_counter(), time.process_time()
    found = getattr(lm, requests[0].request_type)(requests, disable_tqdm=True)
    seconds = time.perf_counter() - begin[0], time.process_time() - begin[1]
    for instance, response in zip(requests, found, strict=True):
        instance.resps = [response]
    right, count, task = 0.0, 0, prepared.task
    for part in parts:
        part.apply_filters()
        for number, doc in part.doc_iterator(rank=0, limit=limit, world_size=1):
            mine = sorted((i for i in part.instances if i.doc_id == number), key=lambda i: i.idx)
            right += part.process_results(doc, [i.filtered_resps[task.filter] for i in mine])[task.metric]
            count += 1
    return seconds, found, right / count


def best_batch(model: Any, tokenizer: Any, prepared: Prepared, limit: int) -> int:
    """The batch size at which HFLM is fastest, on a tenth of the requests."""
    part = next(iter(prepared.parts.values()))
    part.set_fewshot_seed(seed=SEED)
    part.build_all_requests(limit=limit, rank=0, world_size=1)
    few = part.instances[: max(8, len(part.instances) * len(prepared.parts) // 10)]
    times = {}
    for batch in BATCHES:
        if batch > len(few) and batch > 8:
            continue
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
        begin = time.process_time()
        getattr(lm, few[0].request_type)(few, disable_tqdm=True)
        times[batch] = time.process_time() - begin
    return min(times, key=times.__getitem__)


def row(model: Any, tokenizer: Any, prepared: Prepared, limit: int, equal: bool) -> str:
    batch = 1 if equal else best_batch(model, tokenizer, prepared, limit)
    (ours, work), found, right = ask(Scorer(model, tokenizer), prepared, limit)
    (theirs, more), expected, also = ask(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch), prepared, limit)
    if isinstance(found[0], str):
        same = sum(a == b for a, b in zip(found, expected, strict=True))
        what = f"{same} of {len(found)} answers the same"
    else:
        off = max(abs(a[0] - b[0]) for a, b in zip(found, expected, strict=True))
        flags = sum(a[1] != b[1] for a, b in zip(found, expected, strict=True))
        what = f"log-likelihoods within {off:.1e} nat, {flags} greedy flags differ"
    return (f"{prepared.task.name:14} HFLM (batch {batch}) {theirs:.1f} s, ours {ours:.1f} s, {theirs / ours:.2f}x; "
            f"of processor {more:.1f} and {work:.1f} s, {more / work:.2f}x; "
            f"{len(found)} requests, {what}; accuracy {also:.4f} and {right:.4f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Our scorer beside lm-eval's HFLM.")
    parser.add_argument("--base", default="random:qwen2.5-0.5b")
    parser.add_argument("--data", default=os.environ.get("BENCH_DATA"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tasks", help="default: those that are timed, with --equal those that are compared")
    parser.add_argument("--limit", type=int, help="questions (of MMLU: of each subject); default 20, 100, 10")
    parser.add_argument("--subjects", type=int, default=5, help="of MMLU")
    parser.add_argument("--equal", action="store_true", help="one request at a time: for the scores, not the time")
    options = parser.parse_args()
    if options.data is None:
        parser.error("give --data DIR or set BENCH_DATA: a folder with mmlu, hellaswag, gsm8k ...")
    base = compression.open_base(options.base, options.device)
    model = base.model.to(getattr(torch, options.dtype))
    model.generation_config = GenerationConfig()
    random = options.base.startswith("random:")
    tokenizer = byte_pairs(Path(options.data)) if random else base.tokenizer
    data = open_data(options.data, base=options.base)
    print(f"{options.base}, {options.dtype}, {options.device}, {torch.get_num_threads()} threads", flush=True)
    for name in options.tasks.split(",") if options.tasks else EQUAL if options.equal else LIMITS:
        prepared = prepare(SUITE[name], data)
        if name == "mmlu":
            chosen = list(prepared.parts.items())[: options.subjects]
            prepared = Prepared(prepared.task, dict(chosen), prepared.data)
        limit = options.limit or LIMITS.get(name, 20)
        print(row(model, tokenizer, prepared, limit, options.equal), flush=True)


if __name__ == "__main__":
    main()
