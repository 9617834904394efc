"""Turns a task and a data source into lm-eval tasks; whatever must be refused is refused here."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bench import reference
from bench.data.sources import Data, Embedded, Folder
from bench.data.tasks import bundled, folder
from bench.data.tasks.table import Task
from bench.errors import DataError, NotAvailable
from bench.measure.scoring import programs, quac, stand_ins

Configuration = dict[str, Any]


@dataclass(frozen=True)
class Prepared:
    """A task with its data.

    Attributes:
        parts: tasks of lm-eval, by name; scored as one.
        data: what was read, with the start of its digest: the same text is the same questions.
    """

    task: Task
    parts: dict[str, Any]
    data: str

    def questions(self, limit: int | None) -> dict[str, range]:
        """Places of the questions that a limit keeps, by name of the part; parts without any are left out."""
        sizes = {name: len(part.eval_docs) for name, part in self.parts.items()}
        counts = sizes if limit is None else spread(sizes, limit)
        return {name: range(count) for name, count in counts.items() if count}


def spread(sizes: Mapping[str, int], limit: int) -> dict[str, int]:
    """`limit` questions over the parts of a task, in proportion to their sizes: the mean over them estimates that over
    all. Part i gets floor(limit c_i / c) - floor(limit c_(i-1) / c), with c_i the size of the first i parts and c of
    all.

    >>> spread({"algebra": 100, "law": 300, "virology": 100}, 5), spread({"algebra": 100, "law": 300}, 1000)
    ({'algebra': 1, 'law': 3, 'virology': 1}, {'algebra': 100, 'law': 300})
    """
    total = sum(sizes.values())
    limit, before, found = min(limit, total), 0, {}
    for name, size in sizes.items():
        found[name] = limit * (before + size) // total - limit * before // total
        before += size
    return found


def prepare(task: Task, data: Data, *, run_code: bool = False) -> Prepared:
    """Read the data of a task and make it a task of lm-eval.

    Raises:
        NotAvailable: it cannot be had from this source, or needs code to be run; the row of the task says so.
        DataError: the data is malformed, or an example that is shown is also asked.
    """
    if task.runs_code and not run_code:
        raise NotAvailable(f"{task.title}: programs of the model are run only with --allow-code-execution")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from datasets.exceptions import DatasetsError
    from jinja2 import TemplateError
    from lm_eval.api.task import ConfigurableTask

    found = _SOURCES.get(type(data))
    configurations, source = found(task, data) if found else (_configurations(task), "")
    parts = {}
    for configuration in configurations:
        try:
            part = ConfigurableTask(config=bundled.with_settings(configuration, task))
        except (DatasetsError, OSError, ValueError, RuntimeError, ImportError) as error:
            where = f"{configuration.get('dataset_path')} cannot be loaded"
            raise NotAvailable(f"{task.title}: {where} ({type(error).__name__}: {str(error)[:200]})") from error
        except (TemplateError, LookupError) as error:
            where = f"{configuration.get('dataset_path')} does not have the format that its configuration reads"
            raise DataError(f"{task.title}: {where} ({type(error).__name__}: {str(error)[:200]})") from error
        _check_shots(part, task)
        _check_examples(part, task)
        parts[configuration["task"]] = part
    return Prepared(task, parts, source or f"hub:{configurations[0]['dataset_path']}@{_digest(parts)[:8]}")


def _embedded(task: Task, data: Data) -> tuple[list[Configuration], str]:
    if task.stand_in is None:
        raise NotAvailable(f"{task.title}: the embedded reference has no stand-in for it; "
                           "give --data hub or a folder")  # fmt: skip

    text = json.dumps(reference.tasks.items(task.stand_in, "test"), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return stand_ins.configurations(task.stand_in), f"{task.stand_in}@{digest[:8]}"


def _from_folder(task: Task, data: Data) -> tuple[list[Configuration], str]:
    assert isinstance(data, Folder)
    found = []
    digest, notes = hashlib.sha256(), []
    for configuration in _configurations(task):
        splits = folder.read(data.folder, task, configuration)
        digest.update(splits.digest.encode())
        notes += [splits.note] if splits.note and splits.note not in notes else []
        there = {key: configuration.get(key) for key in _SPLITS}
        found.append(
            configuration
            | {key: split if split in splits.rows else None for key, split in there.items()}
            | {"custom_dataset": _maker(splits.rows), "dataset_kwargs": None}
            | splits.changes
        )
    return found, f"{task.name}@{digest.hexdigest()[:8]}{''.join(f' {note}' for note in notes)}"


_OURS: dict[str, Configuration] = programs.CONFIGURATIONS | {"quac": quac.CONFIGURATION}
_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
_SOURCES: dict[type, Callable[[Task, Data], tuple[list[Configuration], str]]] = {
    Embedded: _embedded,
    Folder: _from_folder,
}


def _configurations(task: Task) -> list[Configuration]:
    """The configurations of a task: ours, or those that lm-eval's package brings."""
    return bundled.configurations(task) if task.members else [dict(_OURS[task.name])]


def _digest(parts: dict[str, Any]) -> str:
    """Of all questions of all parts."""
    digest = hashlib.sha256()
    for part in parts.values():
        for doc in part.eval_docs:
            digest.update(json.dumps(doc, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _maker(rows: dict[str, list[dict[str, Any]]]) -> Callable[..., Any]:
    def make(**metadata: Any) -> Any:
        from datasets import Dataset

        return {split: Dataset.from_list(of) for split, of in rows.items()}

    return make


def _check_shots(part: Any, task: Task) -> None:
    """Raise DataError if there are fewer examples than are shown."""
    shots = part.config.num_fewshot or 0
    if not shots:
        return
    split, same = part.fewshot_cfg.split, part.fewshot_cfg.split == part.config.test_split
    there = len(list(part.fewshot_docs()))
    if there < shots + same:
        besides = " besides the one that is asked" if same else ""
        where = "its own examples" if split is None else f"the {split} split"
        raise DataError(f"{part.config.task}: {shots} examples are shown before each question{besides}, and {where} "
                        f"has {there} rows; give {shots + same} or more")  # fmt: skip


def _check_examples(part: Any, task: Task) -> None:
    """Raise DataError if a question that is asked is also a row of the split that examples are taken from."""
    config, shown = part.config, part.fewshot_cfg.split
    asked = config.test_split if config.test_split is not None else config.validation_split
    if not task.shots or shown in (None, asked):  # lm-eval never shows a question of the same split its own answer
        return
    rows = {json.dumps(doc, sort_keys=True): place for place, doc in enumerate(part.dataset[shown], 1)}
    for place, doc in enumerate(part.dataset[asked], 1):
        if (text := json.dumps(doc, sort_keys=True)) in rows:
            raise DataError(
                f"{config.task}: row {place} of its {asked} split is also row {rows[text]} of the {shown} split, from "
                f"which examples with their answers are shown: {text[:100]}; remove one"
            )
