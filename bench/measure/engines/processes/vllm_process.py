"""vLLM as an engine: its V1 engine in this process, driven step by step, a step being a token of every sequence."""

import os
import time

from serving import serve

UNQUANTIZED = "Unquantized"  # how vLLM's names begin of layers that it leaves as they are
BLOCK = 256  # tokens that lengths are rounded up to, since vLLM hands out its cache in blocks
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def positions(config, max_length):
    """What vLLM is told: one more than the sequences have, for the token that it must generate to score a prompt."""
    known = getattr(config, "max_position_embeddings", max_length + 1)
    return max(max_length, min(max_length + 1, known))


def kv_bytes(config, dtype, length, sequences, devices):
    """Bytes of keys and values on a device for so many sequences, in whole blocks, of which one more is needed.

    vLLM takes this memory at the start, whatever is generated; by default much more.
    """
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    element = 4 if "float32" in (dtype, str(config.dtype).removeprefix("torch.")) else 2
    heads = max(1, heads // devices)
    blocks = sequences * -(-length // BLOCK) + 1
    return blocks * BLOCK * 2 * config.num_hidden_layers * heads * size * element


def ways(model):
    """How vLLM multiplies by the layers of a model, experts included: names of its classes."""
    methods = {type(each.quant_method).__name__ for each in model.modules() if hasattr(each, "quant_method")}
    return sorted(name for name in methods if "Linear" in name or "MoE" in name)


def open_model(model, dtype, threads, max_length, sequences, seed, quantization=None, devices=1):
    os.environ.update(ENVIRONMENT, OMP_NUM_THREADS=str(threads))  # before torch is imported
    import torch
    import transformers
    import vllm

    config = transformers.AutoConfig.from_pretrained(
        model, local_files_only=True, trust_remote_code=False
    ).get_text_config()
    length = positions(config, max_length)
    flags = {
        "dtype": dtype, "max_model_len": length, "max_num_seqs": sequences, "seed": seed, "enforce_eager": True,
        "kv_cache_memory_bytes": kv_bytes(config, dtype, length, sequences, devices),
        "enable_prefix_caching": False, "async_scheduling": False, "skip_tokenizer_init": True,
        "generation_config": "vllm", "load_format": "safetensors", "max_logprobs": -1,
        "quantization": quantization, "tensor_parallel_size": devices,
    }  # fmt: skip
    opened = vllm.LLM(model, trust_remote_code=False, **flags)
    layers = opened.apply_model(ways)[0]
    if quantization is not None and all(way.startswith(UNQUANTIZED) for way in layers):
        raise ValueError(f"vLLM takes quantization={quantization} and leaves every layer of this model as it is")
    config = opened.llm_engine.model_config
    facts = {
        "engine": "vllm", "version": vllm.__version__, "torch": torch.__version__,
        "transformers": transformers.__version__, "vocabulary": config.get_vocab_size(),
        "flags": flags | ENVIRONMENT | {"threads": torch.get_num_threads(), "dtype_of_weights": str(config.dtype),
                                        "quantization": str(config.quantization), "layers": layers},
    }  # fmt: skip
    return Model(opened), facts


class Model:
    def __init__(self, model):
        self.model, self.engine = model, model.llm_engine
        self.requests = 0

    def _add(self, prompt, **options):
        """Submit a prompt; the name of its request."""
        from vllm import SamplingParams

        self.requests += 1
        name = str(self.requests)
        parameters = SamplingParams(**{"temperature": 0} | options, detokenize=False, ignore_eos=True)
        self.engine.add_request(name, {"prompt_token_ids": prompt}, parameters)
        return name

    def _steps(self, names, submit=lambda idle: None):
        """(number of the prompt, output, moment) as they arrive; what fails leaves no request behind.

        Before each step `submit` may add names; if the engine is idle, it waits until it has one to add.
        """
        try:
            while True:
                submit(not self.engine.has_unfinished_requests())
                if not self.engine.has_unfinished_requests():
                    return
                outputs, moment = self.engine.step(), time.perf_counter()
                yield from ((names.index(output.request_id), output, moment) for output in outputs)
        except BaseException:
            self.engine.abort_request(names)
            raise

    def logprobs(self, prompts, top):
        for prompt in prompts:
            for _, output, _ in self._steps([self._add(prompt, max_tokens=1, prompt_logprobs=top)]):
                tokens, found = list(output.prompt_token_ids), output.prompt_logprobs
            values = [row[token].logprob for token, row in zip(tokens[1:], found[1:], strict=True)]
            best = [
                sorted(([id, each.logprob] for id, each in row.items()), key=lambda pair: -pair[1])[:top]
                for row in found[1:]
            ]
            yield tokens, values, best

    def generate(self, prompts, new_tokens, stop_ids, sampling):
        drawn = [{}] * len(prompts)
        if sampling is not None:
            seeds = sampling.pop("seeds")
            drawn = [sampling | {"seed": seed} for seed in seeds]
        names = [
            self._add(prompt, max_tokens=new_tokens, stop_token_ids=stop_ids, **each)
            for prompt, each in zip(prompts, drawn, strict=True)
        ]
        yield from new_of(self._steps(names))

    def arrive(self, prompts, moments, new_tokens):
        names = []

        def submit(idle):
            while len(names) < len(prompts):
                if (left := moments[len(names)] - time.perf_counter()) > 0:
                    if not idle:
                        return
                    time.sleep(left)
                names.append(self._add(prompts[len(names)], max_tokens=new_tokens))
                idle = False

        yield from new_of(self._steps(names, submit))


def new_of(steps):
    """(number of the prompt, token, moment) of each token that a step adds to what was told before."""
    told = {}
    for number, output, moment in steps:
        ids = output.outputs[0].token_ids
        yield from ((number, token, moment) for token in ids[told.get(number, 0) :])
        told[number] = len(ids)


if __name__ == "__main__":
    serve(open_model)
