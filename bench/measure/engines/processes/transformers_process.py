"""transformers as an engine: `generate` with its own cache, and a forward pass for log-probabilities."""

import os
import time

from serving import serve

SLICE = 128  # positions whose log-probabilities are computed at once


def open_model(model, dtype, threads, max_length, sequences, seed):
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
    import torch
    import transformers

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    options = {"dtype": dtype, "attn_implementation": "sdpa", "use_safetensors": True}
    opened = transformers.AutoModelForCausalLM.from_pretrained(
        model, local_files_only=True, trust_remote_code=False, **options
    ).eval()
    own_memory(opened)
    opened.generation_config = transformers.GenerationConfig()  # what the checkpoint says of sampling is not used
    facts = {
        "engine": "transformers", "version": transformers.__version__, "torch": torch.__version__,
        "transformers": transformers.__version__, "vocabulary": opened.config.get_text_config().vocab_size,
        "flags": options | {"threads": threads, "seed": seed, "dtype_of_weights": str(opened.dtype)},
    }  # fmt: skip
    return Model(opened), facts


def own_memory(model):
    """Copies weights that are mapped from the file, whose pages would not count as the model's memory."""
    import itertools

    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


class Model:
    def __init__(self, model):
        self.model = model

    def logprobs(self, prompts, top):
        import torch

        for prompt in prompts:
            ids = torch.tensor([prompt])
            values, best = [], []
            with torch.inference_mode():
                logits = self.model(input_ids=ids, use_cache=False).logits[0, :-1]
                for part, target in zip(logits.split(SLICE), ids[0, 1:].split(SLICE), strict=True):
                    found = part.float().log_softmax(-1)
                    values += found.gather(1, target[:, None])[:, 0].tolist()
                    largest = found.topk(top)
                    best += [
                        [list(pair) for pair in zip(*row, strict=True)]
                        for row in zip(largest.indices.tolist(), largest.values.tolist(), strict=True)
                    ]
            yield ids[0].tolist(), values, best

    def generate(self, prompts, new_tokens, stop_ids, sampling):
        import torch
        from transformers import GenerationConfig, StoppingCriteria

        steps = []

        class Steps(StoppingCriteria):
            """Is asked after every token, and stops nothing."""

            def __call__(self, input_ids, scores, **_):
                steps.append((input_ids[:, -1].tolist(), time.perf_counter()))
                return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        drawn = {}
        if sampling is not None:
            torch.manual_seed(sampling["seeds"][0])
            drawn = {"temperature": sampling["temperature"], "top_p": sampling["top_p"], "top_k": 0}
        config = GenerationConfig(
            do_sample=sampling is not None, max_new_tokens=new_tokens, eos_token_id=stop_ids or None, pad_token_id=0,
            **drawn,
        )  # fmt: skip
        with torch.inference_mode():
            self.model.generate(ids, attention_mask=mask, generation_config=config, stopping_criteria=[Steps()])
        live = list(range(len(prompts)))
        for tokens, moment in steps:
            yield from ((number, tokens[number], moment) for number in live)
            live = [number for number in live if tokens[number] not in stop_ids]


if __name__ == "__main__":
    serve(open_model)
