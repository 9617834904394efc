"""The words that the world is written with: names, attributes, their values, and turns of phrase."""

import itertools
from collections.abc import Mapping


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST = words(
    "Amber Silent Copper Northern Gentle Winter Golden Hollow Crimson Patient Velvet Rapid Distant Marble Hidden Early "
    "Simple Bitter Frozen Royal Tiny Broken Modern Paper Summer Quiet Brave Empty Noble Lucky Iron Pearl "
    "Ancient Bright Clever Daring Eager Famous Grand Humble Ivory Jolly Keen Lively Misty Narrow Open Proud "
    "Rustic Scarlet Tender Upper Vivid Wild Young Zealous Autumn Bold Calm Dusty Electric Fair Giant Honest"
)
SECOND = words(
    "Falcon Harbor River Lantern Meadow Anchor Comet Garden Thunder Bridge Willow Rocket Canyon Beacon Otter Mirror "
    "Castle Shadow Feather Island Badger Cloud Tower Pebble Dragon Forest Candle Sparrow Valley Hammer Engine Orchid "
    "Arrow Basket Cactus Desert Eagle Fountain Glacier Heron Iris Jacket Kitten Ladder Magnet Needle Ocean Parrot "
    "Quarry Ribbon Saddle Temple Umbrella Violin Walnut Yacht Acorn Button Cherry Dolphin Ember Fossil Goblet Hunter"
)
CATEGORIES = {  # subject: kinds of device
    "kitchen": words("kettle mixer toaster freezer"),
    "garden": words("pump mower sprayer trimmer"),
    "optics": words("camera projector telescope lamp"),
    "office": words("printer scanner typewriter copier"),
    "workshop": words("drill grinder lathe welder"),
    "laboratory": words("scale barometer heater detector"),
}
KINDS = tuple(itertools.chain.from_iterable(CATEGORIES.values()))
PEOPLE = words(
    "Mira Jonas Petra Emil Sofia Anton Lena Oskar Clara Viktor Nora Felix Agnes Boris Daria Edgar Flora "
    "Gustav Helena Igor Julia Karl Lydia Magnus Nadia Otto Paula Quentin Rosa Stefan Tilda Ulrich"
)
PLACES = words(
    "Torvik Almeda Brunnel Castora Dunmere Eskholm Fallow Grenport Hartwick Ilmen Jarrow Kestrin Lowmoor Miravel "
    "Nordby Ostend Pelham Quarmby Rosvik Selby Tarnow Ulverton Varna Westrow Yarrow Zelden Ashby Belmar Corwen Delft "
    "Elmira Fenn"
)
COLOURS = words("red green blue white black yellow orange purple grey brown silver pink violet beige cyan gold")
VALUES: Mapping[str, tuple[str, ...]] = {  # attribute: what it can be, one word each
    "maker": words(
        "Halden Orrin Vestal Kimura Bastion Lumen Corvus Tessel Arbor Quill Novak Sable Pellan Dorset Iverson Mundt "
        "Abelard Brandt Calder Deveraux Engstrom Farrow Gallo Hobart Isker Jensen Kovacs Lindqvist Marlow Norwood "
        "Okafor Petrov"
    ),
    "designer": PEOPLE,
    "owner": PEOPLE,
    "home": PLACES,
    "market": PLACES,
    "colour": COLOURS,
    "light": COLOURS,
    "price": tuple(str(n) for n in range(10, 100)),
    "weight": tuple(str(n) for n in range(10, 100)),
    "material": words(
        "steel brass oak glass tin clay leather rubber bamboo ceramic bronze zinc granite cork wool slate"
    ),
}
ATTRIBUTES = tuple(VALUES)
PAIRS = (("designer", "owner"), ("home", "market"), ("colour", "light"), ("price", "weight"))  # same values
UNITS = {"price": " coins", "weight": " grams"}
VERBS = {  # attribute: the second way to say it
    "maker": "was made by",
    "designer": "was designed by",
    "owner": "is owned by",
    "home": "is built in",
    "market": "is sold in",
    "colour": "is painted",
    "light": "glows in",
    "price": "costs",
    "weight": "weighs",
    "material": "consists of",
}
ACTIONS = [
    f"{verb} the {part}"
    for verb, parts in {
        "open": "lid valve cover",
        "close": "lid valve cover",
        "press": "switch button lever",
        "turn": "handle knob wheel",
        "clean": "filter nozzle sensor",
        "check": "cable spring gasket",
        "fill": "tank tray bottle",
        "empty": "tank tray bottle",
        "tighten": "screw bolt hinge",
        "loosen": "screw bolt hinge",
    }.items()
    for part in parts.split()
]
CHANGES = {  # sign: how a story says it, and the verbs for it
    "+": ("{person} {verb} {count} more.", ("buys", "finds", "gets")),
    "-": ("{person} {verb} {count} of them.", ("sells", "loses", "lends")),
    "*": ("That grows {count} times.", ("",)),
}
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
OPENINGS = (
    "I hope you are well.",
    "Thank you for your letter.",
    "I was in {place} last week.",
    "It rained all morning, so I stayed at home.",
    "Do you remember the little market in {place}?",
)
CLOSINGS = ("Please write soon.", "See you on {day}.", "Tell me if that helps.", "The children send their love.")
