"""Clarity of an answer: the mean of fluency, coherence and readability, each 0 to 1 ([O], section 4.4).

Fluency is 1 / (1 + log2 PPL), with the perplexity of the answer under a small language model that reads it by itself,
from the start of a text. [O] prints 1 - 1 / (1 + log2 PPL), which grows with perplexity; it stands beside, as `paper`.
Coherence is the cosine of vectors of the answer and its paragraph; readability is Flesch's reading ease, cut to 0..100
and divided by 100. An answer without a word has 0 of each.

Without a model hub there is neither DistilGPT2 nor a sentence encoder. For the embedded set the language model is then
the embedded reference's teacher, which knows the language of the reference and no other: of other texts there is no
fluency unless a model is given. Vectors are words weighted by TF-IDF, so that coherence is overlap of words and not of
meaning. Flesch's formula and the rule for syllables are of English: of a set in another language there is no
readability, nor of a single answer in other letters.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench import measure
from bench.data.scripts import has_english_letters, joined_words
from bench.errors import OptionError
from bench.measure import scoring
from bench.measure.judge.answers import Answered
from bench.measure.rag.encoders import Encoder
from compression.files.libraries import failures_as, local_or_hub

DEFAULT_LM = "reference-teacher"
DEFAULT_VECTORS = "tf-idf"
NO_MODEL = "fluency needs a model for the language of these answers: --fluency-model FOLDER (or a hub id) measures it"
NOT_ENGLISH = "readability uses Flesch's formula for English, and the texts of this set are not in English"


@dataclass(frozen=True)
class Clarity:
    """The parts for one answer."""

    fluency: float | None
    fluency_paper: float | None
    coherence: float
    readability: float | None

    @property
    def mean(self) -> float | None:
        """None where a part is None."""
        return self._mean(self.fluency)

    @property
    def mean_paper(self) -> float | None:
        """With the fluency that [O] prints."""
        return self._mean(self.fluency_paper)

    def _mean(self, fluency: float | None) -> float | None:
        if fluency is None or self.readability is None:
            return None
        return (fluency + self.coherence + self.readability) / 3


def fluency(perplexity: float) -> float:
    """1 / (1 + log2 PPL): 1 where nothing surprises, and less the more does.

    >>> fluency(1.0), fluency(8.0)
    (1.0, 0.25)
    """
    return 1 / (1 + math.log2(perplexity))


def fluency_paper(perplexity: float) -> float:
    """1 - 1 / (1 + log2 PPL), as [O] prints it in its equation 3: the worse, the more.

    >>> fluency_paper(1.0), fluency_paper(8.0)
    (0.0, 0.75)
    """
    return 1 - fluency(perplexity)


def words(text: str) -> list[str]:
    """Runs of letters and digits, apostrophes within them included, in lower case."""
    return joined_words(text)


def sentences(text: str) -> int:
    """Sentences, told by . ! or ? at the end of a word and by line ends; at least 1."""
    return max(1, sum(bool(words(part)) for part in re.split(r"(?<![.!?])[.!?]++(?=[\s\"')\]]|$)|\n+", text)))


def syllables(word: str) -> int:
    """Syllables of an English word by rule, at least 1: groups of vowels, without a silent e at the end.

    >>> [syllables(each) for each in ("cat", "table", "makes", "jumped", "wanted", "beautiful", "science", "42")]
    [1, 2, 1, 1, 2, 3, 2, 1]
    """
    word = re.sub(r"[^a-z]", "", word.lower())
    if len(word) > 3:
        if re.search(r"[^aeiouyl]es$", word) and not re.search(r"([sxz]|[cs]h|[cg])es$", word):
            word = word[:-2] + "s"
        elif re.search(r"[^aeioutdy]ed$", word):
            word = word[:-2] + "d"
        elif re.search(r"[^aeiouyl]e$|[aeiouy]le$", word):
            word = word[:-1]
    groups = re.findall(r"[aeiouy]+", word)
    parted = re.findall(
        r"(?:[^gqcst]|^)i(?:a|o|u(?!r))|(?<=[sc])ie(?=n|t)|iet|eo(?![pu])|ua(?=l)|(?<=[aeiou])ing$", word
    )
    return max(1, len(groups) + len(parted))


def reading_ease(text: str) -> float:
    """Flesch 1948: 206.835 - 1.015 words / sentences - 84.6 syllables / words, for a text with a word.

    "The cat sat on the mat." has 6 words in a sentence, each of one syllable: 206.835 - 6.09 - 84.6.

    >>> round(reading_ease("The cat sat on the mat."), 3)
    116.145
    """
    found = words(text)
    return 206.835 - 1.015 * len(found) / sentences(text) - 84.6 * sum(map(syllables, found)) / len(found)


def readability(text: str) -> float | None:
    """Reading ease cut to 0..100, as a share; None of a text whose letters are not those of English."""
    if not has_english_letters(text):
        return None
    return min(100.0, max(0.0, reading_ease(text))) / 100


def tf_idf(texts: Sequence[str]) -> Callable[[str], Mapping[str, float]]:
    """What turns a text into weights of its words, by how many of `texts` have them: count x (1 + ln((1+n)/(1+df)))."""
    having = Counter(word for text in texts for word in set(words(text)))

    def weights(text: str) -> dict[str, float]:
        counts = Counter(words(text))
        return {word: count * (1 + math.log((1 + len(texts)) / (1 + having[word]))) for word, count in counts.items()}

    return weights


def cosine(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """Of two sparse vectors; 0 where one is empty.

    >>> round(cosine({"a": 3.0, "b": 4.0}, {"b": 2.0}), 6)
    0.8
    """
    lengths = math.sqrt(sum(v * v for v in one.values()) * sum(v * v for v in other.values()))
    return sum(value * other.get(word, 0.0) for word, value in one.items()) / lengths if lengths else 0.0


def coherence_by_words(answers: Sequence[Answered]) -> list[float]:
    """Cosine of TF-IDF vectors of each answer and its paragraph; document frequencies are those of the paragraphs."""
    weights = tf_idf(list(dict.fromkeys(each.asked.context for each in answers)))
    return [cosine(weights(each.text), weights(each.asked.context)) for each in answers]


def coherence_by_encoder(name: str, device: str) -> Callable[[Sequence[Answered]], list[float]]:
    """What gives the cosine of sentence embeddings of each answer and its paragraph, at least 0.

    Raises:
        OptionError: sentence-transformers is not installed, or there is no such model.
    """
    encoder = Encoder(name, device=device, option="--coherence-encoder")

    def coherence(answers: Sequence[Answered]) -> list[float]:
        said = encoder.documents([each.text for each in answers])
        about = encoder.documents([each.asked.context for each in answers])
        return [max(0.0, float(value)) for value in (said * about).sum(1)]

    return coherence


class SmallModel:
    """The language model of fluency: reference-teacher, or a folder or hub id that transformers opens.

    Raises:
        OptionError: it cannot be opened.
    """

    def __init__(self, name: str = DEFAULT_LM, device: str = "cpu"):
        self.scorer = scoring.lm_eval.Scorer(*_opened(name, device))

    def perplexities(self, texts: Sequence[str]) -> list[float]:
        """Of each text by itself, the first token given the start of a text."""
        return [math.exp(-mean) for mean in self.scorer.mean_logprobs([""] * len(texts), texts)]


def _opened(name: str, device: str) -> tuple[Any, Any]:
    if name == DEFAULT_LM:
        return measure.reference_scores.load("teacher", device=device)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = local_or_hub(name, OptionError)
    with failures_as(lambda why: OptionError(
        f"--fluency-model {name} cannot be opened ({why}); give a folder with a causal language model, a hub id "
        f"that can be reached, or leave it out for {DEFAULT_LM}"
    )):  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(place, dtype="float32", trust_remote_code=False).eval().to(device)
        return model, AutoTokenizer.from_pretrained(place, trust_remote_code=False)


def clarity(
    answers: Sequence[Answered],
    perplexities: Callable[[Sequence[str]], Sequence[float]] | None,
    coherence: Callable[[Sequence[Answered]], Sequence[float]],
) -> list[Clarity]:
    """The clarity of each answer; without a model of the language, without fluency."""
    able = [each for each in answers if words(each.text)]
    if not able:
        return [Clarity(0.0, 0.0, 0.0, 0.0) for _ in answers]
    surprises = perplexities([each.text for each in able]) if perplexities else [None] * len(able)
    found = iter(zip(surprises, coherence(able), strict=True))
    parts = []
    for each in answers:
        if not words(each.text):
            parts.append(Clarity(0.0, 0.0, 0.0, 0.0))
            continue
        perplexity, near = next(found)
        fluent = (None, None) if perplexity is None else (fluency(perplexity), fluency_paper(perplexity))
        parts.append(Clarity(*fluent, near, readability(each.text)))
    return parts
