"""The generated world: the same bytes everywhere, and held-out devices that training never names."""

import itertools
import os
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import REPOSITORY, completed

from bench.reference import lessons, word_lists, world
from bench.reference.world import Draw

DIGEST = "d422cd28b7810bdcc13b488a2ea372daf4ef74966a139e8e62138846f92a8723"
PAIRS_OF_WORDS = re.compile(r"(?=\b([A-Z]\w+ [A-Z]\w+)\b)")  # every two capitalised words in a row, overlaps too


def python(code: str, **environment: str) -> str:
    done = completed([sys.executable, "-c", code], cwd=REPOSITORY, env=os.environ | environment, check=True)
    return done.stdout.strip()


def taught(count: int) -> list[str]:
    """Texts of lessons, over the whole curriculum."""
    return ["".join(text for text, _ in lessons.lesson(Draw("seen", n), n / count)) for n in range(count)]


def test_the_test_split_has_the_pinned_bytes():
    assert DIGEST == world.digest()


@pytest.mark.parametrize("seed", ["0", "1"])
def test_the_bytes_do_not_depend_on_the_hash_seed(seed):
    code = (
        "import hashlib; from bench.reference import lessons, tasks, world\n"
        "said = [lessons.lesson(world.Draw(n), 0.5) for n in range(50)]\n"
        "said += [tasks.items(task, 'test') for task in tasks.TASKS]\n"
        "print(world.digest(), hashlib.sha256(repr(said).encode()).hexdigest())"
    )

    assert python(code, PYTHONHASHSEED="2") == python(code, PYTHONHASHSEED=seed)


def test_a_stream_repeats_itself_and_differs_between_seeds():
    first, again, other = (list(itertools.islice(world.stream("train", seed), 50)) for seed in (3, 3, 4))

    assert first == again
    assert not set(first) & set(other)


def test_no_name_is_in_two_groups():
    names = [name for group in world.GROUPS for name in world.names(group)]

    assert sum(world.GROUPS.values()) == len(set(names)) == len(names)


def test_every_word_of_a_held_out_name_is_in_names_of_training():
    held = {word for split in ("validation", "test") for name in world.names(split) for word in name.split()}
    seen = {word for group in ("frequent", "rare", "passing") for name in world.names(group) for word in name.split()}

    assert held <= seen


@pytest.mark.parametrize("split", ["validation", "test"])
def test_held_out_devices_are_named_only_in_their_split(split):
    names = set(world.names(split))
    others = [
        *world.texts("train", limit=3000),
        *taught(1500),
        *world.texts({"validation": "test"}.get(split, "validation")),
    ]

    assert len(names & set(PAIRS_OF_WORDS.findall("\n".join(world.texts(split))))) >= 5
    assert not names & set(PAIRS_OF_WORDS.findall("\n".join(others)))


@given(st.sampled_from(sorted(world.GROUPS)), st.integers(0, 79))
def test_the_two_attributes_of_a_pair_share_their_values_and_differ(group, number):
    device = world.edition(world.names(group)[number])

    for one, other in word_lists.PAIRS:
        assert word_lists.VALUES[one] == word_lists.VALUES[other]
        assert device.facts[one] != device.facts[other]


def test_every_attribute_has_at_least_sixteen_values_of_one_word():
    for values in word_lists.VALUES.values():
        assert len(set(values)) == len(values) >= 16
        assert not [value for value in values if " " in value]


def test_names_in_one_context_have_no_word_in_common():
    for number in range(200):
        words = " ".join(device.name for device in world.fresh(Draw(number), "test", 3)).split()
        assert len(set(words)) == len(words) == 6


@given(st.integers(0, 10**6), st.sampled_from(["train", "validation", "test"]))
def test_every_step_of_a_worked_chain_is_right_and_the_last_is_the_answer(seed, split):
    story, chain = world.sum_story(Draw(seed), split)
    steps = re.findall(r"(\d+) ([*+-]) (\d+) = (\d+)\.", chain)
    apply = {"*": int.__mul__, "+": int.__add__, "-": int.__sub__}

    assert 2 <= len(steps) <= 4
    assert re.findall(r"\d+", story)[0] == steps[0][0]
    for left, sign, right, result in steps:
        assert int(result) == apply[sign](int(left), int(right)) > 0
    assert [before[3] for before in steps[:-1]] == [after[0] for after in steps[1:]]
    assert chain.endswith(f" #### {steps[-1][3]}\n")


def test_the_first_numbers_of_held_out_sums_begin_no_training_sum():
    def first(split: str) -> set[tuple[str, ...]]:
        return {tuple(re.findall(r"\d+", world.sum_story(Draw(n), split)[0])[:2]) for n in range(2000)}

    assert len(first("test")) >= 20
    assert not first("train") & first("test")


@pytest.mark.parametrize("call", [world.texts, lambda split: world.stream(split, 0), world.devices])
def test_an_unknown_name_is_refused_with_the_known_ones(call):
    with pytest.raises(ValueError, match=r"(validation, test, not 'tset'|'tset' is unknown; .*validation, test)"):
        call("tset")


def test_a_negative_limit_is_refused():
    with pytest.raises(ValueError, match="limit must be at least 0, not -1"):
        world.texts("test", limit=-1)


def test_importing_world_lessons_and_tasks_imports_no_torch():
    code = (
        "import sys, bench.reference.lessons, bench.reference.tasks\n"
        "import bench.commands.train_reference, bench.measure.reference_scores\n"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )

    assert "set()" == python(code)
