"""How near the log-probabilities of engines are to ours, for what this package exports.

python benchmarks/engines_agree.py --data FOLDER --calibration FOLDER --runtime-python vllm=PATH --blas-library PATH

Writes figures/engines-agree.md. Each export of SmolLM2 is opened by an engine, and both score the same text. Ours are
computed in fp32 from the weights that the checkpoint stores.
Rounded activations amplify what two precisions differ by: rows `native` are this package in bf16 beside itself, and no
engine can be nearer. Greedy tokens are compared up to the first that differs; where the two likeliest are nearly alike
in our distribution, rounding decides.

llama.cpp's own kernels round what enters a product to 8 bits beside quantized weights, and to BF16 beside BF16; the
differences are of that size. Built with a BLAS library (GGML_BLAS), it multiplies prompts of 32 tokens and more by
dequantized weights, as we do: `--blas-library` names such a libllama, and what llama.cpp opens is compared on both.
K types hold rows of a multiple of 256, which SmolLM2 does not have: they are compared on a seeded model of width 512.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import compression
from bench.data.sources import open_data
from bench.measure.engines import environments
from bench.measure.engines.engine import Engine, Options
from bench.measure.perplexity import checked_samples
from bench.measure.perplexity_windows import PerplexityProtocol

FILE = Path(__file__).parent / "figures" / "engines-agree.md"
FEW = "samples=32"
BASE, WIDE = "smollm2", "seeded, width 512"
EXPORTS = (  # engine, recipe, format, and the base if it is not SmolLM2
    ("vllm", "fp16", "own"),
    ("vllm", "rtn(group_size=64)", "compressed-tensors"),
    ("vllm", f"gptq(group_size=64,symmetric=true,{FEW})", "compressed-tensors"),
    ("vllm", f"awq(group_size=64,{FEW})", "compressed-tensors"),
    ("vllm", f"gptq(group_size=64,symmetric=true,{FEW})", "gptq"),
    ("vllm", f"awq(group_size=64,{FEW})", "awq"),
    ("vllm", "int8", "compressed-tensors"),
    ("vllm", "fp8", "compressed-tensors"),
    ("native", "int8", "own"),
    ("native", "fp8", "own"),
    ("transformers", "nf4", "bitsandbytes"),
    ("transformers", f"gptq(group_size=64,symmetric=true,{FEW})", "compressed-tensors"),
    ("llama.cpp", "fp16", "gguf"),
    ("llama.cpp", "gguf(type=q8_0)", "gguf"),
    ("llama.cpp", "gguf(type=q4_0)", "gguf"),
    ("llama.cpp", "gguf(type=q4_1)", "gguf"),
    ("llama.cpp", "rtn(group_size=32,symmetric=true)", "gguf"),
    ("llama.cpp", "gguf(type=q4_k)", "gguf", WIDE),
    ("llama.cpp", "gguf(type=q6_k)", "gguf", WIDE),
    ("llama.cpp", "gguf(type=q4_k_m)", "gguf", WIDE),
)
BLAS = "llama.cpp with BLAS"
DTYPES = {"vllm": "float16", "native": "bfloat16"}  # of engines that are asked for one
NEW_TOKENS, PROMPT = 48, 64


class Ours:
    """This package in the place of an engine, in the dtype that the model has."""

    def __init__(self, model: Any):
        self.model = model

    def logprobs(self, texts: Sequence[Sequence[int]]) -> list[Any]:
        return [argparse.Namespace(logprobs=each.tolist()) for each in logprobs(self.model, texts)]

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int, *, ignore_eos: bool) -> list[Any]:
        import torch

        ids = [list(each) for each in prompts]
        with torch.inference_mode():
            for _ in range(tokens):
                for each in ids:
                    each.append(int(self.model(input_ids=torch.tensor([each])).logits[0, -1].argmax()))
        return [argparse.Namespace(ids=each[-tokens:]) for each in ids]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Differences of log-probabilities, engine less ours, in nat; and greedy tokens until the first that differs."""

    mean: float
    absolute: float
    largest: float
    tokens: int
    greedy: int
    gap: float | None  # nat between our two likeliest tokens at the first that differs; None where none does


def agreement(engine: Engine | Ours, model: Any, texts: Sequence[Sequence[int]]) -> Agreement:
    """Of an engine and a model in fp32."""
    import torch

    off = difference(engine, model, texts)
    with torch.inference_mode():
        (said,) = engine.generate([list(texts[0][:PROMPT])], NEW_TOKENS, ignore_eos=True)
        rows = model(input_ids=torch.tensor([[*texts[0][:PROMPT], *said.ids]])).logits[0, PROMPT - 1 : -1].float()
    greedy = int((rows.argmax(-1) == torch.tensor(said.ids)).int().cumprod(0).sum())
    gap = None
    if greedy < NEW_TOKENS:
        first, second = rows[greedy].log_softmax(-1).topk(2).values.tolist()
        gap = first - second
    return Agreement(mean=float(off.mean()), absolute=float(off.abs().mean()), largest=float(off.abs().max()),
                     tokens=len(off), greedy=greedy, gap=gap)  # fmt: skip


def difference(engine: Engine | Ours, model: Any, texts: Sequence[Sequence[int]]) -> Any:
    """Of the log-probabilities of all tokens, engine less ours."""
    import torch

    given = torch.cat([torch.tensor(scores.logprobs) for scores in engine.logprobs([list(each) for each in texts])])
    return given - torch.cat(list(logprobs(model, texts)))


def logprobs(model: Any, texts: Sequence[Sequence[int]]) -> Iterator[Any]:
    """Of every token after the first, for each text."""
    import torch

    for ids in texts:
        with torch.inference_mode():
            rows = model(input_ids=torch.tensor([list(ids)])).logits[0, :-1].float().log_softmax(-1)
        yield rows.gather(1, torch.tensor(ids)[1:, None])[:, 0]


def wide(folder: Path, like: Any) -> str:
    """A checkpoint of seeded weights whose rows have 512 and 1,024 numbers, with the tokenizer of another base."""
    import torch
    import transformers

    config = transformers.LlamaConfig.from_dict(like.model.config.to_dict() | {
        "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4,
        "num_hidden_layers": 4, "initializer_range": 0.05,
    })  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(like.model.dtype)
    model.save_pretrained(folder)
    like.tokenizer.save_pretrained(folder)
    return str(folder)


def measured(options: argparse.Namespace) -> Iterator[tuple[tuple[str, ...], Agreement]]:
    """What was exported, and how an engine agrees."""
    pythons = environments.pythons(options.runtime_python or ())
    first = compression.open_base(BASE)
    data, protocol = open_data(options.data, base=BASE), PerplexityProtocol(samples=options.windows)
    texts = [each.ids for each in checked_samples(first.model.config, first.tokenizer, data, protocol)]
    results: dict[tuple[str, str], Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, recipe, format, *named in EXPORTS:
            if options.engine not in (None, name):
                continue
            base = wide(Path(folder) / "wide", first) if named else BASE
            key = (recipe, base)
            if key not in results:
                results[key] = compression.compress(base, recipe, calibration=options.calibration)
            what = (recipe, format, *(named or [BASE]))
            yield (name, *what), compared(results[key], name, format, texts, pythons)
            if name == "llama.cpp" and options.blas_library:
                yield (BLAS, *what), compared(results[key], name, format, texts, pythons, options.blas_library)


def compared(
    result: Any, name: str, format: str, texts: Sequence[Sequence[int]], pythons: Any, library: str | None = None
) -> Agreement:
    """One export, opened by one engine; of llama.cpp with the library of that path."""
    import torch

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        if library:
            patch.setenv("COMPRESSION_LLAMA_CPP_LIBRARY", library)
        path = result.save(Path(folder) / "model", format)
        ours = compression.load(path) if result.stored or format != "own" else compression.compress(str(path), "fp16")
        if name == "native":
            return agreement(Ours(compression.load(path).model.to(torch.bfloat16)), ours.model.float(), texts)
        known = Options(dtype=DTYPES.get(name, "auto"), max_length=1024, threads=2)
        target = next(iter(path.glob("*.gguf")), path)
        python = environments.python_of(name, pythons)
        with Engine.start(name, target, log=Path(folder) / "log", python=python, options=known) as engine:
            return agreement(engine, ours.model.float(), texts)


def others(page: str, engine: str) -> list[str]:
    """The rows of other engines."""
    return [line for line in page.split("\n") if line.startswith("| ") and "`" in line and f"| {engine}" not in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--runtime-python", action="append", metavar="NAME=PATH")
    parser.add_argument("--blas-library", metavar="PATH", help="a libllama that was built with GGML_BLAS")
    parser.add_argument("--engine", choices=(*environments.ENGINES, "native"), help="of this engine alone; the "
                        "rows of others stay")  # fmt: skip
    parser.add_argument("--windows", type=int, default=4)
    options = parser.parse_args()
    rows = [] if options.engine is None else others(FILE.read_text(encoding="utf-8"), options.engine)
    for (name, recipe, format, base), found in measured(options):
        gap = "" if found.gap is None else f", then {found.gap:.3f}"
        engine = f"{name}, {DTYPES.get(name, 'as stored')}"
        off = (f"{found.mean:+.4f}", f"{found.absolute:.4f}", f"{found.largest:.2f}")
        cells = (engine, base, f"`{recipe}`", format, *off, f"{found.greedy} of {NEW_TOKENS}{gap}")
        rows.append(f"| {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    lines = [
        "# Engines and this package",
        "",
        "## Log-probabilities of exports",
        "",
        f"Of {found.tokens:,} tokens of {options.windows} windows of WikiText-2, engine less ours, in nat.",
        "",
        "Measured by `python benchmarks/engines_agree.py --data FOLDER --calibration FOLDER`.",
        "",
        "| engine | base | recipe | format | mean | mean absolute | largest | greedy tokens alike, gap "
        "at the first other |",
        "| :--- | :--- | :--- | :--- | ---: | ---: | ---: | :--- |",
        *rows,
    ]
    FILE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
