"""The papers' figures in the tables of the report: as they are in print, and where they stand."""

from report_rows import PERPLEXITY, SIZE, row, table_of

from bench.report.layout import FAMILIES, layouts
from bench.report.orders import ORDERS
from bench.report.papers import PAPERS


def test_the_papers_figures_are_those_in_print():
    """The reference points that the specification repeats."""
    e, o = PAPERS["E"].figures, PAPERS["O"].figures

    assert (13.49, 62.48, 15.97, 3061.60) == tuple(
        e["fp16"][head] for head in ("Size (GiB)", "Latency (ms/tok)", "Throughput (tok/s)", "Energy (mJ/tok)")
    )
    assert (0.133, 0.333, 0.065, 0.137, 0.437, -0.029) == tuple(
        e["nf4"][head] for head in ("F1", "Faithfulness", "Relevance", "ROUGE-L", "BERTScore F1", "F1 Improvement")
    )
    assert {"nf4-kd-p": 24.069, "kd-nf4-p": 53.366, "nf4-p-kd": 34.494, "p-kd-nf4": 5.048} == {
        order: o[order]["Perplexity"] for order in ("nf4-kd-p", "kd-nf4-p", "nf4-p-kd", "p-kd-nf4")
    }
    assert set(ORDERS) < set(o)


def test_every_figure_of_a_paper_has_a_column():
    heads = {column.head for family in FAMILIES for layout in layouts(family) for column in layout.columns}
    heads |= {"G-Eval", "Prompt Alignment", "Clarity", "Size (MiB)"}

    for paper in PAPERS.values():
        assert {head for line in paper.figures.values() for head in line} <= heads


def test_on_the_papers_base_its_figures_stand_among_the_lines():
    rows = [row(SIZE, value, recipe, base="mistralai/Mistral-7B-Instruct-v0.1") for recipe, value in
            (("fp16", 13.49), ("nf4", 3.84))]  # fmt: skip

    table = table_of(rows, "E14")

    assert ["fp16", None, "nf4", None] == [line.recipe if line.source is None else None for line in table.lines]
    assert [13.49, 13.49, 3.84, 3.74] == [line.cells[0].value for line in table.lines]
    assert "without the scales" in table.notes[table.lines[3].cells[0].note - 1]
    assert not table.elsewhere


def test_on_another_base_they_stand_apart():
    table = table_of([row(SIZE, 0.0033, base_value=0.0098)], "E14")

    assert all(line.source is None for line in table.lines)
    assert [13.49, 3.74] == [line.cells[0].value for line in table.elsewhere]
    assert "another base, Mistral-7B-Instruct-v0.1" in table.remarks[-1]


def test_random_weights_of_the_papers_shape_share_its_speed_and_not_its_quality():
    rows = [row(SIZE, 3.84, base="random:mistral-7b"), row(PERPLEXITY, 1e4, base="random:mistral-7b")]

    assert any(line.source == "E" for line in table_of(rows, "E14").lines)
    assert not any(line.source == "E" for line in table_of(rows, "E20").lines)


def test_a_papers_figure_is_never_the_best():
    rows = [row(SIZE, value, recipe, base="random:mistral-7b") for recipe, value in (("nf4", 3.84), ("hqq", 4.0))]

    marked = [line for line in table_of(rows, "E14").lines if line.cells[0].best]

    assert [("nf4", None)] == [(line.recipe, line.source) for line in marked]
