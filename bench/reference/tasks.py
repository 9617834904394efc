"""The tasks the embedded reference is scored on, one stand-in for each of the papers'.

`items(task, split)` gives plain dicts, `prompt(item)` the text the model reads (worked examples included), and for the
documents that questions are about there is `documents(split)`. Keys of an item by kind of task:

- choice (*continuation* for HellaSwag, *facts_easy* and *facts_hard* for ARC, *categories* for MMLU): `id`, `task`,
  `question`, `choices` (four texts that follow the prompt, each with its leading space), `answer` (index into them);
  *categories* has `category`.
- *arithmetic* (GSM8K): `id`, `task`, `question`, `answer` (the worked chain), `final` (what follows `####`).
- *code* (HumanEval, MBPP): `id`, `task`, `question` (signature and docstring), `answer` (one body that passes),
  `entry_point`, `tests` (assert statements).
- *instructions* (judge metrics): `id`, `task`, `question`, `answer`, `constraints` (see `instructions`).
- *rag*: `id`, `task`, `question`, `answer`, `gold` (id of the document with the answer), `documents` (ids of it and of
  two about devices with a word of the name in common, in the order in which they are read); *no_rag* has the same
  questions without the documents.

A document is a dict with `id`, `device` and `text`. All splits are told apart by seed; devices of held-out splits occur
in no training text, and facts asked about known devices are in one split each (their texts are in all).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from bench.reference import instructions, programs, word_lists, world
from bench.reference.word_lists import ATTRIBUTES, CATEGORIES, KINDS, PAIRS, VALUES
from bench.reference.world import Device, Draw

Item = dict[str, Any]

SIZES = {"test": 500, "validation": 100, "train": 2000}  # items of a split; of known facts, train has what is left
SHOTS = {"arithmetic": 8, "categories": 5}  # worked examples before the question


def documents(split: str) -> list[Item]:
    """The manuals of a split's devices, each about six attributes; of training, those of 400 passing devices."""
    texts = {name: world.manual(Draw("manual", name), world.edition(name), _told(name)) for name in _names(split)}
    return [{"id": _id(name, split), "device": name, "text": text} for name, text in texts.items()]


def _names(split: str) -> Sequence[str]:
    _check(split)
    return world.names("passing")[: world.GROUPS["test"]] if split == "train" else world.names(split)


def _id(name: str, split: str) -> str:
    return f"{split}-{name.replace(' ', '-').lower()}"


def _told(name: str) -> list[str]:
    """The attributes that the manual of a device states, in order."""
    return Draw("told", name).some(ATTRIBUTES, 6)


@functools.cache
def _texts(split: str) -> dict[str, str]:
    return {document["id"]: document["text"] for document in documents(split)}


def items(task: str, split: str) -> list[Item]:
    """The items of a task in a split, the same ones at every call.

    Raises ValueError for an unknown task or split.
    """
    if task not in _MAKERS:
        raise ValueError(f"task must be one of {', '.join(_MAKERS)}, not {task!r}")
    _check(split)
    return [{"id": f"{task}-{split}-{n}", "task": task, **item} for n, item in enumerate(_MAKERS[task](split))]


def examples(task: str) -> list[tuple[str, str]]:
    """What to train on for a task: what the model reads, without worked examples, and how it should go on.

    The items of the training split; for arithmetic as many others with the training split's numbers and the held-out
    splits' lengths, of which the reference was taught all but the longest.

    Raises ValueError for an unknown task.
    """
    if task == "arithmetic":
        draws = (Draw("downstream", n) for n in range(SIZES["train"]))
        return [world.sum_story(draw, "train", most=5) for draw in draws]
    around = {"rag": " {}\n", "no_rag": " {}\n", "code": "{}\n"}.get(task, "{}")  # what the answers stand in
    return [(prompt(item) if task == "rag" else item["question"], around.format(_solution(item)))
            for item in items(task, "train")]  # fmt: skip


def _check(split: str) -> None:
    if split not in SIZES:
        raise ValueError(f"split must be one of {', '.join(SIZES)}, not {split!r}")


def prompt(item: Item) -> str:
    """All that the model reads before it answers."""
    return prefix(item) + item["question"]


def prefix(item: Item) -> str:
    """What stands before the question: worked examples of training, documents, or nothing."""
    if item["task"] == "rag":
        split = item["id"].split("-")[1]
        return "".join(f"{_texts(split)[document]}\n" for document in item["documents"])
    return _shots(item["task"], item.get("category"))


@functools.cache
def _shots(task: str, category: str | None) -> str:
    if task not in SHOTS:
        return ""
    pool = [item for item in items(task, "train") if item.get("category") == category][: SHOTS[task]]
    return "".join(item["question"] + _solution(item) for item in pool)


def _solution(item: Item) -> str:
    return item["choices"][item["answer"]] + "\n" if "choices" in item else item["answer"]


def _choice(draw: Draw, question: str, right: str, wrong: Sequence[str]) -> Item:
    """A four-way item; the first three different wrong answers are taken."""
    others = [text for text in dict.fromkeys(wrong) if text != right][:3]
    choices = draw.some([right, *others])
    return {"question": question, "choices": [f" {text}" for text in choices], "answer": choices.index(right)}


def _continuation(split: str) -> list[Item]:
    """What comes next: one in four in a procedure that training told, the others in a passage on held-out devices."""
    draw = Draw("continuation", split)
    return [(_restatement if n % 4 else _next_step)(draw, split) for n in range(SIZES[split])]


def _next_step(draw: Draw, split: str) -> Item:
    """The next action of a kind; wrong are another one of the same kind, done or to be done, and two of other kinds.

    Of those, one follows the same action there if there is such a kind.
    """
    kind, at = draw.one(KINDS), draw.between(1, 5)
    steps = world.steps(kind)
    start, _, _ = world.procedure(kind).rpartition(f" {steps[at]}") if at == 5 else world.procedure(kind).partition(
        f" then {steps[at]},"
    )  # fmt: skip
    question = start if at == 5 else f"{start} then"
    end = "." if at == 5 else ","
    procedures = [world.steps(other) for other in KINDS if other != kind]
    after = [other[i + 1] for other in procedures for i in range(5) if other[i] == steps[at - 1]]
    others = draw.some([step for i, step in enumerate(steps) if i != at])
    wrong = [*draw.some(after)[:1], *others[:2], *draw.some(word_lists.ACTIONS)]
    return _choice(draw, question, f"{steps[at]}{end}", [f"{step}{end}" for step in wrong])


def _restatement(draw: Draw, split: str) -> Item:
    """A fact of a passage about four namesakes in another form; wrong are three like it, the device's own first."""
    pair = draw.one(PAIRS)
    while True:
        facts = [(d, a, draw.between(0, 1)) for d in world.fresh(draw, split, 4, world.namesakes) for a in pair]
        if len({device.facts[attribute] for device, attribute, _ in facts}) == len(facts):
            break
    device, attribute, form = facts[0]
    passage = " ".join(world.statement(d, a, form=form) for d, a, form in draw.some(facts))
    said = world.statement(device, attribute, form=1 - form)
    right, *wrong = [d.facts[a] + device.answer(attribute).removeprefix(device.facts[attribute]) for d, a, _ in facts]
    start = said.removesuffix(f" {right}.")
    question = f"{passage} In short, {start[0].lower()}{start[1:]}"
    return _choice(draw, question, f"{right}.", [f"{value}." for value in wrong])


@functools.cache
def _facts(*groups: str) -> Sequence[tuple[Device, str]]:
    """All facts of the groups in random order, those of devices that are asked about first."""
    every = [device for group in groups for device in world.devices(group)]
    asked = {device.name for group in groups for device in world.asked(group)}
    pairs = Draw("facts", *groups).some([(device, attribute) for device in every for attribute in ATTRIBUTES])
    return sorted(pairs, key=lambda about: about[0].name not in asked)


def _of_split(split: str, *groups: str) -> Sequence[tuple[Device, str]]:
    """Facts that are asked in a split: test and validation have some of the asked, train has all others."""
    pairs, test, validation = _facts(*groups), SIZES["test"], SIZES["validation"]
    if split == "train":
        return pairs[test + validation :]
    return pairs[:test] if split == "test" else pairs[test : test + validation]


def _fact(draw: Draw, device: Device, attribute: str) -> Item:
    """Wrong are: the value of the attribute's twin, and those of devices that share a word of the name."""
    twin = [device.facts[a] for pair in PAIRS if attribute in pair for a in pair if a != attribute]
    alike = [other.facts[attribute] for other in draw.some(_namesakes(device.name))]
    wrong = [*twin, *alike, *draw.some(VALUES[attribute], 4)]
    question = world.question(device, attribute, form=draw.between(0, 1))
    return _choice(draw, question, device.facts[attribute], wrong)


@functools.cache
def _namesakes(name: str) -> list[Device]:
    """The known devices that share one word of a name."""
    known = [device for group in world.STUDIED for device in world.devices(group)]
    return [device for device in known if len(set(device.name.split()) & set(name.split())) == 1]


def _facts_of(split: str, *groups: str) -> list[Item]:
    draw = Draw("fact", split, *groups)
    return [_fact(draw, *about) for about in _of_split(split, *groups)]


def _categories(split: str) -> list[Item]:
    draw, pairs = Draw("categories", split), _of_split(split, *world.STUDIED)
    found = [_fact(draw, device, a) | {"category": device.category} for device, a in pairs]
    return [item for category in CATEGORIES for item in found if item["category"] == category]


def _arithmetic(split: str) -> list[Item]:
    """Problems of the lengths that training tells, and in held-out splits of one step more."""
    made = []
    for n in range(SIZES[split]):
        question, chain = world.sum_story(Draw("arithmetic", split, n), split, most=4 if split == "train" else 5)
        made.append({"question": question, "answer": chain, "final": chain.rpartition("#### ")[2].strip()})
    return made


def _code(split: str) -> list[Item]:
    made: dict[str, Item] = {}
    draw = Draw("code", split)
    while len(made) < SIZES[split]:
        one = programs.program(draw, split)
        item = {"question": one.prompt, "answer": one.body, "entry_point": "solve", "tests": list(one.tests)}
        made.setdefault(one.prompt, item)
    return list(made.values())


def _instructions(split: str) -> list[Item]:
    draw = Draw("instructions", split)
    return [
        {"question": one.pop("prompt"), **one} for one in (instructions.instruction(draw) for _ in range(SIZES[split]))
    ]


def _rag(split: str) -> list[Item]:
    made, draw = [], Draw("rag", split)
    for _ in range(SIZES[split]):
        gold, *others = world.namesakes(draw, _names(split), 3)
        device, attribute = world.edition(gold), draw.one(_told(gold))
        made.append(
            {
                "question": world.question(device, attribute, form=draw.between(0, 1)),
                "answer": device.answer(attribute),
                "gold": _id(gold, split),
                "documents": [_id(name, split) for name in draw.some([gold, *others])],
            }
        )
    return made


_MAKERS: dict[str, Callable[[str], list[Item]]] = {
    "continuation": _continuation,
    "facts_easy": lambda split: _facts_of(split, "frequent"),
    "facts_hard": lambda split: _facts_of(split, "rare"),
    "categories": _categories,
    "arithmetic": _arithmetic,
    "code": _code,
    "rag": _rag,
    "no_rag": _rag,
    "instructions": _instructions,
}
TASKS = tuple(_MAKERS)
