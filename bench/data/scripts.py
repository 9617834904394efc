"""Words and sentences in any script, for overlap, lexical search and chunking.

Texts are compared in lower case and in Unicode's composed form (NFC), so that é is é however it was typed. A word is a
run of letters, the marks on them, and digits. Chinese, Japanese, Thai, Lao, Khmer, Burmese and Tibetan are written
without spaces: each of their letters, with its marks, is a word by itself. For ASCII texts all of this is what the
published definitions say.
"""

import itertools
import unicodedata
from collections.abc import Sequence

import regex

_SPACELESS = r"[[\p{Han}\p{Hiragana}\p{Katakana}ーｰ\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}]&&\p{L}]"
_RUN = rf"(?:(?!{_SPACELESS})[\p{{L}}\p{{M}}\p{{N}}])+"
_ONE = rf"{_SPACELESS}\p{{M}}*"
_WORD = regex.compile(rf"(?V1){_ONE}|{_RUN}")
_JOINED = regex.compile(rf"(?V1){_ONE}|{_RUN}(?:['\u2019]{_RUN})*")
_PHRASE = regex.compile(rf"(?V1)((?:{_ONE})+)|{_RUN}")
_PIECE = regex.compile(rf"(?V1)(?s:{_ONE}|(?:(?!{_SPACELESS}).)+)")
_TOKEN = regex.compile(
    rf"(?V1){_ONE}|(?:(?!{_SPACELESS})[\p{{L}}\p{{M}}\p{{N}}_])+|[^\p{{L}}\p{{M}}\p{{N}}_\s]\p{{M}}*"
)
_SENTENCE = regex.compile(
    r"""(?V1)(?<=[.!?\u2026\u061f\u06d4\u0589\u1362])["')\]\u201d\u2019\u00bb]*+\s+(?=["'(\[\u201c\u2018\u00ab\u00bf\u00a1]*+[\p{Lu}\p{Lt}\p{Lo}\p{N}])"""
    r"""|(?<=[\u3002\uff01\uff1f\uff61\u0964\u0965])["')\]\u201d\u2019\u00bb\u300d\u300f\uff09]*+\s*+(?=\S)|\n\s*\n"""
)
_PUNCTUATION = regex.compile(r"(?V1)[\p{P}$+<=>^`|~]")  # Unicode's, and the signs that Python's string.punctuation adds

ENGLISH_LETTERS = 0.9  # share of the letters that are of ASCII in a text that is taken as English
ENGLISH_WORDS = 0.08  # and of its words that are among these, which hardly another language has
_ENGLISH = frozenset(["are", "and", "but", "by", "if", "not", "of", "that", "the", "their", "then", "there", "these",
                      "they", "this", "to", "will", "with"])  # fmt: skip


def normal(text: str) -> str:
    """Lower case, composed.

    >>> normal("Cafe\\u0301") == normal("CAF\\u00c9") == "caf\\u00e9"
    True
    """
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).lower())


def words(text: str) -> list[str]:
    """The words of a text, normalised.

    >>> words("It's 4\\u00d7 \\u041c\\u043e\\u0441\\u043a\\u0432\\u0430!"), words("\\u6771\\u4eac 2020")
    (['it', 's', '4', 'москва'], ['東', '京', '2020'])
    """
    return _WORD.findall(normal(text))


def joined_words(text: str) -> list[str]:
    """The words of a text, with apostrophes within them.

    >>> joined_words("It's the dogs' 4.")
    ["it's", 'the', 'dogs', '4']
    """
    return _JOINED.findall(normal(text))


def search_terms(text: str) -> list[str]:
    """The words of a text; of scripts without spaces every two letters that follow each other, as Lucene searches them.

    >>> search_terms("\\u6771\\u4eac\\u90fd a")
    ['東京', '京都', 'a']
    """
    found = []
    for match in _PHRASE.finditer(normal(text)):
        if match[1] is None:
            found.append(match[0])
            continue
        letters = _WORD.findall(match[0])
        found += map("".join, itertools.pairwise(letters)) if len(letters) > 1 else letters
    return found


def pieces(text: str) -> list[str]:
    """A normalised text split at white space, and at the letters of scripts without spaces; punctuation is kept.

    >>> pieces("The  price is 42 coins."), pieces("\\u6771\\u4eac.")
    (['the', 'price', 'is', '42', 'coins.'], ['東', '京', '.'])
    """
    plain = normal(text)
    return plain.split() if plain.isascii() else [each for part in plain.split() for each in _PIECE.findall(part)]


def spaced(text: str) -> str:
    """A composed text, capitals kept, with every letter of a script without spaces set apart."""
    return " ".join(_PIECE.findall(unicodedata.normalize("NFC", text)))


def without_punctuation(text: str) -> str:
    """A text without the signs of Unicode's punctuation and of `string.punctuation`."""
    return _PUNCTUATION.sub("", text)


def token_spans(text: str) -> list[tuple[int, int]]:
    """Words, underscores within them included, and every other sign by itself, as characters begin:end.

    >>> token_spans("It's 4.")
    [(0, 2), (2, 3), (3, 4), (5, 6), (6, 7)]
    """
    return [match.span() for match in _TOKEN.finditer(text)]


def sentence_ends(text: str) -> list[int]:
    """Where the sentences of a text end, white space behind them included; the end of the text is not among them.

    A sentence ends at its sign before a capital, a digit, or a letter of a script without capitals; the full stops of
    Chinese, Japanese and Hindi end one in any place, a blank line too. Thai, Lao, Khmer and Burmese write no such
    signs: a paragraph of theirs is one sentence.
    """
    return [match.end() for match in _SENTENCE.finditer(text)]


def is_english(texts: Sequence[str]) -> bool:
    """Whether texts are English, by their letters and by how many of their words are common ones of English alone.

    >>> is_english(["The price of the lamp is 42 coins."]), is_english(["Der Preis der Lampe ist 42 Taler."])
    (True, False)
    """
    letters = [letter for text in texts for letter in text if letter.isalpha()]
    found = [word for text in texts for word in words(text)]
    if not letters or sum(map(str.isascii, letters)) < ENGLISH_LETTERS * len(letters):
        return False
    return sum(word in _ENGLISH for word in found) >= ENGLISH_WORDS * len(found)


def has_english_letters(text: str) -> bool:
    """Whether a text could be English: most of its letters, if it has any, are of ASCII."""
    letters = [letter for letter in text if letter.isalpha()]
    return sum(map(str.isascii, letters)) >= ENGLISH_LETTERS * len(letters)
