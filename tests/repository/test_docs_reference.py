"""The reference of docs/: what is made from the code is that of the code, and what is written by hand is true of it."""

import doctest
import json
import re

import generate
import pytest
from docs_pages import DOCS, blocks, declared
from generator import command_lines, registries

import compression
from bench.data.tasks import folder
from bench.data.tasks.table import SUITE
from bench.gate.baseline import Baseline
from bench.measure.scoring.prepare import prepare
from bench.metrics import all_metrics, metrics_of
from bench.metrics.size import ArtefactReading
from bench.results.journal import read
from bench.session.exit_status import EXIT_STATUSES
from compression.checkpoints.artefact import LayerReport
from compression.checkpoints.opening import read_manifest
from compression.cost import Cost
from compression.layers.stored import describe, restore
from compression.recipes.recipe import Recipe
from compression.recipes.registry import built_in

# --- Made from the code ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", generate.MADE)
def test_a_generated_page_is_that_of_the_code(page):
    assert generate.MADE[page]() == (DOCS / page).read_text(), "run python docs/generate.py"


@pytest.mark.parametrize("name", built_in())
def test_every_parameter_of_a_method_has_a_type_a_default_and_a_meaning(name):
    for parameter, kind, default, meaning in registries.parameters(compression.list_methods()[name]):
        assert kind and default and meaning, parameter


def test_every_option_has_a_meaning():
    rows = [line for line in command_lines.options_page().splitlines() if line.startswith("| `-")]
    assert len(rows) > 80
    assert [row for row in rows if row.endswith("|  |")] == []


def test_every_metric_has_a_definition_unit_direction_and_tolerance():
    text = (DOCS / "reference" / "metrics.md").read_text()
    for metric in all_metrics().values():
        section = text.split(f"\n### {metric.name}\n")[1].split("\n### ")[0]
        assert metric.title.split("`")[0].split("*")[0].split("<")[0].strip() in section
        assert f"| {metric.better} | `{metric.kind}` |" in section


def test_every_public_name_is_in_the_reference():
    headings = re.findall(r"^### (\w+)$", (DOCS / "reference" / "python.md").read_text(), re.MULTILINE)
    assert set(compression.__all__) <= set(headings)


def test_every_exit_status_of_pytest_has_a_meaning():
    assert {int(status) for status in pytest.ExitCode} <= set(EXIT_STATUSES)


# --- Formats ---------------------------------------------------------------------------------------------------------


def example(page):
    [code] = blocks(DOCS / "reference" / f"{page}-format.md", "json")
    return code


def test_the_journal_that_is_shown_is_one(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_text(example("journal"))

    contents = read(path)

    assert ["run", "begin", "layers", "row", "verdict", "end"] == [record["kind"] for record in contents.records]
    assert "efficiency.stored_bytes" == contents.rows()[0].metric


def test_every_kind_and_field_of_the_journal_is_told():
    text = (DOCS / "reference" / "journal-format.md").read_text()
    for line in example("journal").splitlines():
        record = json.loads(line)
        assert [name for name in (record["kind"], *record) if f"`{name}`" not in text] == []


def test_the_baseline_that_is_shown_is_one(tmp_path):
    path = tmp_path / "reference" / "nf4.json"
    path.parent.mkdir()
    path.write_text(example("baseline"))

    baseline = Baseline.load(path)

    assert ("reference", "nf4", path) == (baseline.base, baseline.recipe, baseline.file(tmp_path))
    assert 1 == len(baseline.devices)


def test_the_manifest_that_is_shown_is_one(tmp_path):
    (tmp_path / "compression.json").write_text(example("artefact"))

    manifest = read_manifest(tmp_path)

    assert manifest["text"] == Recipe.from_json(manifest["recipe"]).text
    assert [LayerReport.from_json(entry) for entry in manifest["report"]]
    assert Cost.from_json(manifest["cost"])
    for description in manifest["layers"].values():
        assert description == describe(restore(description))
    text = (DOCS / "reference" / "artefact-format.md").read_text()
    assert [name for name in (*manifest, *description) if f"`{name}`" not in text] == []


# --- Extending -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("tiny_shapes")
def test_the_method_that_is_shown_runs_and_is_saved(tmp_path):
    with declared(DOCS / "extend" / "a-method.md"):
        compressed = compression.compress("random:tiny-llama", "pow2(steps=4)")
        compressed.save(tmp_path / "out")

        weight = compressed.model.model.layers[0].mlp.up_proj.weight
        exponents = weight[weight != 0].abs().float().log2()
        assert bool((exponents == exponents.round()).all())
        assert len(exponents.unique()) <= 4
        assert (tmp_path / "out" / "model.safetensors").exists()
        with pytest.raises(compression.RecipeError, match="must be at least 1"):
            compression.Recipe.parse("pow2(steps=0)")
        assert [("`steps`", "integer", "`8`")] == [
            row[:3] for row in registries.parameters(compression.list_methods()["pow2"])
        ]
    assert "pow2" not in compression.list_methods()


def test_the_metric_that_is_shown_is_measured():
    with declared(DOCS / "extend" / "a-metric.md") as space:
        reading = ArtefactReading(stored_bytes=2**20, parameters=1, base_stored_bytes=2**22, base_parameters=1)
        [metric] = [each for each in metrics_of("artefact") if each.name == "efficiency.saved_mb"]
        example = doctest.DocTestParser().get_doctest(metric.function.__doc__, space, metric.name, None, 0)
        assert 3.0 == metric(reading)
        assert (0, 1) == doctest.DocTestRunner().run(example)[:2]
    assert "efficiency.saved_mb" not in all_metrics()


SCIQ = {"support": "Ice melts.", "question": "What melts?", "correct_answer": "ice", "distractor1": "fire",
        "distractor2": "sand", "distractor3": "iron"}  # fmt: skip


def test_the_task_that_is_shown_is_read_from_a_folder(tmp_path):
    from bench.data.sources import open_data

    (tmp_path / "sciq").mkdir()
    (tmp_path / "sciq" / "test.jsonl").write_text(json.dumps(SCIQ) + "\n")
    with declared(DOCS / "extend" / "a-task.md"):
        prepared = prepare(SUITE["sciq"], open_data(str(tmp_path), base="reference"))

        [part] = prepared.parts.values()
        assert ["fire", "sand", "iron", "ice"] == part.doc_to_choice(part.eval_docs[0])
        assert "sciq" in folder._READERS
    assert "sciq" not in SUITE
