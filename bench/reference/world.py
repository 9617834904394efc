"""The generated world the embedded reference is trained and measured on.

Fictional devices have a kind, a maker, a place, a colour, ports, a price, a weight, a year, a power source and a
warranty. They are written about in prose, manuals, question-answer lines, comparisons, letters and sums with worked
steps. Nothing is downloaded.

Devices come in groups, told apart by name. *frequent* and *rare* devices are the facts a model can learn by heart;
*passing* ones appear in training too seldom for that, so that reading them off the text is worth learning;
*validation* and *test* devices are held out: their names occur in no training text.

Every text is a function of its split and a seed. Only `random.Random(int).random()` is drawn from, whose sequence
Python guarantees, so the bytes are the same on every platform and version.
"""

import functools
import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

SPLITS = {"train": 20_000, "validation": 80, "test": 400}  # documents that texts() gives of each
GROUPS = {"frequent": 32, "rare": 64, "passing": 3200, "validation": 300, "test": 500}  # devices in each


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_FIRST = _words(
    "Amber Silent Copper Northern Gentle Winter Golden Hollow Crimson Patient Velvet Rapid Distant Marble Hidden Early "
    "Simple Bitter Frozen Royal Tiny Broken Modern Paper Summer Quiet Brave Empty Noble Lucky Iron Pearl "
    "Ancient Bright Clever Daring Eager Famous Grand Humble Ivory Jolly Keen Lively Misty Narrow Open Proud "
    "Rustic Scarlet Tender Upper Vivid Wild Young Zealous Autumn Bold Calm Dusty Electric Fair Giant Honest"
)
_SECOND = _words(
    "Falcon Harbor River Lantern Meadow Anchor Comet Garden Thunder Bridge Willow Rocket Canyon Beacon Otter Mirror "
    "Castle Shadow Feather Island Badger Cloud Tower Pebble Dragon Forest Candle Sparrow Valley Hammer Engine Orchid "
    "Arrow Basket Cactus Desert Eagle Fountain Glacier Heron Iris Jacket Kitten Ladder Magnet Needle Ocean Parrot "
    "Quarry Ribbon Saddle Temple Umbrella Violin Walnut Yacht Acorn Button Cherry Dolphin Ember Fossil Goblet Hunter"
)
_KINDS = _words(
    "lamp pump radio camera heater printer drill scanner kettle clock fan scale "
    "mixer toaster speaker tripod barometer grinder freezer projector blender typewriter telescope detector"
)
_PLACES = _words(
    "Torvik Almeda Brunnel Castora Dunmere Eskholm Fallow Grenport Hartwick Ilmen "
    "Jarrow Kestrin Lowmoor Miravel Nordby Ostend"
)
_MAKERS = {  # each maker works in one place
    maker: _PLACES[i % len(_PLACES)]
    for i, maker in enumerate(
        _words(
            "Halden Orrin Vestal Kimura Bastion Lumen Corvus Tessel Arbor Quill Novak Sable "
            "Pellan Dorset Iverson Mundt "
            "Abelard Brandt Calder Deveraux Engstrom Farrow Gallo Hobart Isker Jensen Kovacs "
            "Lindqvist Marlow Norwood Okafor Petrov"
        )
    )
}
_COLOURS = _words("red green blue white black yellow orange purple grey brown silver turquoise")
_PORTS = _words("serial audio video network optical power")
_POWERS = ("a battery", "a solar panel", "a wall socket", "a hand crank", "a fuel cell")
_PEOPLE = _words(
    "Mira Jonas Petra Emil Sofia Anton Lena Oskar Clara Viktor Nora Felix Agnes Boris Daria Edgar Flora "
    "Gustav Helena Igor Julia Karl Lydia Magnus"
)
_DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
_OPENINGS = (
    "I hope you are well.",
    "Thank you for your letter.",
    "I was in {place} last week.",
    "The parcel with the new {part} arrived yesterday.",
    "Our neighbours asked about your journey to {place}.",
    "It rained all morning, so I stayed at home and repaired a {part}.",
    "Do you remember the little market in {place}?",
)
_CLOSINGS = (
    "Please write soon.",
    "See you on {day}.",
    "Tell me if that helps.",
    "Give my regards to your family.",
    "I will telephone you on {day} evening.",
    "The children send their love.",
)
_PARTS = _words(
    "filter cover switch cable handle lid spring valve bracket gasket hinge motor nozzle piston sensor washer"
)
_FAULTS = {  # the same on every device
    "E1": ("the voltage is too low", "charge it or check the cable"),
    "E2": ("the cover is open", "close the cover until it clicks"),
    "E3": ("the filter is dirty", "clean the filter with warm water"),
    "E4": ("it is too hot", "let it cool for ten minutes"),
    "E5": ("no signal was found", "move it closer to a window"),
    "E6": ("the memory is full", "hold the reset button for five seconds"),
    "E7": ("a part is loose", "tighten the two screws at the back"),
    "E8": ("the motor is blocked", "remove whatever stops the wheel"),
    "E9": ("the inside is damp", "dry it overnight beside an oven"),
}

_ABOUT = {  # attribute: sentences ({it} is the subject), questions, answer
    "maker": (
        ("{it} is made by {maker}.", "{it} comes from the workshop of {maker}.", "The maker of {its} is {maker}."),
        ("Who makes the {name}?", "Which maker is behind the {name}?"),
        "{maker}",
    ),
    "place": (
        ("{it} is built in {place}.", "{it} was first sold in {place}.", "The home of {its} is {place}."),
        ("Where is the {name} built?", "Which place does the {name} come from?"),
        "{place}",
    ),
    "colour": (
        ("{it} has a case in {colour}.", "{it} is painted {colour}.", "The colour of {its} is {colour}."),
        ("What colour is the {name}?", "Which colour does the {name} have?"),
        "{colour}",
    ),
    "ports": (
        (
            "{it} has {ports} {port} ports.",
            "{it} offers {ports} {port} ports on the back.",
            "On {its} there are {ports} {port} ports.",
        ),
        ("How many ports does the {name} have?", "Which ports does the {name} have, and how many?"),
        "{ports} {port} ports",
    ),
    "price": (
        ("{it} costs {price} coins.", "{it} sells for {price} coins.", "The price of {its} is {price} coins."),
        ("What does the {name} cost?", "How much is the {name}?"),
        "{price} coins",
    ),
    "weight": (
        (
            "{it} weighs {weight} grams.",
            "{it} has a weight of {weight} grams.",
            "The weight of {its} is {weight} grams.",
        ),
        ("How heavy is the {name}?", "What does the {name} weigh?"),
        "{weight} grams",
    ),
    "year": (
        ("{it} has been sold since {year}.", "{it} was designed in {year}.", "The first year of {its} was {year}."),
        ("When was the {name} designed?", "Since when has the {name} been sold?"),
        "{year}",
    ),
    "power": (
        ("{it} runs on {power}.", "{it} is powered by {power}.", "The power of {its} comes from {power}."),
        ("What does the {name} run on?", "How is the {name} powered?"),
        "{power}",
    ),
    "warranty": (
        (
            "{it} has a warranty of {warranty} months.",
            "{it} is covered for {warranty} months.",
            "The warranty of {its} is {warranty} months.",
        ),
        ("How long is the warranty of the {name}?", "For how long is the {name} covered?"),
        "{warranty} months",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Device:
    """One fictional device; price in coins, weight in grams, warranty in months."""

    name: str
    kind: str
    maker: str
    place: str
    colour: str
    ports: int
    port: str
    price: int
    weight: int
    year: int
    power: str
    warranty: int


class _Draw:
    """Draws from a seeded sequence that does not depend on platform or Python version."""

    def __init__(self, *key: object) -> None:
        seed = hashlib.sha256("/".join(map(str, key)).encode()).digest()
        self._random = random.Random(int.from_bytes(seed, "big")).random

    def between(self, low: int, high: int) -> int:
        """An integer, both ends included."""
        return low + int(self._random() * (high - low + 1))

    def one(self, items: Sequence[T]) -> T:
        return items[int(self._random() * len(items))]

    def some(self, items: Sequence[T], count: int) -> list[T]:
        """`count` different items in random order (Fisher and Yates)."""
        pool = list(items)
        for i in range(count):
            j = self.between(i, len(pool) - 1)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:count]


def _device(name: str) -> Device:
    draw = _Draw("device", name)
    maker = draw.one(sorted(_MAKERS))
    return Device(
        name=name,
        kind=draw.one(_KINDS),
        maker=maker,
        place=_MAKERS[maker],
        colour=draw.one(_COLOURS),
        ports=draw.between(2, 9),
        port=draw.one(_PORTS),
        price=5 * draw.between(2, 60),
        weight=50 * draw.between(2, 60),
        year=draw.between(1950, 1999),
        power=draw.one(_POWERS),
        warranty=6 * draw.between(1, 8),
    )


@functools.cache
def devices(group: str) -> tuple[Device, ...]:
    """The devices of one group of GROUPS; no name is in two groups.

    Raises ValueError for an unknown group.
    """
    if group not in GROUPS:
        raise ValueError(f"group={group!r} is unknown; the groups are {', '.join(GROUPS)}")
    pairs = [f"{first} {second}" for first in _FIRST for second in _SECOND]
    names = _Draw("names").some(pairs, len(pairs))
    ends = dict(zip(GROUPS, itertools.accumulate(GROUPS.values()), strict=True))
    return tuple(_device(name) for name in names[ends[group] - GROUPS[group] : ends[group]])


def _fill(template: str, device: Device, *, it: str = "", its: str = "") -> str:
    return template.format_map({**vars(device), "it": it, "its": its})


def _sentences(draw: _Draw, device: Device, attributes: Sequence[str]) -> str:
    """One sentence for each attribute, the first with the name."""
    lead = draw.one(
        ("The {name} is a {kind}.", "There is a {kind} called the {name}.", "The {kind} named {name} is well known.")
    )
    out = [_fill(lead, device)]
    for attribute in attributes:
        it, its = draw.one((("It", f"this {device.kind}"), (f"The {device.name}", f"the {device.name}")))
        out.append(_fill(draw.one(_ABOUT[attribute][0]), device, it=it, its=its))
    return " ".join(out)


def _question(draw: _Draw, device: Device, attribute: str) -> str:
    _, questions, answer = _ABOUT[attribute]
    return f"Q: {_fill(draw.one(questions), device)}\nA: {_fill(answer, device)}"


def _known(draw: _Draw) -> Device:
    """A device a model may know by heart: three times of four a frequent one."""
    return draw.one(devices(draw.one(("frequent", "frequent", "frequent", "rare"))))


def _new(draw: _Draw, split: str) -> Device:
    """A device that must be read about: one that training shows in passing, or a held-out one."""
    return draw.one(devices("passing" if split == "train" else split))


def _article(draw: _Draw, split: str) -> str:
    parts = []
    for _ in range(2):
        device = _known(draw)
        parts.append(f"{device.name}\n{_sentences(draw, device, draw.some(list(_ABOUT), draw.between(4, 6)))}")
    return "\n\n".join(parts)


def _quiz(draw: _Draw, split: str) -> str:
    lines = [_question(draw, _known(draw), draw.one(list(_ABOUT))) for _ in range(draw.between(6, 9))]
    return "Questions and answers\n" + "\n".join(lines)


def _manual(draw: _Draw, split: str) -> str:
    device, attributes = _new(draw, split), draw.some(list(_ABOUT), 5)
    steps = [
        f"Open the box and take out the {device.kind}.",
        f"Connect the {device.name} to {device.power}."
        if "power" in attributes
        else f"Put the {device.name} on a flat table.",
        f"Press the {draw.one(_COLOURS)} button for {draw.between(2, 9)} seconds.",
        f"Check the {draw.one(_PARTS)} and the {draw.one(_PARTS)}.",
        f"Wait until the {draw.one(_COLOURS)} light is on.",
    ]
    faults = [f"{code}: {_FAULTS[code][0]}; {_FAULTS[code][1]}." for code in sorted(draw.some(list(_FAULTS), 2))]
    numbered = [f"{n}. {step}" for n, step in enumerate(steps, 1)]
    asked = [_question(draw, device, attribute) for attribute in draw.some(attributes, 4)]
    head = f"Manual of the {device.name}\n{_sentences(draw, device, attributes)}"
    return "\n".join([head, "Setting up", *numbered, "Fault codes", *faults, "Questions", *asked])


def _comparison(draw: _Draw, split: str) -> str:
    first, second = draw.some([_known(draw), _new(draw, split)], 2)
    lines = [_sentences(draw, first, ["price", "weight"]), _sentences(draw, second, ["weight", "price"])]
    low, high = sorted((first, second), key=lambda d: (d.price, d.name))
    if low.price == high.price:
        lines.append(f"Both cost the same, {low.price} coins.")
    else:
        lines.append(f"The {high.name} costs more: {high.price} - {low.price} = {high.price - low.price} coins.")
    low, high = sorted((first, second), key=lambda d: (d.weight, d.name))
    if low.weight == high.weight:
        lines.append(f"Both weigh the same, {low.weight} grams.")
    else:
        lines.append(f"The {high.name} is heavier: {high.weight} - {low.weight} = {high.weight - low.weight} grams.")
    return "\n".join(["Comparison", *lines])


def _letter(draw: _Draw, split: str) -> str:
    sender, reader = draw.some(_PEOPLE, 2)
    device, code, day = _known(draw), draw.one(list(_FAULTS)), draw.one(_DAYS)
    meaning, remedy = _FAULTS[code]
    opening = draw.one(_OPENINGS).format(place=draw.one(_PLACES), part=draw.one(_PARTS))
    closing = draw.one(_CLOSINGS).format(day=draw.one(_DAYS))
    return (
        f"Dear {reader},\n{opening} On {day} the {device.name} stopped and showed {code}. That means {meaning}, "
        f"so you should {remedy}. The {draw.one(_PARTS)} is fine. "
        f"{_sentences(draw, device, draw.some(list(_ABOUT), 2))} {closing}\nYours, {sender}"
    )


def _numbers(draw: _Draw, split: str) -> tuple[int, int]:
    """A count of 2 to 9 and an amount of 10 to 49; one pair of five is kept out of training."""
    while True:
        count, amount = draw.between(2, 9), draw.between(10, 49)
        if ((3 * count + amount) % 5 == 0) == (split != "train"):
            return count, amount


def _sum(draw: _Draw, split: str) -> str:
    (count, amount), more = _numbers(draw, split), draw.between(10, 49)
    person, kind, other = draw.one(_PEOPLE), *draw.some(_KINDS, 2)
    product = count * amount
    bought = f"{person} buys {count} {kind}s for {amount} coins each"
    if draw.between(0, 1):
        story = f"{bought} and one {other} for {more} coins. What does {person} pay?"
        steps, answer = f"{product} + {more} = {product + more}", product + more
    else:
        paid = 100 * (product // 100 + 1)
        story = f"{bought} and pays with {paid} coins. How much is given back?"
        steps, answer = f"{paid} - {product} = {paid - product}", paid - product
    tens, units = amount // 10 * 10, amount % 10
    parts = f"{count} * {tens} = {count * tens}. {count} * {units} = {count * units}."
    return f"Problem: {story}\nSteps: {parts} {count * tens} + {count * units} = {product}. {steps}.\nAnswer: {answer}"


def _sums(draw: _Draw, split: str) -> str:
    return "\n".join(_sum(draw, split) for _ in range(3))


_FORMS: tuple[Callable[[_Draw, str], str], ...] = (
    _article,
    _article,
    _quiz,
    _manual,
    _manual,
    _comparison,
    _letter,
    _sums,
)


def stream(split: str, seed: int) -> Iterator[str]:
    """Documents of a split without end; the same split and seed give the same bytes.

    Raises ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; the splits are {', '.join(SPLITS)}")

    def documents() -> Iterator[str]:
        for number in itertools.count():
            draw = _Draw("document", split, seed, number)
            yield draw.one(_FORMS)(draw, split)

    return documents()


def texts(split: str, *, limit: int | None = None) -> list[str]:
    """The first documents of `stream(split, 0)`: `limit` of them, or as many as SPLITS says.

    Raises ValueError for an unknown split or a negative limit.
    """
    if limit is not None and limit < 0:
        raise ValueError(f"limit={limit!r} must be 0 or more")
    documents = stream(split, 0)
    return list(itertools.islice(documents, SPLITS[split] if limit is None else limit))


def digest() -> str:
    """SHA-256 (hex) of the test split; figures measured on other text are not comparable."""
    return hashlib.sha256("\0".join(texts("test")).encode()).hexdigest()
