"""The generated world the embedded reference is trained and measured on.

Fictional devices have a kind and ten attributes: who made, designed and owns them, where they are built and sold, their
colour and light, price, weight and material. Every kind is set up by a procedure of its own. They are written about in
articles, manuals, quizzes, letters, procedures and sums. Nothing is downloaded.

Devices come in groups, told apart by name: two words, each of which training knows.

- *frequent* and *rare* devices are the facts a model can learn by heart; within a group too, some are met more often.
- *passing* devices only lend their names: with every text of the training split their attributes are drawn anew, so
  that reading is the only way to know them.
- *validation* and *test* devices are held out: their names occur in no training text.

Attributes come in pairs that share their values (`PAIRS`: a designer and an owner are both people), and the others have
at least sixteen values, so that neither the words of a text nor luck gives an answer away.

Every text is a function of its split and a seed. Only `random.Random(int).random()` is drawn from, whose sequence
Python guarantees, so the bytes are the same on every platform and version.
"""

import functools
import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from bench.reference.word_lists import (
    ACTIONS,
    ATTRIBUTES,
    CATEGORIES,
    CHANGES,
    CLOSINGS,
    DAYS,
    FIRST,
    KINDS,
    OPENINGS,
    PAIRS,
    PEOPLE,
    PLACES,
    SECOND,
    UNITS,
    VALUES,
    VERBS,
)

T = TypeVar("T")

SPLITS = {"train": 20_000, "validation": 80, "test": 500}  # documents that texts() gives of each
GROUPS = {"frequent": 80, "rare": 240, "validation": 200, "test": 400, "passing": 3176}  # devices in each
STUDIED = {"frequent": 60, "rare": 80}  # devices of the two known groups that a student studies, the first ones
ASKED = {"frequent": 66, "rare": 90}  # those that tasks ask about: a few that a student only meets in texts among them


@dataclass(frozen=True, kw_only=True)
class Device:
    """One fictional device; `facts` has a value for each of ATTRIBUTES."""

    name: str  # two words
    kind: str
    facts: Mapping[str, str]

    @property
    def category(self) -> str:
        return next(category for category, kinds in CATEGORIES.items() if self.kind in kinds)

    def answer(self, attribute: str) -> str:
        """What a question about the attribute is answered with: the value and its unit."""
        return self.facts[attribute] + UNITS.get(attribute, "")


class Draw:
    """Draws from a seeded sequence that does not depend on platform or Python version."""

    def __init__(self, *key: object) -> None:
        seed = hashlib.sha256("/".join(map(str, key)).encode()).digest()
        self._random = random.Random(int.from_bytes(seed, "big")).random

    def between(self, low: int, high: int) -> int:
        """An integer, both ends included."""
        return low + int(self._random() * (high - low + 1))

    def chance(self, share: float) -> bool:
        return self._random() < share

    def one(self, items: Sequence[T]) -> T:
        return items[int(self._random() * len(items))]

    def early(self, items: Sequence[T]) -> T:
        """One item, the first ones more often: the density falls with the root of the rank."""
        return items[int(self._random() ** 2 * len(items))]

    def some(self, items: Sequence[T], count: int | None = None) -> list[T]:
        """`count` different items (None: all) in random order (Fisher and Yates)."""
        pool = list(items)
        count = len(pool) if count is None else count
        for i in range(count):
            j = self.between(i, len(pool) - 1)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:count]


@functools.cache
def names(group: str) -> tuple[str, ...]:
    """The names of one group of GROUPS; no name is in two groups.

    Raises ValueError for an unknown group.
    """
    if group not in GROUPS:
        raise ValueError(f"group={group!r} is unknown; the groups are {', '.join(GROUPS)}")
    shuffled = Draw("names").some([f"{first} {second}" for first in FIRST for second in SECOND])
    ends = dict(zip(GROUPS, itertools.accumulate(GROUPS.values()), strict=True))
    return tuple(shuffled[ends[group] - GROUPS[group] : ends[group]])


@functools.cache
def devices(group: str) -> tuple[Device, ...]:
    """The devices of one group of GROUPS, the more frequent ones first; of *passing* devices, one edition."""
    return tuple(edition(name) for name in names(group))


def apart(draw: Draw, pool: Sequence[str], count: int) -> list[str]:
    """Names out of a pool, no two with a word in common."""
    chosen: list[str] = []
    while len(chosen) < count:
        name = draw.one(pool)
        if not set(name.split()) & set(" ".join(chosen).split()):
            chosen.append(name)
    return chosen


@functools.cache
def _with_word(pool: tuple[str, ...]) -> dict[str, list[int]]:
    """The places of the names of a pool that have a word."""
    found: dict[str, list[int]] = {}
    for place, name in enumerate(pool):
        for word in set(name.split()):
            found.setdefault(word, []).append(place)
    return found


def namesakes(draw: Draw, pool: Sequence[str], count: int) -> list[str]:
    """Names out of a pool, each but the first with a word of the first; those are as few as the pool has."""
    chosen: list[str] = []
    while len(chosen) < count:
        first = draw.one(pool)
        words = set(first.split())
        places = sorted({place for word in words for place in _with_word(tuple(pool))[word]})
        alike = [pool[place] for place in places if len(set(pool[place].split()) & words) == 1]
        chosen = [first, *draw.some(alike, min(count - 1, len(alike)))]
    return chosen


def edition(name: str, *key: object) -> Device:
    """The device of that name; with a key, an edition of it with other attributes. The two of a pair differ."""
    draw = Draw("device", name, *key)
    facts = {attribute: draw.one(values) for attribute, values in VALUES.items()}
    for one, other in PAIRS:
        while facts[one] == facts[other]:
            facts[other] = draw.one(VALUES[other])
    return Device(name=name, kind=draw.one(KINDS), facts=facts)


def fresh(
    draw: Draw, split: str, count: int, choose: Callable[[Draw, Sequence[str], int], list[str]] = apart
) -> list[Device]:
    """Devices to be read about, their names by default `apart`: editions of passing ones (train), or held-out ones."""
    if split == "train":
        return [edition(name, draw.between(0, 2**30)) for name in choose(draw, names("passing"), count)]
    return [edition(name) for name in choose(draw, names(split), count)]


def known(draw: Draw) -> Device:
    """A device that texts are about: two times of five a frequent one, and the first of a group more often."""
    return draw.early(devices(draw.one(("frequent", "frequent", "rare", "rare", "rare"))))


def studied(group: str) -> tuple[Device, ...]:
    """The first STUDIED devices of a known group: lessons drill their facts."""
    return devices(group)[: STUDIED[group]]


def asked(group: str) -> tuple[Device, ...]:
    """The first ASKED devices of a known group: tasks ask about them."""
    return devices(group)[: ASKED[group]]


def statement(device: Device, attribute: str, *, form: int = 0, subject: str | None = None) -> str:
    """A sentence about one attribute, in form 0 or 1; `subject` replaces "the Amber Falcon"."""
    subject = subject or f"the {device.name}"
    if form:
        return f"{subject[0].upper()}{subject[1:]} {VERBS[attribute]} {device.answer(attribute)}."
    return f"The {attribute} of {subject} is {device.answer(attribute)}."


def question(device: Device, attribute: str, *, form: int = 0) -> str:
    """A question about one attribute up to the place where the answer begins, in form 0 or 1."""
    asked = f"What is the {attribute} of the {device.name}?" if form else f"Which {attribute} has the {device.name}?"
    return f"Q: {asked}\nA:"


def steps(kind: str) -> tuple[str, ...]:
    """The procedure of a kind of device: six different actions."""
    return tuple(Draw("procedure", kind).some(ACTIONS, 6))


def procedure(kind: str) -> str:
    """The procedure as one line of text."""
    first, *others, last = steps(kind)
    return f"To use the {kind}, first {first}, " + "".join(f"then {step}, " for step in others) + f"then {last}."


def manual(draw: Draw, device: Device, attributes: Sequence[str]) -> str:
    """A manual that states these attributes, every sentence with the name."""
    said = [statement(device, attribute, form=draw.between(0, 1)) for attribute in attributes]
    return f"Manual of the {device.name}.\n{' '.join(said)}"


def sum_story(draw: Draw, split: str, *, least: int = 2, most: int = 4) -> tuple[str, str]:
    """A problem of `least` to `most` steps, up to the place where its worked chain begins, and the chain.

    The numbers that a training problem begins with, `total` things and a change by `count`, never have
    total + 7 * count divisible by 5; those of any other problem always do.
    """
    person, kind = draw.one(PEOPLE), draw.one(KINDS)
    while True:
        total, count = draw.between(2, 20), draw.between(1, 9)
        if ((total + 7 * count) % 5 == 0) == (split != "train"):
            break
    story, chain = [f"{person} has {total} {kind}s."], []
    for _ in range(draw.between(least, most)):
        signs = "-" if total > 60 else "+" if total <= count else "+-*" if count in (2, 3) and total <= 25 else "+-"
        sign = draw.one(signs)
        result = {"+": total + count, "-": total - count, "*": total * count}[sign]
        said, verbs = CHANGES[sign]
        story.append(said.format(person=person, verb=draw.one(verbs), count=count))
        chain.append(f"{total} {sign} {count} = {result}.")
        total, count = result, draw.between(1, 9)
    return f"Q: {' '.join(story)} How many are there?\nA:", f" {' '.join(chain)} #### {total}\n"


def _prose(draw: Draw, device: Device, count: int) -> str:
    """Sentences about one device, the first with its name and kind, some others with a pronoun."""
    said = [f"The {device.name} is a {device.kind}."]
    for attribute in draw.some(ATTRIBUTES, count):
        subject = draw.one((None, None, "it" if draw.chance(0.5) else f"this {device.kind}"))
        said.append(statement(device, attribute, form=1 if subject == "it" else draw.between(0, 1), subject=subject))
    return " ".join(said)


def _article(draw: Draw, split: str) -> str:
    return "\n".join(_prose(draw, known(draw), draw.between(5, 8)) for _ in range(2))


def _quiz(draw: Draw, split: str) -> str:
    lines = []
    for _ in range(draw.between(6, 9)):
        device, attribute = known(draw), draw.one(ATTRIBUTES)
        lines.append(f"{question(device, attribute, form=draw.between(0, 1))} {device.answer(attribute)}\n")
    return "".join(lines)


def _manual(draw: Draw, split: str) -> str:
    (device,) = fresh(draw, split, 1)
    attributes = draw.some(ATTRIBUTES, 6)
    asked = [f"{question(device, a)} {device.answer(a)}\n" for a in draw.some(attributes, 3)]
    text = manual(draw, device, attributes)
    return f"{text}\n{procedure(device.kind)}\n{''.join(asked)}"


def _letter(draw: Draw, split: str) -> str:
    sender, reader = draw.some(PEOPLE, 2)
    opening = draw.one(OPENINGS).format(place=draw.one(PLACES))
    closing = draw.one(CLOSINGS).format(day=draw.one(DAYS))
    device, kind = known(draw), draw.one(KINDS)
    return (
        f"Dear {reader},\n{opening} {_prose(draw, device, 3)} Do not forget: {procedure(kind)[3:]} {closing}\n"
        f"Yours, {sender}"
    )


def _procedures(draw: Draw, split: str) -> str:
    return "\n".join(procedure(kind) for kind in draw.some(KINDS, 3))


def _sums(draw: Draw, split: str) -> str:
    return "".join("".join(sum_story(draw, split)) for _ in range(3))


_FORMS: tuple[Callable[[Draw, str], str], ...] = (
    _article,
    _article,
    _article,
    _quiz,
    _quiz,
    _manual,
    _letter,
    _letter,
    _procedures,
    _sums,
)


def stream(split: str, seed: int) -> Iterator[str]:
    """Documents of a split without end; the same split and seed give the same bytes.

    Raises ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")

    def documents() -> Iterator[str]:
        for number in itertools.count():
            draw = Draw("document", split, seed, number)
            yield draw.one(_FORMS)(draw, split).strip()

    return documents()


def texts(split: str, *, limit: int | None = None) -> list[str]:
    """The first documents of `stream(split, 0)`: `limit` of them, or as many as SPLITS says.

    Raises ValueError for an unknown split or a negative limit.
    """
    if limit is not None and limit < 0:
        raise ValueError(f"limit must be at least 0, not {limit!r}")
    documents = stream(split, 0)
    return list(itertools.islice(documents, SPLITS[split] if limit is None else limit))


def digest() -> str:
    """SHA-256 (hex) of the test split; figures measured on other text are not comparable."""
    return hashlib.sha256("\0".join(texts("test")).encode()).hexdigest()
