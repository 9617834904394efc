"""Tokenizers of every kind that text can meet, and models that write what they are told to."""

import itertools

import torch
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"
LETTERS = "ab :\n"
TEMPLATE = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
_MERGES = list(itertools.product("ab :", "ab :\n"))


def tokenizer_of(*, pieces=False, merges=(), begins=True, ends=False, named=True, template=False):
    """A tokenizer of letters and merges of two, with bytes for all else.

    Args:
        pieces: as SentencePiece: a space is a letter, one stands before each text, and decoding strips it.
        merges: pairs of letters.
        begins, ends: whether it puts BOS before and EOS behind a text.
        named: whether it knows them as such.
        template: whether its chat template begins with BOS; None for no template.
    """
    space = "\u2581" if pieces else "\u0120"
    seen = [tuple(letter.replace(" ", space).replace("\n", "\n" if pieces else "\u010a") for letter in pair)
            for pair in merges]  # fmt: skip
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = [f"<0x{n:02X}>" for n in range(256)] + [space, *LETTERS.replace(" ", "")] if pieces else letters
    known = [BOS, EOS, *dict.fromkeys([*base, *("".join(pair) for pair in seen)])]
    core = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(known)}, merges=seen, byte_fallback=pieces))
    if pieces:
        core.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
        core.decoder = decoders.Sequence([decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(),
                                          decoders.Strip(" ", 1, 0)])  # fmt: skip
    else:
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.decoder = decoders.ByteLevel()
    around = f"{BOS + ' ' if begins else ''}$A{' ' + EOS if ends else ''}"
    core.post_processor = processors.TemplateProcessing(single=around, special_tokens=[(BOS, 0), (EOS, 1)])
    core.add_special_tokens([BOS, EOS])
    names = {"bos_token": BOS, "eos_token": EOS} if named else {}
    made = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    if template is not None:
        made.chat_template = (BOS if template else "") + TEMPLATE
    return made


def tokenizers(**fixed):
    """Of all kinds."""
    flags = {name: st.booleans() for name in ("pieces", "begins", "ends", "template")}
    merges = st.lists(st.sampled_from(_MERGES), max_size=4, unique=True)
    given = flags | {"merges": merges} | {name: st.just(value) for name, value in fixed.items()}
    return st.fixed_dictionaries(given).map(lambda settings: tokenizer_of(**settings))


texts = st.text(LETTERS, max_size=8)
wide_texts = st.text(LETTERS + "é北", max_size=8)


def tiny(**sizes):
    """A small model with seeded weights that are far from uniform, and so in what it says."""
    common = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
              "num_attention_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3}  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**(common | sizes))).eval()


def writing(chain, vocabulary, **config):
    """A model whose next token depends on the last one alone: of a, b, c in `chain` b behind a, c behind b."""
    width = -(-vocabulary // 8) * 8
    model = LlamaForCausalLM(LlamaConfig(**({
        "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 256} | config))).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for norm in (model.model.norm, model.model.layers[0].input_layernorm,
                     model.model.layers[0].post_attention_layernorm):  # fmt: skip
            norm.weight.fill_(1)
        model.model.embed_tokens.weight[range(vocabulary), range(vocabulary)] = 1
        for one, next_ in itertools.pairwise(chain):
            model.lm_head.weight[next_, one] = 1
    return model


def words_tokenizer(*words, special=(), **more):
    """One token to a word, white space between; the first is the end of sequence."""
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token=words[1]))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=words[0], additional_special_tokens=list(special), **more
    )
