"""llama.cpp as an engine: a GGUF file, decoding of all sequences in one batch, keys and values in fp16.

The library is that of xllamacpp, or the one that COMPRESSION_LLAMA_CPP_LIBRARY names: one that the user built.
Tokens are drawn here from llama.cpp's logits: its own samplers apply top_p before the temperature, all others behind.
"""

import os
import time

from serving import serve

BATCH = 512  # tokens of a prompt that are computed at once, llama.cpp's default
SLICE = 128  # positions whose logits are held at once
LIBRARY = "COMPRESSION_LLAMA_CPP_LIBRARY"


def open_model(model, dtype, threads, max_length, sequences, seed):
    if dtype != "auto":
        raise ValueError(f"dtype must be auto, not {dtype}: llama.cpp computes in the types of the file")
    os.environ["OMP_NUM_THREADS"] = str(threads)  # before the library is loaded
    import xllamacpp
    from llama_library import Model as Library

    flags = {"threads": threads, "positions": max_length, "sequences": sequences, "batch": BATCH}
    named = os.environ.get(LIBRARY)
    opened = Library(named or xllamacpp.xllamacpp.__file__, model, **flags)
    facts = {
        "engine": "llama.cpp", "version": f"library {named}" if named else f"xllamacpp {xllamacpp.__version__}",
        "torch": None, "transformers": None, "vocabulary": opened.vocabulary,
        "flags": flags | {"mmap": False, "kv_cache": "f16", "weights": opened.description, "system": opened.system},
    }  # fmt: skip
    return Model(opened), facts


def parts(entries, size):
    return [entries[start : start + size] for start in range(0, len(entries), size)]


def chooser(sampling):
    """What chooses a token from the number of its prompt and its logits (vocabulary,)."""
    import numpy

    if sampling is None:
        return lambda _, logits: int(logits.argmax())
    draws = [numpy.random.default_rng(seed) for seed in sampling["seeds"]]

    def drawn(number, logits):
        scaled = logits.astype(numpy.float64) / sampling["temperature"]
        order = numpy.argsort(-scaled, kind="stable")
        shares = numpy.exp(scaled[order] - scaled[order[0]])
        reached = numpy.cumsum(shares) / shares.sum()
        kept = int(numpy.searchsorted(reached, sampling["top_p"])) + 1  # the likelier ones do not reach top_p
        reached = reached[:kept]
        at = numpy.searchsorted(reached, draws[number].random() * reached[-1], side="right")
        return int(order[min(at, len(reached) - 1)])

    return drawn


class Model:
    def __init__(self, library):
        self.library = library

    def logprobs(self, prompts, top):
        import numpy

        for prompt in prompts:
            self.library.clear()
            values, best = [], []
            entries = [(token, place, 0, True) for place, token in enumerate(prompt[:-1])]
            for part in parts(entries, SLICE):
                logits = numpy.array(self.library.decode(part), dtype=numpy.float64)
                logits -= logits.max(1, keepdims=True)
                logits -= numpy.log(numpy.exp(logits).sum(1, keepdims=True))
                for row, (_, place, _, _) in zip(logits, part, strict=True):
                    values.append(float(row[prompt[place + 1]]))
                    ids = numpy.argpartition(-row, top)[:top] if top else ()
                    best.append(sorted([[int(id), float(row[id])] for id in ids], key=lambda pair: -pair[1]))
            yield prompt, values, best

    def generate(self, prompts, new_tokens, stop_ids, sampling):
        self.library.clear()
        choose = chooser(sampling)
        entries = [
            (token, place, number, place == len(prompt) - 1)
            for number, prompt in enumerate(prompts)
            for place, token in enumerate(prompt)
        ]
        left = [new_tokens] * len(prompts)
        while entries:
            later = []
            for part in parts(entries, BATCH):
                last = [(place, number) for _, place, number, wanted in part if wanted]
                for (place, number), logits in zip(last, self.library.decode(part), strict=True):
                    token = choose(number, logits)
                    yield number, token, time.perf_counter()
                    left[number] -= 1
                    if left[number] and token not in stop_ids:
                        later.append((token, place + 1, number, True))
            entries = later


if __name__ == "__main__":
    serve(open_model)
