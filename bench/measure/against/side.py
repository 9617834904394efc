"""One side of `against.commit`: a process that opens a model with one state of the code and generates on request.

It is run as a file, with PYTHONPATH naming the code to measure, which may be older than this file: of `bench` and
`compression` it uses what both sides have had for long. Reads lines of JSON and answers each with one: first what to
open, then the number of a round, until the input ends. An answer is what the line asked for, or {"error": words,
"kind": name of its type}.
"""

import json
import os
import sys
from typing import Any


def opened(given: dict[str, Any]) -> Any:
    """The model of a job: the base, or what is in `folder`, where it is put first if it is not there yet."""
    import compression

    base = {"seed": given["seed"], "dequantize": True}
    if given["recipe"] is None:
        return compression.open_base(given["base"], given["device"], **base)
    if not os.path.exists(given["folder"]):
        options = {name: given[name] for name in ("calibration", "seed") if given[name] is not None}
        made = compression.compress(compression.open_base(given["base"], given["device"], **base), given["recipe"],
                                    **options)  # fmt: skip
        made.save(given["folder"])
    return compression.load(given["folder"], given["device"])


def decoder_of(given: dict[str, Any]) -> Any:
    """What generates, warmed up."""
    try:
        from bench.measure.generation import Decoder, Load
    except ModuleNotFoundError:  # a commit from before this module moved
        from bench.generation import Decoder, Load  # type: ignore[import-not-found,no-redef]

    if given["device"].startswith("cuda:"):
        import torch

        torch.cuda.set_device(given["device"])
    model = opened(given)
    decoder = Decoder(model.model, Load(**given["load"]), mode=given["mode"], seed=given["seed"])
    for number in range(given["warmup"]):
        decoder.run(number)
    return decoder


def main() -> None:
    """Answer until there is nothing more to answer."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    decoder = None
    for line in sys.stdin:
        try:
            asked = json.loads(line)
            if decoder is None:
                decoder, answer = decoder_of(asked), {}
            else:
                done = decoder.run(asked)
                names = ("ttft_s", "prefill_s", "steps_s", "total_s", "kv_bytes", "tokens")
                answer = {name: getattr(done, name) for name in names} | {"waits_s": getattr(done, "waits_s", ())}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}", "kind": type(error).__name__}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
