"""Whether student and teacher mean the same by a token."""

import hashlib
import json
from typing import Any

from compression.errors import TeacherError

_PROBE = (
    "The 3 quick brown foxes' 1,024 jumps, over 27.5 dogs?\n\n    def f(x_1, y):\n\treturn {'key': [x_1 ** 2, y]}\n"
    "https://example.org/a-b?c=d&e=%20  naïve café Übermaß señor Привет мир 你好世界 こんにちは مرحبا 🙂 ½ “so” — on…"
)


def shared_vocabulary(
    student: Any, teacher: Any, rows: tuple[int, int], *, allow_vocab_mismatch: bool = False
) -> int:  # fmt: skip
    """How many tokens student and teacher have in common: the smaller number of rows, once the tokenizers agree.

    They agree if every id that both know is the same token, and both cut a text of a few scripts and some code into the
    same ids. One may know more tokens than the other, behind those that both know, and have more rows than tokens.

    Args:
        student, teacher: their tokenizers (transformers).
        rows: logits that student and teacher give.
        allow_vocab_mismatch: take ids to mean the same although the tokenizers say otherwise.

    Raises:
        TeacherError: the tokenizers disagree, or one is missing; names the first tokens that differ.
    """
    if allow_vocab_mismatch:
        return min(rows)
    way_out = "give a teacher of the student's tokenizer, or allow_vocab_mismatch=true to take ids to mean the same"
    if student is None or teacher is None:
        missing = " and ".join(name for name, each in (("student", student), ("teacher", teacher)) if each is None)
        raise TeacherError(f"the {missing} has no tokenizer to compare; {way_out}")
    ours, theirs = ({number: token for token, number in each.get_vocab().items()} for each in (student, teacher))
    both = min(max(ours), max(theirs)) + 1
    different = [i for i in range(both) if ours.get(i) != theirs.get(i)]
    if different:
        named = "; ".join(f"id {i} is {ours.get(i)!r} and {theirs.get(i)!r}" for i in different[:3])
        raise TeacherError(f"student and teacher have different tokenizers, {len(different)} of {both} tokens: "
                           f"{named}; {way_out}")  # fmt: skip
    found = [each.encode(_PROBE, add_special_tokens=False) for each in (student, teacher)]
    if found[0] != found[1]:
        at = next((i for i, (one, other) in enumerate(zip(*found, strict=False)) if one != other), min(map(len, found)))
        tokens = [
            each.convert_ids_to_tokens(some[at : at + 3]) for each, some in zip((student, teacher), found, strict=True)
        ]
        raise TeacherError(f"student and teacher have the same tokens but cut text otherwise: {tokens[0]} "
                           f"and {tokens[1]} of the same words; {way_out}")  # fmt: skip
    return min(rows)


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 of how a tokenizer cuts text, "none" without one; padding and truncation, set by calls, are left out."""
    if tokenizer is None:
        return "none"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = sorted(tokenizer.get_vocab().items()) if backend is None else json.loads(backend.to_str())
    if isinstance(state, dict):
        state = {key: value for key, value in state.items() if key not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
