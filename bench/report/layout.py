"""The layout of the tables: columns by kind of table and family of methods, with the headings of the papers.

[E], section 4, has nine tables for each of three families; a fourth family, recipes with steps of several (the orders
of [O] among them), has the same nine in their form. O1 is table 1 of [O]. Tables S show what no table of the papers
has: the rest of the Mistral suite, recovery ([E]'s second phase), distractors, what each step of an order does; J1 how
the judge judges.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from bench.data.tasks.table import SUITE
from bench.measure.rag.robustness import GRID
from bench.results.row import RUNTIME, Param
from compression import Recipe
from compression.recipes.recipe import UNCOMPRESSED

FAMILIES = ("quantization", "pruning", "distillation", "orderings", "low_rank")
ORDERED = "orderings"  # the family of recipes with steps of several


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column: a metric of the journal, and how it is shown.

    Attributes:
        head: as the paper heads it, with the unit.
        metric: its name in the journal.
        scale: the shown number for one unit of the metric.
        params: those that the rows must have, as pairs.
        increase: shown is by how many percent the base's value is exceeded.
        spread: a metric that is shown behind the value, as `± spread`.
        marker: what `pytest bench -m` measures it with.
    """

    head: str
    metric: str
    scale: float = 1.0
    params: tuple[tuple[str, Param], ...] = ()
    increase: bool = False
    spread: str | None = None

    @property
    def marker(self) -> str:
        return self.metric.partition(".")[0]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A table of one kind for one family.

    Attributes:
        number: E14 for table 14 of [E]; "as E14" where the paper has none for the family; S1 for one of our own.
        by: parameters by which a recipe has several lines.
        partial: only recipes that were measured have lines.
    """

    number: str
    title: str
    family: str
    columns: tuple[Column, ...]
    by: tuple[str, ...] = ()
    partial: bool = False


def _columns(group: str, heads: Mapping[str, str]) -> tuple[Column, ...]:
    return tuple(Column(head=head, metric=f"{group}.{name}") for head, name in heads.items())


_EFFICIENCY = _columns("efficiency", {
    "Size (GiB)": "model_size_gb", "Memory (MiB)": "peak_memory_mb", "Latency (ms/tok)": "latency_ms",
    "TTFT (ms)": "ttft_ms", "Throughput (tok/s)": "throughput", "MFU (%)": "mfu",
    "Energy (mJ/tok)": "energy_mj_per_token", "Prefill (ms)": "prefill_ms", "Decode (ms/tok)": "decode_ms",
})  # fmt: skip
_MEMORY = _columns("efficiency", {
    "Total Params": "parameters", "Bits per Param": "bits_per_parameter", "Memory Efficiency": "memory_efficiency",
    "KV Cache (MiB)": "kv_cache_mb", "Compression Ratio (x)": "compression_ratio",
    "Memory Reduction (%)": "memory_reduction", "Speedup vs Baseline (x)": "speedup",
    "Compression Time (s)": "compression_seconds", "Compression Memory (MiB)": "compression_peak_mb",
    "Calibration Tokens": "calibration_tokens",
})  # fmt: skip
_SPARSITY = Column(head="Sparsity (%)", metric="efficiency.sparsity", scale=100)
_TRAINED = Column(head="Trainable Params", metric="efficiency.trained_parameters")
_MEMORY_OF = {  # what the families add behind the bits
    "pruning": (_SPARSITY,),
    "distillation": (_TRAINED,),
    ORDERED: (_SPARSITY, _TRAINED),
}
_PERPLEXITY = Column(head="Perplexity", metric="quality.perplexity")
_PERFORMANCE = (_PERPLEXITY, *(
    Column(head=task.column, metric="quality.accuracy", params=(("task", task.name),))
    for task in SUITE.values() if task.core
))  # fmt: skip
_FULL = tuple(
    Column(head=task.column, metric="quality.accuracy", params=(("task", task.name),))
    for task in SUITE.values() if not task.core
)  # fmt: skip
_AVERAGE = (
    Column(head="Average Accuracy", metric="quality.average_accuracy"),
    Column(head="Perplexity Increase (%)", metric="quality.perplexity", increase=True),
    Column(head="Accuracy Drop", metric="quality.accuracy_drop"),
    Column(head="Tasks Evaluated", metric="quality.tasks_evaluated"),
    Column(head="KL to Base (nat/tok)", metric="quality.kl_to_base"),
    Column(head="Top-1 Agreement", metric="quality.top1_agreement"),
)
_ANSWERS = (
    Column(head="F1", metric="rag.f1", spread="rag.f1_spread"),
    Column(head="EM", metric="rag.exact_match", spread="rag.exact_match_spread"),
    *_columns("rag", {
        "Faithfulness": "faithfulness", "Relevance": "answer_relevance", "ROUGE-1": "rouge1", "ROUGE-2": "rouge2",
        "ROUGE-L": "rouge_l", "BERTScore F1": "bertscore_f1", "BLEU": "bleu", "SQuAD F1": "squad_f1",
        "SQuAD EM": "squad_exact_match", "Contains": "contains", "Faithfulness, normalised": "faithfulness_normalised",
    }),
)  # fmt: skip
_COMPARISON = _columns("rag", {
    "No-RAG F1": "no_rag_f1", "No-RAG EM": "no_rag_exact_match", "F1 Improvement": "f1_improvement",
    "EM Improvement": "exact_match_improvement", "Avg Answer Length (RAG)": "answer_length",
    "Avg Answer Length (No-RAG)": "no_rag_answer_length"})  # fmt: skip
_CONTEXT = _columns("rag", {
    "Sufficiency": "context_sufficiency", "Precision": "context_precision", "Coverage": "context_coverage",
    "Consistency (std)": "retrieval_consistency", "Avg Score": "retrieval_score",
    "Avg Chunks Retrieved": "chunks_retrieved", "Avg Context Length": "context_length",
    "Precision, judged": "context_precision_judged", "Coverage, normalised": "context_coverage_normalised",
})  # fmt: skip
_RANKING = _columns("rag", {
    "P@1": "precision_at_1", "P@3": "precision_at_3", "P@5": "precision_at_5", "R@1": "recall_at_1",
    "R@3": "recall_at_3", "MRR": "mrr", "MAP": "map", "nDCG@10": "ndcg_at_10"})  # fmt: skip
_RAG_SPEED = _columns("rag", {
    "Retrieval Time (ms)": "retrieval_ms", "RAG Gen Time (ms)": "generation_ms",
    "No-RAG Gen Time (ms)": "no_rag_generation_ms", "RAG Throughput (tok/s)": "throughput",
    "No-RAG Throughput (tok/s)": "no_rag_throughput", "Generation Speedup (x)": "generation_speedup",
    "Retrieval Share (%)": "retrieval_share"})  # fmt: skip
_RECOVERY = _columns("recovery", {
    "Before": "score_before", "After": "score_after", "Gain": "gain", "Gain, at least (95 %)": "gain_low",
    "Share of the Gap Closed": "share"})  # fmt: skip
_ROBUSTNESS = (
    *(
        Column(head=f"F1, {distractors} distractors, gold {gold}", metric="rag.distracted_f1",
               params=(("distractors", distractors), ("gold", gold)))
        for distractors, gold in GRID
    ),
    *_columns("rag", {"Abstained, Unanswerable": "abstained", "Abstained, Answerable": "abstained_wrongly"}),
)  # fmt: skip
_JUDGED = (
    Column(head="G-Eval", metric="judge.g_eval"),
    Column(head="Prompt Alignment", metric="judge.prompt_alignment"),
    Column(head="Clarity", metric="judge.clarity"),
    Column(head="Size (MiB)", metric="efficiency.model_size_gb", scale=1024),
    _PERPLEXITY,
    Column(head="Compression Ratio (x)", metric="efficiency.compression_ratio"),
    *_columns("judge", {
        "Correctness": "g_eval_correctness", "Relevance": "g_eval_relevance", "Fluency": "fluency",
        "Coherence": "coherence", "Readability": "readability"}),
)  # fmt: skip

_JUDGE = _columns("judge", {
    "Answer Likelihood": "answer_likelihood", "Failed Judgements": "failed_judgements",
    "Empty Answers": "empty_answers", "Order Flips": "order_flips", "First Place": "first_place",
    "Padding Gain": "padding_gain", "Clarity as in [O]": "clarity_paper", "Fluency as in [O]": "fluency_paper",
})  # fmt: skip
JUDGED = (
    Layout(number="O1", title="All metrics of [O]", family=ORDERED, columns=_JUDGED),
    Layout(number="J1", title="What the judge missed, how it leans, [O]'s own formulas", family=ORDERED,
           columns=_JUDGE, partial=True),
)  # fmt: skip
_KINDS = (  # title, columns, by, and the numbers in [E] for quantization, pruning and distillation
    ("Efficiency", _EFFICIENCY, ("batch", "mode"), (14, 16, 18)),
    ("Memory and compression", _MEMORY, ("batch", "mode"), (15, 17, 19)),
    ("Performance across benchmarks", _PERFORMANCE, (), (20, 22, 24)),
    ("Average accuracy and degradation", _AVERAGE, (), (21, 23, 25)),
    ("RAG answer quality", _ANSWERS, ("decoding",), (26, 31, 36)),
    ("RAG against no RAG", _COMPARISON, ("decoding",), (27, 32, 37)),
    ("Context retrieval", _CONTEXT, (), (28, 33, 38)),
    ("Ranking of retrieved chunks", _RANKING, ("relevance",), (29, 34, 39)),
    ("RAG efficiency", _RAG_SPEED, (), (30, 35, 40)),
)
_MORE = (  # title, columns
    ("Rest of the Mistral suite", _FULL),
    ("Recovery on a downstream task", _RECOVERY),
    ("RAG with distractors and without an answer", _ROBUSTNESS),
)


_SERVED = (
    *(column for column in _EFFICIENCY if column.metric.partition(".")[2] in
      ("peak_memory_mb", "latency_ms", "ttft_ms", "throughput", "decode_ms")),
    *_PERFORMANCE,
    *(column for column in _AVERAGE if column.metric in ("quality.kl_to_base", "quality.top1_agreement")),
)  # fmt: skip


def served(family: str) -> Layout:
    """What engines serve beside what this package runs: a line for each recipe and runtime."""
    return Layout(number=f"S{len(_MORE) + 2}", title="On the engines that serve it", family=family, columns=_SERVED,
                  by=(RUNTIME,), partial=True)  # fmt: skip


_RATES = _columns("efficiency", {
    "Throughput (tok/s)": "rate_throughput", "TTFT (ms)": "rate_ttft_ms", "TTFT, p99 (ms)": "rate_ttft_p99_ms",
    "Between Tokens (ms)": "rate_step_ms", "Between Tokens, p99 (ms)": "rate_step_p99_ms"})  # fmt: skip


def requested(family: str) -> Layout:
    """Engines under requests at a rate: a line for each recipe, runtime and rate."""
    return Layout(number=f"S{len(_MORE) + 3}", title="Under requests at a rate", family=family, columns=_RATES,
                  by=(RUNTIME, "rate"), partial=True)  # fmt: skip


def layouts(family: str) -> list[Layout]:
    """The tables of a family, in order."""
    found = []
    for title, columns, by, numbers in _KINDS:
        own = dict(zip(FAMILIES, numbers, strict=False)).get(family)
        if columns is _MEMORY:
            columns = (*columns[:2], *_MEMORY_OF.get(family, ()), *columns[2:])
        number = f"E{own}" if own else f"as E{numbers[0]}"
        found.append(Layout(number=number, title=title, family=family, columns=columns, by=by))
    found += [
        Layout(number=f"S{place}", title=title, family=family, columns=columns, partial=True)
        for place, (title, columns) in enumerate(_MORE, 1)
    ]
    return found


def family_of(recipe: str) -> str | None:
    """The family of a recipe, None for the uncompressed base, which is in all.

    That of its steps; `orderings` where these are of several, but for `nf4-structured`, which [E] has among the pruned
    models. What trains on a downstream task (`recover`) counts for nothing beside other steps. Raises RecipeError.
    """
    if recipe == UNCOMPRESSED:
        return None
    if recipe == "nf4-structured":
        return "pruning"
    steps = Recipe.parse(recipe).steps
    found = {step.method.info.family for step in steps if step.name != "recover"} or {"distillation"}
    return next(iter(found)) if len(found) == 1 else ORDERED
