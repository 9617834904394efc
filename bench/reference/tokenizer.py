"""The byte-level BPE tokenizer that student and teacher share.

Every text round-trips, since all 256 bytes are entries. Digits stand alone, so that numbers are read place by place.
Nothing is prepended or appended on its own: the first entry of an encoded text is its first piece. `<s>` and `</s>`
are parsed where a text spells them out.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ENTRIES = 1536
BOS, EOS, PAD = "<s>", "</s>", "<pad>"  # ids 0, 1, 2


def build(texts: Iterable[str], *, entries: int = ENTRIES, context: int = 2048) -> "PreTrainedTokenizerFast":
    """Train a tokenizer of `entries` entries on the texts; `context` is the longest input in tokens that it declares.

    Raises ValueError if the texts do not yield that many entries.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=entries,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    if core.get_vocab_size() != entries:
        raise ValueError(f"the texts yield {core.get_vocab_size()} entries, not entries={entries}: give more texts")
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
