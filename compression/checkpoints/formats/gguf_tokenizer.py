"""Tokenizers in GGUF: byte-level BPE under the names that llama.cpp has for how text is cut before merges.

llama.cpp cuts by rules of its own, chosen by a name (`tokenizer.ggml.pre`; llama-vocab.cpp). A tokenizer is written if
its steps are those of a name below, and refused if not: under a wrong name llama.cpp reads other tokens without a word.
"""

import json
from collections.abc import Callable
from typing import Any

from compression.errors import LayerError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
STEPS: dict[str, tuple[tuple[str, Any], ...]] = {  # what cuts text, in order
    "gpt-2": (("bytes", True),),
    "smollm": (("digits", True), ("bytes", True)),
    "qwen2": (("split", rf"{_WORDS}\p{{N}}{_REST}"), ("bytes", False)),
    "llama-bpe": (("split", rf"{_WORDS}\p{{N}}{{1,3}}{_REST}"), ("bytes", False)),
}
WHOLE_WORDS = ("llama-bpe",)  # a word that is a token is taken without merges
READ = {("gpt2", name) for name in STEPS if name != "smollm"}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # types of tokens
_ENDS = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}


def described(tokenizer: Any, size: int) -> dict[str, Any]:
    """What stands in the file under `tokenizer.`, for a vocabulary of `size`; of no tokenizer that there is none.

    Raises:
        LayerError: llama.cpp has no name for what it does, or it has more tokens than the model.
    """
    if tokenizer is None:
        return {"ggml.model": "none"}
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise LayerError(f"format gguf takes tokenizers of the library tokenizers, not {type(tokenizer).__name__}")
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    name, model = _name(whole), whole["model"]
    ids = tokenizer.get_vocab()
    if max(ids.values()) >= size:
        raise LayerError(f"format gguf takes at most as many tokens as the model has rows, {size:,}; the tokenizer has "
                         f"one numbered {max(ids.values()):,}")  # fmt: skip
    special = {each["content"]: each["special"] for each in whole["added_tokens"]}
    tokens, types = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    for token, i in ids.items():
        tokens[i] = token
        types[i] = NORMAL if token not in special else CONTROL if special[token] else USER_DEFINED
    merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
    said = {"ggml.model": "gpt2", "ggml.pre": name, "ggml.tokens": tokens, "ggml.token_type": types,
            "ggml.merges": merges}  # fmt: skip
    for end, key in _ENDS.items():
        if (number := getattr(tokenizer, f"{end}_token_id")) is not None:
            said[f"ggml.{key}"] = number
    found = tokenizer("a").input_ids
    said["ggml.add_bos_token"] = len(found) > 0 and found[0] == tokenizer.bos_token_id
    said["ggml.add_space_prefix"] = False
    if isinstance(tokenizer.chat_template, str):
        said["chat_template"] = tokenizer.chat_template
    return said


def built(value: Callable[[str], Any]) -> Any:
    """The tokenizer of a file whose values `value` gives by key."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    name, tokens = value("tokenizer.ggml.pre"), value("tokenizer.ggml.tokens")
    merges = [tuple(each.split(" ", 1)) for each in value("tokenizer.ggml.merges")]
    types = value("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    vocabulary = {token: i for i, token in enumerate(tokens) if types[i] != UNUSED}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=name in WHOLE_WORDS))
    cuts = {
        "bytes": lambda regex: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex),
        "split": lambda pattern: pre_tokenizers.Split(Regex(pattern), "isolated"),
        "digits": lambda alone: pre_tokenizers.Digits(individual_digits=alone),
    }
    made.pre_tokenizer = pre_tokenizers.Sequence([cuts[step](argument) for step, argument in STEPS[name]])
    made.decoder = decoders.ByteLevel()
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        made.add_tokens([AddedToken(token, normalized=False, special=special)
                         for token, each in zip(tokens, types, strict=True) if each == kind])  # fmt: skip
    ends = {f"{end}_token": tokens[number] for end, key in _ENDS.items()
            if (number := value(f"tokenizer.ggml.{key}")) is not None}  # fmt: skip
    if value("tokenizer.ggml.add_bos_token") and "bos_token" in ends:
        bos = ends["bos_token"]
        made.post_processor = processors.Sequence([
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B",
                                          special_tokens=[(bos, vocabulary[bos])]),
        ])  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=value("tokenizer.chat_template"), **ends)


def _name(whole: dict[str, Any]) -> str:
    """llama.cpp's name of how a tokenizer cuts text."""
    model, normalizer = whole["model"], whole["normalizer"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise LayerError(f"format gguf is written with tokenizers of byte-level BPE, not {model['type']}"
                         + (" with byte fallback" if model.get("byte_fallback") else ""))  # fmt: skip
    cuts = tuple(_steps(whole["pre_tokenizer"] or {"type": "none"}))
    name = next((each for each, steps in STEPS.items() if steps == cuts), None)
    if name is None:
        raise LayerError(f"the tokenizer cuts text by {cuts!r:.300}, for which llama.cpp has no name that is known "
                         f"here; known are {', '.join(STEPS)}")  # fmt: skip
    if bool(model.get("ignore_merges")) != (name in WHOLE_WORDS):
        raise LayerError(f"the tokenizer has ignore_merges={bool(model.get('ignore_merges'))}, and llama.cpp does the "
                         f"opposite for {name}")  # fmt: skip
    if normalizer is not None and normalizer["type"] != "NFC":  # of Qwen, which llama.cpp passes over
        raise LayerError(f"the tokenizer normalizes text by {normalizer['type']}, which llama.cpp does not")
    return name


def _steps(step: dict[str, Any]) -> list[tuple[str, Any]]:
    kind = step["type"]
    if kind == "Sequence":
        return [each for inner in step["pretokenizers"] for each in _steps(inner)]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return [("bytes", step["use_regex"])]
    if kind == "Digits":
        return [("digits", step["individual_digits"])]
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"] and "Regex" in step["pattern"]:
        return [("split", step["pattern"]["Regex"])]
    return [(kind, None)]
