"""Token overlap of two texts: the measures of [E] as defined there, and SQuAD's.

[E] (table 11; its published code where the text leaves it open) splits lower-case text at white space and keeps
punctuation, so "42 coins." and "42 coins" share one of two tokens. Shares are over the set of different tokens, F1 over
tokens as often as they occur. SQuAD (Rajpurkar et al. 2016, its evaluation script) also takes punctuation and articles
away, and takes the best of several answers. Two texts without tokens are equal for SQuAD; for [E] an F1 with an empty
side is 0.

Of ASCII texts these are the published scripts' values. Beyond it texts are compared in composed form, punctuation is
Unicode's, as in MLQA's script (Lewis et al. 2020), and a letter of a script without spaces (Chinese, Japanese, Thai and
others, `bench.data.scripts`) is a token. Articles are those of English alone.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from bench.data.scripts import normal, pieces, without_punctuation

ABSTAINS = re.compile(
    r"\b(?:unanswerable|no answer|not (?:in|given|stated|mentioned|provided|contained) |cannot (?:be )?answer"
    r"|can't (?:be )?answer|not enough (?:information|context)|insufficient (?:information|context)"
    r"|(?:do not|don't|does not|doesn't) (?:know|say|contain|mention|provide|state)|unknown)",
    re.IGNORECASE,
)


def tokens(text: str) -> list[str]:
    """Lower case, split at white space (and into letters where a script has none), punctuation kept ([E], table 11).

    >>> tokens("The  price is 42 coins.")
    ['the', 'price', 'is', '42', 'coins.']
    """
    return pieces(text)


def squad_tokens(text: str) -> list[str]:
    """Lower case, punctuation and articles removed, split at white space, as SQuAD's script does.

    >>> squad_tokens("The price: a 42-coin bill.")
    ['price', '42coin', 'bill']
    """
    return pieces(re.sub(r"\b(a|an|the)\b", " ", without_punctuation(normal(text))))


def f1(given: Sequence[str], wanted: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over tokens, each as often as it occurs; 0 with an empty side.

    >>> f1(["42", "coins"], ["42", "grams"]), f1([], [])
    (0.5, 0.0)
    """
    common = (Counter(given) & Counter(wanted)).total()
    return 2 * common / (len(given) + len(wanted)) if common else 0.0


def share(part: Iterable[str], whole: Iterable[str]) -> float:
    """Share of the different tokens of `part` that are in `whole`; 0 for an empty part.

    >>> share(["a", "b", "a"], ["a", "c"])
    0.5
    """
    part = set(part)
    return len(part & set(whole)) / len(part) if part else 0.0


def squad_share(part: str, whole: str) -> float:
    """`share` of SQuAD's tokens; of a part that has articles alone, of those.

    >>> squad_share("The 42 coins.", "42 coins"), squad_share("A", "A")
    (1.0, 1.0)
    """
    if bare := squad_tokens(part):
        return share(bare, squad_tokens(whole))
    return share(pieces(without_punctuation(normal(part))), pieces(without_punctuation(normal(whole))))


def contains(answer: str, truths: Sequence[str]) -> bool:
    """Whether an answer holds a truth, as its tokens one after the other under SQuAD's normalisation.

    >>> contains("It costs 42 coins, I think.", ["42 coins"]), contains("A party.", ["art"])
    (True, False)
    """
    given = squad_tokens(answer)

    def held(truth: list[str]) -> bool:
        if not truth:
            return not given
        return any(given[at : at + len(truth)] == truth for at in range(len(given) - len(truth) + 1))

    return any(held(squad_tokens(truth)) for truth in truths)


def holds(text: str, answer: str) -> bool:
    """Whether a text has an answer letter by letter, but for capitals and the form of its letters."""
    return normal(answer) in normal(text)


def exact(answer: str, truth: str) -> bool:
    """[E]: equal in lower case with white space normalised.

    >>> exact(" 42  Coins", "42 coins"), exact("42 coins.", "42 coins")
    (True, False)
    """
    return tokens(answer) == tokens(truth)


def squad_f1(answer: str, truths: Sequence[str]) -> float:
    """The best token F1 over the truths under SQuAD's normalisation; 1 where both sides are empty.

    >>> squad_f1("The 42 coins.", ["42 grams", "42 coins"])
    1.0
    """
    given = squad_tokens(answer)
    return max(f1(given, wanted) if given or wanted else 1.0 for wanted in map(squad_tokens, truths))


def squad_exact(answer: str, truths: Sequence[str]) -> bool:
    """Whether the answer is one of the truths under SQuAD's normalisation.

    >>> squad_exact("The 42 coins.", ["42 coins"])
    True
    """
    return any(squad_tokens(answer) == squad_tokens(truth) for truth in truths)


def sufficient(answer: str, context: str, threshold: float) -> bool:
    """Whether a context holds the answer as it stands, or at least `threshold` of its tokens ([E], table 9: 0.8)."""
    return holds(context, answer) or share(tokens(answer), tokens(context)) >= threshold


def abstains(answer: str) -> bool:
    """Whether an answer says that there is none, by the phrases of `ABSTAINS`, which are English.

    >>> abstains("Unanswerable."), abstains("The context does not say."), abstains("42 coins")
    (True, True, False)
    """
    return bool(ABSTAINS.search(answer.replace("\u2019", "'")))
