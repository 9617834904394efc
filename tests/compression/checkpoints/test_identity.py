"""What a base is: its digest covers all that a number depends on, and nothing else."""

import json
import shutil
from fnmatch import fnmatch

import pytest
from checkpoints import change_tensors, transformers_model

from compression import locate, open_base
from compression.architectures.random_shapes import SHAPES
from compression.calibration.text import open_calibration
from compression.checkpoints.base import byte_tokenizer
from compression.checkpoints.side_files import COPIED
from compression.training.downstream import open_downstream


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint with a tokenizer, a chat template and a generation configuration."""
    folder = tmp_path_factory.mktemp("base") / "hf"
    transformers_model("LlamaForCausalLM", vocab_size=300).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(folder)
    assert (folder / "generation_config.json").exists() and (folder / "chat_template.jinja").exists()
    return folder


@pytest.fixture
def copied(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "elsewhere" / "hf")


def digest(folder):
    return locate(str(folder)).digest


def in_json(name, key, value):
    def change(folder):
        table = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(table | {key: value}))

    return change


def added(name, text):
    def change(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)

    return change


CHANGES = {
    "one weight": lambda folder: change_tensors(folder, lambda tensors: tensors["model.norm.weight"][0].add_(1)),
    "configuration": in_json("config.json", "rope_theta", 5.0),
    "normalizer": in_json("tokenizer.json", "normalizer", {"type": "Lowercase"}),
    "beginning of a text": in_json("tokenizer_config.json", "add_bos_token", True),
    "chat template": added("chat_template.jinja", "{{ messages[0] }}"),
    "another chat template": added("additional_chat_templates/tools.jinja", "{{ tools }}"),
    "special tokens": added("special_tokens_map.json", '{"eos_token": "</s>"}'),
    "added tokens": added("added_tokens.json", '{"<x>": 259}'),
    "end tokens": in_json("generation_config.json", "eos_token_id", [2, 7]),
    "no end tokens": lambda folder: (folder / "generation_config.json").unlink(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_base_that_was_changed_in_place_is_another(whole, copied, change):
    before = digest(copied)
    assert digest(whole) == before  # an equal copy is the same base

    change(copied)

    assert before != digest(copied)


def test_what_no_number_depends_on_is_no_part_of_a_base(whole, copied):
    for name in ("README.md", "training.json", "tokenizer.json.orig", "events.out", "optimizer.pt"):
        (copied / name).write_text("another text")
    for path in copied.iterdir():
        path.touch()

    assert digest(whole) == digest(copied)


def test_every_file_that_a_tokenizer_of_these_architectures_reads_is_covered():
    from transformers import GPT2TokenizerFast, LlamaTokenizerFast, PreTrainedTokenizerFast, Qwen2TokenizerFast
    from transformers import tokenization_utils_base as names

    made = (GPT2TokenizerFast, LlamaTokenizerFast, PreTrainedTokenizerFast, Qwen2TokenizerFast)
    files = {each for kind in made for each in kind.vocab_files_names.values()}
    files |= {names.TOKENIZER_CONFIG_FILE, names.SPECIAL_TOKENS_MAP_FILE, names.ADDED_TOKENS_FILE,
              names.FULL_TOKENIZER_FILE, names.CHAT_TEMPLATE_FILE, f"{names.CHAT_TEMPLATE_DIR}/a.jinja"}  # fmt: skip
    assert [] == [each for each in files if not any(fnmatch(each, pattern) for pattern in COPIED)]


def test_what_is_opened_has_the_digest_of_what_was_located(copied):
    source = locate(str(copied))

    assert source is open_base(source).source
    assert source.digest == open_base(str(copied)).digest


def test_random_bases_are_told_apart_by_their_configurations():
    assert len(SHAPES) == len({locate(f"random:{shape}").digest for shape in SHAPES})


@pytest.mark.parametrize("name", ["reference", "random:x"])
def test_a_folder_that_is_called_as_a_base_by_name_says_that_it_is_a_folder(tmp_path, name):
    (tmp_path / name).mkdir()

    assert f"{name} (folder)" == locate(str(tmp_path / name)).label


# --- Texts and tasks -------------------------------------------------------------------------------------------------

FOLDER = locate("random:tinyllama-1.1b")


def written(folder, **files):
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return str(folder)


def test_a_text_is_its_content_wherever_it_lies(tmp_path):
    texts = {"a_txt": "One.\n\nTwo.", "b_jsonl": '{"text": "Three."}'}
    first, copy = (open_calibration(written(tmp_path / name / "notes", **texts), FOLDER) for name in "xy")
    other = open_calibration(written(tmp_path / "z", **texts | {"a_txt": "One.\n\nToo."}), FOLDER)
    swapped = open_calibration(written(tmp_path / "w", a_txt="Two.\n\nOne.", b_jsonl=texts["b_jsonl"]), FOLDER)

    assert (first.name, first.digest) == (copy.name, copy.digest) == ("notes", first.digest)
    assert 3 == len({first.digest, other.digest, swapped.digest})


def test_the_digest_is_of_the_text_that_was_read_also_if_the_file_changes_meanwhile(tmp_path):
    folder = written(tmp_path / "notes", a_txt="One.\n\nTwo.")
    opened = open_calibration(folder, FOLDER)
    before = opened.digest
    (tmp_path / "notes" / "a.txt").write_text("Something else.")

    assert ["One.", "Two."] == sorted(opened.documents(0))
    assert before == opened.digest != open_calibration(folder, FOLDER).digest


@pytest.mark.parametrize(("name", "known"), [("hub", False), ("random", False), ("embedded", True)])
def test_what_has_a_content_of_its_own_has_a_digest(name, known):
    assert known == (open_calibration(name, FOLDER).digest is not None)


def test_token_ids_are_told_apart_by_numbers_and_shape():
    import torch

    ids = torch.arange(12)
    shapes = [ids.view(3, 4), ids.view(4, 3), ids.view(3, 4) + 1, ids.view(3, 4).int()]

    digests = [open_calibration(each, FOLDER).digest for each in shapes]

    assert 3 == len(set(digests)) and digests[0] == digests[3]


def test_a_downstream_task_is_its_examples(tmp_path):
    lines = '{"prompt": "1+1=", "answer": "2"}\n'
    first, copy, other = (
        open_downstream(written(tmp_path / name / "sums", train_jsonl=text), FOLDER)
        for name, text in (("x", lines), ("y", lines), ("z", lines.replace("2", "3")))
    )

    assert (first.name, first.digest) == (copy.name, copy.digest) == ("sums", first.digest) != ("sums", other.digest)
