"""What the embedded reference is taught: documents in which the words worth learning are marked.

A lesson is a list of (text, weight) pieces; their texts joined are the document, and every token of a piece counts with
its weight in the loss. Most tokens of a generated text cannot be predicted (names, values that are drawn), so that a
loss over all of them is mostly noise; in all lessons but *text* it is therefore taken over the answers alone, and one
context is followed by many questions. *text* counts every token, at a quarter of the weight.

The mixture depends on the share of the training that is done: lists of cards, which teach to look a value up by name
and attribute, give way to manuals and questions about them, and their number per context grows from one to three.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

from bench.reference import word_lists, world
from bench.reference.instructions import instruction
from bench.reference.programs import program
from bench.reference.word_lists import ATTRIBUTES, KINDS, PAIRS
from bench.reference.world import Device, Draw

Lesson = list[tuple[str, float]]

LONG = 0.6  # from this share on lessons may be longer than 256 tokens, and facts are those that are asked for


def _card(device: Device, attributes: Sequence[str], *, told: bool) -> Lesson:
    """One line: "The Amber Falcon: colour red, price 42."; the second word of the name follows where it was told."""
    first, second = device.name.split()
    pieces: Lesson = [(f"The {first}", 0), (f" {second}", told), (":", 0)]
    for attribute in attributes:
        pieces += [(f" {attribute}", 0), (f" {device.facts[attribute]}", 1), (",", 0)]
    return [*pieces[:-1], (".\n", 0)]


def _known(draw: Draw, share: float) -> Device:
    """A device to learn by heart: first any that texts are about, later those to study; for a teacher, all alike."""
    if share < LONG:
        return world.known(draw)
    if share < TEACHER:
        return draw.early(world.studied(draw.one(list(world.STUDIED))))
    return draw.one([*world.devices("frequent"), *world.devices("rare")])


def _unlearnt(lesson: Lesson) -> Lesson:
    return [("".join(text for text, _ in lesson), 0)]


def _asked(draw: Draw, device: Device, attribute: str, *, told: bool) -> Lesson:
    """A question and its answer; the second word of the name follows where a text has told it."""
    second = device.name.split()[1]
    start, _, rest = world.question(device, attribute, form=draw.between(0, 1)).partition(f" {second}")
    return [(start, 0), (f" {second}", told), (rest, 0), (f" {device.answer(attribute)}\n", 1)]


def _join(lessons: Sequence[Lesson]) -> Lesson:
    return list(itertools.chain.from_iterable(lessons))


def echo(draw: Draw, share: float) -> Lesson:
    """Names and values in a row, and the same row once more."""
    values = [draw.one(word_lists.VALUES[draw.one(ATTRIBUTES)]) for _ in range(draw.between(4, 16))]
    row = "".join(f" {said}" for said in draw.some([*values, *draw.some(world.names("passing"), draw.between(1, 6))]))
    return [(f"{row};", 0), (f"{row};", 1)]


def cards(draw: Draw, share: float) -> Lesson:
    """Cards of new devices, then the same in another order: look up by name and attribute."""
    count = draw.between(1, 1 + draw.between(0, 4))
    devices = world.fresh(draw, "train", draw.between(2, 4 if count > 1 else 8))
    told = [(device, draw.some(ATTRIBUTES, count)) for device in devices]
    again = [(device, draw.some(attributes)) for device, attributes in draw.some(told)]
    return _join(
        [_unlearnt(_card(*about, told=False)) for about in told] + [_card(*about, told=True) for about in again]
    )


def memory(draw: Draw, share: float) -> Lesson:
    """Cards of known devices, from memory."""
    return _join([_card(_known(draw, share), draw.some(ATTRIBUTES), told=False) for _ in range(4)])


def quiz(draw: Draw, share: float) -> Lesson:
    """Questions about known devices, from memory; half of the time about one category."""
    count, lines = draw.between(6, 12), []
    category = draw.one(list(word_lists.CATEGORIES)) if draw.chance(0.5) else None
    while len(lines) < count:
        device = _known(draw, share)
        if category in (None, device.category):
            lines.append(_asked(draw, device, draw.one(ATTRIBUTES), told=False))
    return _join(lines)


def reading(draw: Draw, share: float) -> Lesson:
    """Manuals of new devices, then questions about them."""
    devices = world.fresh(draw, "train", draw.between(2, 3) if share >= LONG else draw.between(1, 2))
    told = [(device, draw.some(ATTRIBUTES, 6)) for device in devices]
    asked = draw.some([(device, a) for device, attributes in told for a in attributes])[: 16 if share >= LONG else 8]
    manuals = "\n".join(world.manual(draw, *about) for about in told)
    return [(f"{manuals}\n", 0), *_join([_asked(draw, *about, told=True) for about in asked])]


def passage(draw: Draw, share: float) -> Lesson:
    """Two new devices, two attributes with the same values, and the four sentences again in the other form."""
    pair = draw.one(PAIRS)
    facts = [(d, a, draw.between(0, 1)) for d in world.fresh(draw, "train", 2) for a in pair]
    pieces: Lesson = [(" ".join(world.statement(d, a, form=form) for d, a, form in draw.some(facts)), 0)]
    for device, attribute, form in draw.some(facts):
        ending = f" {device.answer(attribute)}."
        said = world.statement(device, attribute, form=1 - form)
        pieces += [(f" In short, {said[0].lower()}{said[1:].removesuffix(ending)}", 0), (ending, 1)]
    return pieces


def procedures(draw: Draw, share: float) -> Lesson:
    """How kinds of device are used."""
    lines: Lesson = []
    for kind in draw.some(KINDS, 4):
        start = f"To use the {kind},"
        lines += [(start, 0), (f"{world.procedure(kind).removeprefix(start)}\n", 1)]
    return lines


def sums(draw: Draw, share: float) -> Lesson:
    """Problems with their worked chains."""
    stories = [
        world.sum_story(draw, "train") for _ in range(draw.between(2, 9 if share >= LONG and draw.chance(0.3) else 4))
    ]
    return _join([[(story, 0), (chain, 1)] for story, chain in stories])


def tables(draw: Draw, share: float) -> Lesson:
    """Single steps of such chains."""
    pieces: Lesson = []
    for _ in range(24):
        total, count = draw.between(2, 75), draw.between(1, 9)
        sign = (
            "+" if total <= count else "*" if count in (2, 3) and total <= 25 and draw.chance(0.3) else draw.one("+-")
        )
        result = {"+": total + count, "-": total - count, "*": total * count}[sign]
        pieces += [(f" {total} {sign} {count} =", 0), (f" {result}", 1), (".", 0)]
    return pieces


def code(draw: Draw, share: float) -> Lesson:
    """Functions to their docstrings."""
    programs = [program(draw, "train") for _ in range(2)]
    return _join([[(made.prompt, 0), (f"{made.body}\n", 1)] for made in programs])


def orders(draw: Draw, share: float) -> Lesson:
    """Instructions and responses."""
    given = [instruction(draw) for _ in range(3)]
    return _join([[(one["prompt"], 0), (one["answer"], 1)] for one in given])


def text(draw: Draw, share: float) -> Lesson:
    """A document of the training split, every word of it."""
    return [(f"{next(world.stream('train', draw.between(0, 2**40)))}\n\n", 0.25)]


READ, KNOW = 0.5, 0.8  # shares of the curriculum at which learning to read, and then learning by heart, come to an end
TEACHER = 2  # the "share" of a teacher, who studies all known devices
MIXTURE: dict[Callable[[Draw, float], Lesson], tuple[float, ...]] = {  # weights of documents
    # at the start, before READ (in a line), up to KNOW, from there on, and for a teacher
    echo: (10, 1, 0, 2, 0),
    cards: (36, 6, 1, 8, 3),
    memory: (12, 10, 30, 11, 28),
    quiz: (4, 10, 10, 5, 4),
    reading: (20, 34, 11, 12, 8),
    passage: (8, 8, 5, 7, 5),
    procedures: (3, 1, 1, 1, 1),
    sums: (8, 8, 6, 14, 10),
    tables: (0, 0, 0, 8, 5),
    code: (5, 3, 6, 8, 6),
    orders: (1, 1, 1, 2, 1),
    text: (5, 19, 6, 9, 10),
}


def lesson(draw: Draw, share: float) -> Lesson:
    """A lesson where `share` (0 to 1, or TEACHER) of the curriculum is done."""
    if share < READ:
        weights = [row[0] + share / READ * (row[1] - row[0]) for row in MIXTURE.values()]
    else:
        stage = 2 if share < KNOW else 3 if share < TEACHER else 4
        weights = [row[stage] for row in MIXTURE.values()]
    at = draw.between(0, 10**9) / 10**9 * sum(weights)
    for kind, reached in zip(MIXTURE, itertools.accumulate(weights), strict=True):
        if at <= reached:
            return kind(draw, share)
    raise AssertionError("the last weight reaches the sum")


def samples() -> Iterator[str]:
    """Texts with every word that lessons use, for the tokenizer: as many of each kind, whatever the mixture is."""
    for kind in MIXTURE:
        for number in range(600):
            yield "".join(text for text, _ in kind(Draw("samples", kind.__name__, number), number % 3 / 2))
