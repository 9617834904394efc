"""Whole runs of the workbench on a tiny checkpoint, without pytest around them: what it measures, in a second."""

from pathlib import Path
from types import SimpleNamespace

from checkpoints import TINY, transformers_model

from bench import test_efficiency as efficiency
from bench import test_quality as quality
from bench.session.options import Options
from bench.session.session import Failure, Workbench
from compression import Recipe
from compression.checkpoints.base import byte_tokenizer

MEASUREMENTS = {
    "artefact": efficiency.test_size,
    "perplexity": quality.test_perplexity,
    "divergence": quality.test_divergence,
}


def make_base(root: Path, **sizes) -> None:
    """A checkpoint and a text to measure it on, in `root`."""
    transformers_model("LlamaForCausalLM", **TINY | {"vocab_size": 300} | sizes).save_pretrained(root / "tiny")
    byte_tokenizer().save_pretrained(root / "tiny")
    (root / "data").mkdir()
    (root / "data" / "test.txt").write_text("The quick brown fox jumps over the lazy dog, twice a day. " * 9)


def options(root: Path, *recipes: str, **given) -> Options:
    """Those of a run on what `make_base` made; journal and baselines are beside it."""
    known = {"base": str(root / "tiny"), "journal": root / "journal.jsonl", "baselines": root / "baselines",
             "force_update": True, "prompt_tokens": 8, "new_tokens": 4,
             "protocol": {"name": "default", "samples": 4, "length": 32, "stride": None}}  # fmt: skip
    return Options(data=str(root / "data"), recipes=tuple(map(Recipe.parse, recipes)), **known | given)


def measured(workbench: Workbench, *, measurements=MEASUREMENTS, done=lambda recipe, what: None) -> list[str]:
    """Measure every recipe and end the run; what failed, in words. `done` is called behind each measurement."""
    failing = []
    for recipe in workbench.options.recipes:
        for what, test in measurements.items():
            try:
                if "divergence" not in what or recipe.steps:
                    test(workbench, recipe)
            except (AssertionError, Failure) as error:
                failing.append(str(error))
            done(recipe.text, what)
    failing += workbench.finish(passed=not failing)
    workbench.close()
    return failing


def one_run(root: Path, *recipes: str, measurements=MEASUREMENTS, **given) -> SimpleNamespace:
    """A run from beginning to end: what failed in words, and its rows by recipe and key."""
    workbench = Workbench(options(root, *recipes, **given))
    failing = measured(workbench, measurements=measurements)
    return SimpleNamespace(failing=failing, rows=workbench.rows)
