"""How long held-out text takes with the base's hidden states kept, beside reading the base anew for each recipe.

python benchmarks/base_read_once.py                       # the embedded reference, nf4
python benchmarks/base_read_once.py --base ./my-model --data ./texts --model rtn --samples 20

Both ways take turns in one process; times are processor time. Their readings are compared, every bit, before anything
is printed.
"""

import argparse
import statistics
import time

import compression
from bench.data.sources import open_data
from bench.measure.perplexity import KeptStates, perplexity
from bench.measure.perplexity_windows import PerplexityProtocol


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default="reference")
    parser.add_argument("--data")
    parser.add_argument("--model", default="nf4")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    base = compression.open_base(options.base)
    model = compression.compress(base, options.model).model
    data = open_data(options.data, base=options.base)
    protocol, states = PerplexityProtocol(samples=options.samples, batch_size=4), KeptStates(base.model)

    def read(kept: KeptStates | None) -> tuple[object, float]:
        begin = time.process_time()
        reading = perplexity(model, base.tokenizer, data, protocol, device="cpu", base=base.model, states=kept)
        return reading, time.process_time() - begin

    first, _ = read(states)
    anew, kept = [], []
    for _ in range(options.rounds):
        for kind, times in ((None, anew), (states, kept)):
            reading, seconds = read(kind)
            assert reading == first, "kept states changed a result"
            times.append(seconds)
    ratio = statistics.median(one / other for one, other in zip(kept, anew, strict=True))
    print(f"{options.samples} windows under {options.model}, {options.rounds} rounds in turn: base read anew "
          f"{statistics.median(anew):.2f} s, kept {statistics.median(kept):.2f} s, {ratio:.3f} of it")  # fmt: skip


if __name__ == "__main__":
    main()
