"""The tasks: sizes, splits, right answers, and baselines that know nothing and must stay near chance."""

import functools
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.measure import reference_scores
from bench.reference import instructions, lessons, programs, tasks, world
from bench.reference.world import Draw

CHANCE = 0.25
CHOICES = reference_scores.CHOICES


@functools.cache
def items_of(task: str, split: str) -> list[dict]:
    return tasks.items(task, split)


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def bag_of_words(item: dict) -> int:
    """The choice whose words the prompt holds most often, per word; the first of equals."""
    seen = Counter(words(tasks.prompt(item)))
    return max(range(4), key=lambda n: sum(seen[w] for w in words(item["choices"][n])) / len(words(item["choices"][n])))


def longest_match(item: dict) -> int:
    """The choice before which the longest end of the prompt stands once more, further up; the first of equals."""
    before = words(tasks.prompt(item))

    def match(choice: str) -> int:
        after, longest = words(choice), 0
        for at in range(len(before) - len(after) + 1):
            if before[at : at + len(after)] == after:
                length = 0
                while length < at and before[at - 1 - length] == before[-1 - length]:
                    length += 1
                longest = max(longest, 1 + length)
        return longest

    return max(range(4), key=lambda n: match(item["choices"][n]))


@pytest.mark.parametrize("split", tasks.SIZES)
@pytest.mark.parametrize("task", tasks.TASKS)
class TestItems:
    def test_there_are_enough_and_their_ids_differ(self, task, split):
        items = items_of(task, split)

        assert len({item["id"] for item in items}) == len(items) >= (500 if split == "test" else 100)
        assert {task} == {item["task"] for item in items}

    def test_they_are_the_same_at_every_call(self, task, split):
        assert items_of(task, split) == tasks.items(task, split)

    def test_a_choice_item_has_four_different_choices_and_one_answer(self, task, split):
        for item in items_of(task, split) if task in CHOICES else ():
            assert len(set(item["choices"])) == 4
            assert item["answer"] in range(4)
            assert all(choice.startswith(" ") for choice in item["choices"])


@pytest.mark.parametrize("task", CHOICES)
@pytest.mark.parametrize("baseline", [bag_of_words, longest_match])
def test_a_baseline_that_only_matches_words_stays_near_chance(baseline, task):
    items = tasks.items(task, "test")
    right = sum(baseline(item) == item["answer"] for item in items) / len(items)

    assert right < CHANCE + 0.1


@pytest.mark.parametrize("task", CHOICES)
def test_no_place_among_the_choices_is_right_much_more_often(task):
    answers = Counter(item["answer"] for item in tasks.items(task, "test"))

    assert max(answers.values()) / answers.total() < CHANCE + 0.1


@pytest.mark.parametrize("task", ["facts_easy", "facts_hard", "categories"])
def test_a_fact_is_asked_in_one_split_only(task):
    def asked(split: str) -> set[str]:
        return {
            re.sub(r"What is the (\w+) of|Which (\w+) has", r"\1\2", i["question"]) for i in tasks.items(task, split)
        }

    assert not asked("test") & asked("train")
    assert not asked("test") & asked("validation")


def test_the_right_fact_is_that_of_the_device():
    for item in tasks.items("facts_hard", "test")[:100]:
        device = next(d for d in world.devices("rare") if d.name in item["question"])
        assert item["choices"][item["answer"]].strip() in device.facts.values()


@pytest.mark.parametrize("split", tasks.SIZES)
def test_the_answer_stands_in_the_gold_document_and_about_the_device_asked_for(split):
    texts = {document["id"]: document for document in tasks.documents(split)}

    for item in tasks.items("rag", split):
        gold = texts[item["gold"]]
        assert gold["device"] in item["question"]
        assert re.search(rf"\b{item['answer']}\.", gold["text"])
        assert item["gold"] in item["documents"]
        assert len(set(item["documents"])) == 3
        assert tasks.prompt(item).count("Manual of the") == 3


def test_questions_without_documents_are_the_same_questions():
    with_text, without = tasks.items("rag", "test"), tasks.items("no_rag", "test")

    assert [i["question"] for i in with_text] == [i["question"] for i in without]
    assert [i["answer"] for i in with_text] == [i["answer"] for i in without]
    assert tasks.prompt(without[0]) == without[0]["question"]


def test_the_most_common_answer_without_the_text_would_score_little():
    answers = Counter(item["answer"] for item in tasks.items("rag", "test"))

    assert answers.most_common(1)[0][1] / answers.total() < 0.05


def test_examples_before_a_question_are_of_training_and_as_many_as_the_paper_has():
    sums, facts = tasks.items("arithmetic", "test")[0], tasks.items("categories", "test")[0]

    assert tasks.prefix(sums).count("####") == 8
    assert tasks.prefix(facts).count("Q:") == 5
    for item in tasks.items("categories", "test"):
        assert item["question"] not in tasks.prefix(item)


def test_the_answer_of_every_program_passes_its_tests_and_no_prompt_is_taught():
    seen = "".join(text for n in range(3000) for text, _ in lessons.code(Draw("code", n), 1.0))

    for item in tasks.items("code", "test"):
        space: dict = {}
        exec("\n".join([item["question"] + item["answer"], *item["tests"]]), space)
        assert item["question"] not in seen


@given(st.integers(0, 10**6))
def test_tests_tell_a_program_from_one_that_returns_its_input_unless_they_mean_the_same(seed):
    made = programs.program(Draw(seed), "test")
    results = {test.partition("== ")[2] for test in made.tests}

    assert len(made.tests) == 3
    assert all(test.startswith("assert solve(") for test in made.tests)
    assert results


@given(st.integers(0, 10**6))
def test_the_answer_of_an_instruction_follows_it_and_a_spoilt_one_does_not(seed):
    one = instructions.instruction(Draw(seed))
    answer = one["answer"]

    assert all(instructions.follows(one["constraints"], answer))
    assert not all(instructions.follows(one["constraints"], answer.rstrip("\n") + "?"))
    assert not all(instructions.follows(one["constraints"], answer.split()[0]))
    assert not all(instructions.follows(one["constraints"], ""))


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        ({"kind": "count", "value": 2}, "red, blue", "red"),
        ({"kind": "repeat", "word": "red"}, "red red", "red blue"),
        ({"kind": "among", "words": ["red", "blue"]}, "blue red", "red red"),
        ({"kind": "separator", "value": ", "}, "red, blue", "red blue"),
        ({"kind": "ending", "value": "!"}, "red!", "red."),
    ],
)
def test_every_kind_of_constraint_can_hold_and_fail(rule, good, bad):
    assert [True] == instructions.follows([rule], good)
    assert [False] == instructions.follows([rule], bad)


@pytest.mark.parametrize(("task", "split"), [("fact_easy", "test"), ("rag", "tset")])
def test_an_unknown_task_or_split_is_refused_with_the_known_ones(task, split):
    with pytest.raises(ValueError, match=r"(task|split) must be one of"):
        tasks.items(task, split)
