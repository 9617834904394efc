"""Tasks from a hub: a real one on loopback, read by the real client of the datasets library."""

import json
import os
import sys

import pytest
from hub import serving
from processes import completed

README = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: main/test-*
---
"""
DIALOGUE = {
    "wikipedia_page_title": "T", "section_title": "S", "context": "It fell in 1987. CANNOTANSWER",
    "questions": ["When?", "Why?"], "answers": {"texts": [["in 1987", "1987"], ["CANNOTANSWER"]]},
    "orig_answers": {"texts": ["in 1987", "CANNOTANSWER"]},
}  # fmt: skip
FILES = {  # Parquet with named configurations, JSON without, the hub's own conversion, a script, other columns
    "openai/gsm8k/README.md": README,
    "openai/gsm8k/main/train-00000-of-00001.parquet": [{"question": f"q{n}", "answer": f"#### {n}"} for n in range(9)],
    "openai/gsm8k/main/test-00000-of-00001.parquet": [{"question": f"t{n}", "answer": f"#### {n}"} for n in range(3)],
    "baber/piqa/train.jsonl": [{"goal": "go", "sol1": "left", "sol2": "right", "label": 1}] * 2,
    "baber/piqa/validation.jsonl": [{"goal": "stay", "sol1": "left", "sol2": "right", "label": 1}],
    "allenai/quac/plain_text/train/0000.parquet": [DIALOGUE],
    "allenai/quac/plain_text/validation/0000.parquet": [DIALOGUE],
    "tau/commonsense_qa/commonsense_qa.py": "import datasets",
    "google-research-datasets/nq_open/train.jsonl": [{"asked": "q", "answer": ["a"]}] * 9,
    "google-research-datasets/nq_open/validation.jsonl": [{"asked": "q", "answer": ["a"]}],
}
CODE = """
import json, sys
from bench.data.sources import open_data
from bench.data.tasks.table import SEED, SUITE
from bench.measure.scoring.prepare import prepare

for name in sys.argv[1:]:
    try:
        prepared = prepare(SUITE[name], open_data("hub", base="some/model"))
    except Exception as error:
        print(json.dumps([name, type(error).__name__, str(error)]))
        continue
    (part,) = prepared.parts.values()
    part.set_fewshot_seed(seed=SEED)
    part.build_all_requests(rank=0, world_size=1)
    print(json.dumps([name, prepared.data, [one.args[0] for one in part.instances]]))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What came of each task: the data's name and its prompts, or the error and its words."""
    import pandas as pd

    folder = tmp_path_factory.mktemp("hub")
    for path, content in FILES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith(".parquet"):
            pd.DataFrame(content).to_parquet(folder / path)
        else:
            (folder / path).write_text(content if isinstance(content, str) else "\n".join(map(json.dumps, content)))
    names = ("gsm8k", "piqa", "quac", "commonsenseqa", "siqa", "nq_open")
    with serving(folder) as address:
        home = str(tmp_path_factory.mktemp("home"))
        environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": home, "HF_HUB_OFFLINE": "0"}
        ran = completed([sys.executable, "-W", "ignore", "-c", CODE, *names], check=True, env=environment)
    return {name: said for name, *said in map(json.loads, ran.stdout.splitlines())}


def test_splits_of_a_named_configuration_are_read_with_examples_from_the_training_split(answers):
    data, prompts = answers["gsm8k"]

    assert data.startswith("hub:openai/gsm8k@")
    assert ["t0", "t1", "t2"] == [prompt.rpartition("Question: ")[2].removesuffix("\nAnswer:") for prompt in prompts]
    assert {8} == {prompt.count("####") for prompt in prompts}


def test_files_without_a_description_are_read_by_their_names(answers):
    assert ["Question: stay\nAnswer:"] * 2 == answers["piqa"][1]


def test_what_has_a_script_on_its_main_branch_is_read_from_the_conversion_of_the_hub(answers):
    assert [prompt.rpartition("Q: ")[2] for prompt in answers["quac"][1]] == ["When?\n\nA:", "Why?\n\nA:"]


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("commonsenseqa", "NotAvailable", "CommonsenseQA: tau/commonsense_qa cannot be loaded"),
        ("siqa", "NotAvailable", "SIQA: lighteval/siqa cannot be loaded"),
        (
            "nq_open",
            "DataError",
            "google-research-datasets/nq_open does not have the format that its configuration reads",
        ),
    ],
)
def test_what_cannot_be_read_says_why(answers, name, error, words):
    assert error == answers[name][0]
    assert words in answers[name][1]
