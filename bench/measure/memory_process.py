"""The process that holds one model alone, so that its memory can be measured: `python -m bench.measure.memory_process`.

Reads a `ChildSpec` as JSON from standard input and prints one line of JSON. What it opens must be in memory of its
own, as `compression` opens it: a weight mapped from a file is not anonymous memory.
"""

import json
import re
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import compression
from bench.measure.generation import Decoder, Load
from bench.measure.memory import ChildSpec, bytes_of
from compression.cost import give_back

_POLL_SECONDS = 0.002


def anonymous_memory() -> tuple[Callable[[], int], str]:
    """A function that gives the anonymous resident bytes of this process, and the name of where it reads them.

    Linux: RssAnon, a sum the kernel keeps, so that a reading takes microseconds however large the process is (from
    6.2 to 6.16 it is off by up to 32 pages for each thread); else the mapped pages are counted by smaps_rollup.
    Elsewhere psutil's unique set size, else its resident set.
    """
    for path, field in (("/proc/self/status", "RssAnon"), ("/proc/self/smaps_rollup", "Anonymous")):
        read = partial(_kilobytes, Path(path), re.compile(rf"^{field}:\s+(\d+) kB", re.MULTILINE))
        with suppress(OSError, LookupError):
            read()
            return read, field
    import psutil

    process = psutil.Process()
    with suppress(psutil.AccessDenied, AttributeError):
        process.memory_full_info().uss  # noqa: B018 - asks whether it may be read
        return (lambda: process.memory_full_info().uss), "unique set size"
    return (lambda: process.memory_info().rss), "resident set size"


def _kilobytes(path: Path, pattern: re.Pattern[str]) -> int:
    """Bytes by the line of `path` that `pattern` finds; LookupError if there is none."""
    found = pattern.search(path.read_text())
    if found is None:
        raise LookupError(f"{path} has no line that matches {pattern.pattern}")
    return int(found[1]) * 1024


class Peak:
    """The most anonymous bytes while the block runs, in `bytes` behind it.

    Linux keeps the largest resident set of a process and forgets it on request (clear_refs), so that no moment is too
    short to be seen; the pages of files are taken off as they are at the end. Where that cannot be asked for, a thread
    reads every 2 ms.
    """

    def __init__(self, read: Callable[[], int]) -> None:
        self._read = read
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self.bytes = 0

    def __enter__(self) -> "Peak":
        try:
            Path("/proc/self/clear_refs").write_text("5")
            _high_water()
        except (OSError, LookupError):
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        self.bytes = self._read()
        return self

    def _run(self) -> None:
        while not self._end.wait(_POLL_SECONDS):
            self.bytes = max(self.bytes, self._read())

    def __exit__(self, *_: object) -> None:
        if self._thread is None:
            self.bytes = max(self.bytes, _high_water())
        else:
            self._end.set()
            self._thread.join()
        self.bytes = max(self.bytes, self._read())


def _high_water() -> int:
    """The largest resident set since it was last forgotten, less the resident pages of files; LookupError: not told."""
    status = Path("/proc/self/status").read_text()
    found = dict(re.findall(r"^(VmHWM|RssFile|RssShmem):\s+(\d+) kB", status, re.MULTILINE))
    if len(found) < 3:
        raise LookupError("/proc/self/status does not show the high-water mark")
    return 1024 * (int(found["VmHWM"]) - int(found["RssFile"]) - int(found["RssShmem"]))


def measure(load: Callable[[], Any], run: Callable[[Any], object], *, loads: int = 1) -> tuple[Any, list[int], str]:
    """What `load` made, the peak bytes of it and of `run` beyond what was held before, and where they were read.

    Loads and runs so many times, letting go of what was loaded before; one peak for each. Where there are several, the
    first is left out: with it the libraries take, once for the process, what they keep.
    """
    read, source = anonymous_memory()
    peaks: list[int] = []
    loaded = None
    for _ in range(loads):
        del loaded
        give_back()
        before = read()
        loaded = load()
        give_back()
        with Peak(read) as peak:
            run(loaded)
        peaks.append(peak.bytes - before)
    return loaded, peaks[1:] or peaks, f"{source} of a child process"


def _warm_up() -> None:
    """Imports and runs, on tiny models, all that opening and generating need: after it only the model is new."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    for family in ("llama", "mistral", "qwen2", "qwen3"):
        config = AutoConfig.for_model(family, vocab_size=16, num_hidden_layers=1, **sizes)
        tiny = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
        Decoder(tiny, Load(prompt_tokens=4, new_tokens=2)).run()


def _open(spec: ChildSpec) -> Any:
    """The model that is measured."""
    if spec.kind == "base":
        return compression.open_base(spec.target, device="cpu", dequantize=True).model
    return compression.load(spec.target, device="cpu").model


def main() -> None:
    """Measures what standard input asks for."""
    import torch

    fields = json.load(sys.stdin)
    spec = ChildSpec(**fields | {"load": Load(**fields["load"])})
    torch.set_num_threads(spec.threads)
    _warm_up()

    def generate(model: Any) -> None:
        Decoder(model, spec.load).run()

    model, peaks, source = measure(lambda: _open(spec), generate, loads=spec.loads)
    print(json.dumps({"peaks": peaks, "model_bytes": bytes_of(model), "source": source}))


if __name__ == "__main__":
    main()
