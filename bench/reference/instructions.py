"""Instructions whose fulfilment can be checked without a judge: the words asked for, how many, how they end.

An instruction is a plain dict with the keys `prompt`, `constraints` and `answer` (one response that follows it). A
constraint has a `kind` and what it needs:

- `count`: the response has `value` words;
- `repeat`: every word of the response is `word`;
- `among`: all words differ and are in `words`;
- `separator`: the words are held apart by `value`;
- `ending`: the response ends with `value`.
"""

from typing import Any

from bench.reference.word_lists import COLOURS, KINDS, PEOPLE, PLACES
from bench.reference.world import Draw

_LISTS = {"colours": COLOURS, "devices": KINDS, "people": PEOPLE, "places": PLACES}
_SEPARATORS = {"commas": ", ", "spaces": " "}
_ENDINGS = {"a full stop": ".", "an exclamation mark": "!", "nothing": ""}


def instruction(draw: Draw) -> dict[str, Any]:
    """One instruction; see the module for its keys."""
    count, separated, ended = draw.between(2, 5), draw.one(list(_SEPARATORS)), draw.one(list(_ENDINGS))
    separator, ending = _SEPARATORS[separated], _ENDINGS[ended]
    if draw.chance(0.5):
        word = draw.one(_LISTS[draw.one(list(_LISTS))])
        what, words = f"Write the word {word} {count} times", [word] * count
        rule: dict[str, Any] = {"kind": "repeat", "word": word}
    else:
        listed = draw.one(list(_LISTS))
        what, words = f"Name {count} {listed}", draw.some(_LISTS[listed], count)
        rule = {"kind": "among", "words": list(_LISTS[listed])}
    return {
        "prompt": f"Instruction: {what} with {separated} between them and {ended} at the end.\nResponse:",
        "constraints": [
            {"kind": "count", "value": count},
            rule,
            {"kind": "separator", "value": separator},
            {"kind": "ending", "value": ending},
        ],
        "answer": f" {separator.join(words)}{ending}\n",
    }


def follows(constraints: list[dict[str, Any]], response: str) -> list[bool]:
    """Which of the constraints the response (its first line) fulfils, in their order.

    >>> follows([{"kind": "count", "value": 2}, {"kind": "ending", "value": "."}], " red, blue\\n")
    [True, False]
    """
    line = response.strip().partition("\n")[0]
    words = "".join(c if c.isalnum() else " " for c in line).split()
    gaps = "".join("\0" if c.isalnum() else c for c in line.rstrip(".!"))
    tests = {
        "count": lambda rule: len(words) == rule["value"],
        "repeat": lambda rule: bool(words) and set(words) == {rule["word"]},
        "among": lambda rule: bool(words) and len(words) == len(set(words)) and set(words) <= set(rule["words"]),
        "separator": lambda rule: {gap for gap in gaps.split("\0") if gap} <= {rule["value"]},
        "ending": lambda rule: line[len(line.rstrip(".!")) :] == rule["value"],
    }
    return [tests[rule["kind"]](rule) for rule in constraints]
