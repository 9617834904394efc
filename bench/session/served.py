"""The models of a run as engines serve them: written in a format that the engine opens, base and compressed in turn."""

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

import compression
from bench.errors import EngineError, NotAvailable
from bench.measure import engines
from bench.measure.engines.engine import Engine, Options
from bench.measure.engines.environments import requirement
from bench.measure.engines.traffic import Traffic, TrafficServer
from bench.measure.generation import Load
from bench.results.row import VERSIONS
from compression import UNCOMPRESSED, LayerError, Recipe
from compression.checkpoints.formats import registry as formats

if TYPE_CHECKING:
    from bench.measure.engines.generation import EngineDecoder
    from bench.measure.engines.likelihoods import Likelihoods
    from bench.measure.engines.scorer import EngineScorer
    from bench.session.models import Models
    from compression import Base, Compressed

LENGTH = 4096  # tokens of a sequence for which engines set memory aside, where no more are asked for
_FOLDER = "bench-served-"  # and the process whose it is


class Served:
    """Engines of a run. Of one runtime at a time the base's and that of one recipe are open; the others are ended.

    Attributes:
        models: of the run.
        log: for an engine, the file of all that it writes, beside the journal.
    """

    def __init__(self, models: "Models"):
        self.models, self._options = models, models.options
        self._folder: Path | None = None
        self._exports: dict[tuple[str, str], Path] = {}  # by recipe and format
        self._engines: dict[tuple[str, str], Engine | NotAvailable] = {}  # by runtime and recipe
        self._likelihoods: dict[tuple[str, str, Any], Likelihoods] = {}  # by runtime, recipe and protocol

    def engine(self, runtime: str, recipe: Recipe) -> Engine:
        """The engine that serves a recipe, opened if it is not.

        Raises:
            NotAvailable: no format holds the model for this engine, it does not open it (with its words), or the recipe
                is another engine's.
        """
        if recipe.on_load and recipe.on_load.method.engine != runtime:
            raise NotAvailable(self.models.refused[recipe.text])
        key = (runtime, recipe.text)
        if isinstance(known := self._engines.get(key), Engine) and not known.alive:
            self._end(key)
        if key not in self._engines:
            keep = {key, (runtime, UNCOMPRESSED)}
            for other in [each for each in self._engines if each not in keep]:
                self._end(other)
            try:
                self._engines[key] = self._opened(runtime, recipe)
            except NotAvailable as error:
                self._engines[key] = error
        found = self._engines[key]
        if isinstance(found, NotAvailable):
            raise found
        return found

    def _opened(self, runtime: str, recipe: Recipe) -> Engine:
        import torch

        options, config = self._options, self.models.base.model.config
        path = self._export(runtime, recipe)
        asked = max(LENGTH, options.prompt_tokens + options.new_tokens, (options.protocol.get("length") or 0) + 1)
        flags = Options(
            dtype=self.dtype(runtime) or "auto", threads=torch.get_num_threads(), seed=options.seed,
            max_length=min(asked, config.max_position_embeddings), sequences=max(options.batch_sizes),
            quantization=recipe.on_load and recipe.on_load.method.quantization, devices=options.runtime_devices,
        )  # fmt: skip
        log = self.log(runtime, recipe)
        try:
            engine = Engine.start(runtime, path, log=log, python=options.runtime_pythons[runtime], options=flags)
        except EngineError as error:
            raise NotAvailable(f"{runtime} does not open {recipe.text}: {error}") from error
        try:
            engine.generate([[0]], 1, ignore_eos=True)  # a kernel that does not run here is noticed at its first use
        except EngineError as error:
            if not engine.alive:
                raise
            engine.close()
            raise NotAvailable(f"{runtime} opens {recipe.text}, but cannot compute with it: {error}") from error
        return engine

    def dtype(self, runtime: str) -> str | None:
        """What an engine is asked for; None where it chooses, or cannot be asked."""
        asked = self._options.runtime_dtype
        return None if asked == "auto" or not requirement(runtime).chooses_dtype else asked

    def log(self, runtime: str, recipe: Recipe) -> Path:
        """The file of what an engine writes."""
        journal, worker = self._options.journal, os.environ.get("PYTEST_XDIST_WORKER")
        names = (journal.stem, *([worker] if worker else []), runtime, recipe.slug, "log")
        return journal.with_name(".".join(names))

    def _model(self, recipe: Recipe) -> "Base | Compressed":
        """What is exported."""
        return self.models.compressed(recipe.exported) if recipe.exported.steps else self.models.base

    def _export(self, runtime: str, recipe: Recipe) -> Path:
        """A checkpoint of a recipe that an engine opens."""
        recipe, on_load, model = recipe.exported, recipe.on_load, self._model(recipe)
        result = model if isinstance(model, compression.Compressed) else compression.compress(model, recipe)
        if on_load and result.stored:
            raise NotAvailable(f"{on_load} takes dense layers, and {recipe} leaves some that are stored otherwise")
        try:
            format = formats.format_for(runtime, result)
        except LayerError as error:
            raise NotAvailable(str(error)) from error
        key = (recipe.text, format)
        if key not in self._exports:
            if self._folder is None:
                remove_orphans()
                self._folder = Path(tempfile.mkdtemp(prefix=f"{_FOLDER}{os.getpid()}-"))
            folder = self._folder / f"{recipe.slug}-{format}"
            try:
                result.save(folder, format)
            except LayerError as error:
                raise NotAvailable(str(error)) from error
            self._exports[key] = next(iter(folder.glob("*.gguf")), folder)
        return self._exports[key]

    def decoder(self, runtime: str, recipe: Recipe, load: Load) -> "EngineDecoder":
        """What generates by an engine, in rounds."""
        model = self._model(recipe).model
        return engines.generation.EngineDecoder(self.engine(runtime, recipe), model, load, seed=self._options.seed)

    def traffic(self, runtime: str, recipe: Recipe, traffic: Traffic) -> TrafficServer:
        """What serves requests that come at a rate, in rounds.

        Raises:
            NotAvailable: as `engine`, and of an engine that takes no requests while it computes others.
        """
        if not requirement(runtime).joins:
            raise NotAvailable(f"{runtime} is asked for batches, and takes no request while it computes others here")
        vocabulary = self.models.base.model.config.vocab_size
        return TrafficServer(self.engine(runtime, recipe), vocabulary, traffic, seed=self._options.seed)

    def likelihoods(self, runtime: str, recipe: Recipe, data: Any, protocol: Any) -> "Likelihoods":
        """Log-probabilities of held-out text, taken once."""
        base, key = self.models.base, (runtime, recipe.text, protocol)
        if key not in self._likelihoods:
            self._likelihoods[key] = engines.likelihoods.Likelihoods(
                self.engine(runtime, recipe), base.model.config, base.tokenizer, data, protocol, self._options.template,
                spare=requirement(runtime).spare,
            )  # fmt: skip
        return self._likelihoods[key]

    def scorer(self, runtime: str, recipe: Recipe, seed: int) -> "EngineScorer":
        """What answers the requests of tasks."""
        base = self.models.base
        return engines.scorer.EngineScorer(
            self.engine(runtime, recipe), base.tokenizer, base.model.config, seed=seed, template=self._options.template,
        )  # fmt: skip

    def facts(self, runtime: str, recipe: Recipe) -> dict[str, Any]:
        """What a row says of the engine that it was measured with."""
        facts = self.engine(runtime, recipe).facts
        told = {name: getattr(facts, name) for name in ("engine", *VERSIONS)}
        return told | {"flags": dict(facts.flags)}

    def release(self) -> None:
        """Let go of what serves recipes, and of their files; the base's stay."""
        for key in [each for each in self._engines if each[1] != UNCOMPRESSED]:
            self._end(key)
        self._likelihoods = {key: kept for key, kept in self._likelihoods.items() if key[1] == UNCOMPRESSED}
        for key in [each for each in self._exports if each[0] != UNCOMPRESSED]:
            path = self._exports.pop(key)
            shutil.rmtree(path if path.is_dir() else path.parent, ignore_errors=True)

    def close(self) -> None:
        """End all engines, and remove what was written for them."""
        for key in list(self._engines):
            self._end(key)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder, self._exports = None, {}

    def _end(self, key: tuple[str, str]) -> None:
        engine = self._engines.pop(key)
        if isinstance(engine, Engine):
            engine.close()


def remove_orphans() -> None:
    """Remove what runs wrote for engines that ended without removing it, as when they are killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*"):
        named = re.match(rf"{_FOLDER}(\d+)-", folder.name)
        if named and not psutil.pid_exists(int(named[1])):
            shutil.rmtree(folder, ignore_errors=True)
