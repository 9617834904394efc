"""The tokenizer that student and teacher share: one entry for every word of the world, and bytes for all else.

A text is cut into words (with the space before them), numbers, and runs of other signs, as GPT-2 does it, with `Q:` and
`A:` as words of their own and a line's end joined to the signs before it. A piece that training text holds is one
entry; any other is spelled in bytes, so every text round-trips. Numbers of the world stand whole (0 to 99 and a few
more): sums are learnt as tables. Nothing is prepended or appended on its own; `<s>` and `</s>` are parsed where a text
spells them out. There are no merges, so pieces never depend on their neighbours.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ENTRIES = 1024
BOS, EOS, PAD = "<s>", "</s>", "<pad>"  # ids 0, 1, 2
PIECES = r"[QA]:| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+\n*|\n+| +(?!\S)|\s"


def build(texts: Iterable[str], *, entries: int = ENTRIES, context: int = 2048) -> "PreTrainedTokenizerFast":
    """A tokenizer of `entries` entries: specials, bytes, every piece of the texts, and unused ones to fill up.

    `context` is the longest input in tokens that it declares. Raises ValueError if the texts have too many pieces.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    cut = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    pieces = {piece for text in texts for piece, _ in cut.pre_tokenize_str(text)}
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    known = [BOS, EOS, PAD, *letters, *sorted(pieces - set(letters))]
    if len(known) > entries:
        raise ValueError(f"the texts need {len(known)} entries, not entries={entries}: give fewer")
    known += [f"<unused{n}>" for n in range(entries - len(known))]
    core = Tokenizer(models.BPE(vocab={piece: n for n, piece in enumerate(known)}, merges=[], ignore_merges=True))
    core.pre_tokenizer, core.decoder = cut, decoders.ByteLevel()
    core.add_special_tokens([AddedToken(text, special=True) for text in (BOS, EOS, PAD)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
