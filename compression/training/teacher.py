"""What a teacher says of a text, computed once and kept on disk, so that later epochs and runs do not pay for it again.

    <cache>/<key>/
        teacher.json                 the seal: what it is of, and the shards that are finished, with their SHA-256
        outputs-00000.safetensors    of some texts: `logits` (samples, length, V), or for the top k `ids` (int32) and
                                     `log_probs` (samples, length, k) and `log_tail` (samples, length), fp32

Kept is what does not depend on the temperature: logits as the teacher gives them, or natural logarithms of its k
largest probabilities and of the mass of all others. `<key>` is a hash of everything that the numbers depend on:
teacher, what it was compressed by, token ids, mask, tokenizer, vocabulary, k, dtypes, batch, device, versions. Another
setting is another folder.

A shard counts once teacher.json names it: a killed run resumes after the last finished one, and ends with the same
bytes. Whenever a cache is opened, every shard is checked against its SHA-256 (a pass over the files, none of which is
held); see `compression.files.sealed_folder` for what is refused.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from compression.architectures.decoder import Decoder
from compression.checkpoints.base import BaseSource
from compression.errors import TeacherError
from compression.files.atomic import digest_of, key_of
from compression.files.sealed_folder import Seal, SealedFolder
from compression.files.strict_json import exact_fields, expanded, whole_field
from compression.numeric.losses_in_chunks import TopK
from compression.recipes.recipe import Recipe
from compression.training.settings import OutputSettings
from compression.training.vocabulary import tokenizer_digest

DESCRIPTION = "teacher.json"

_LOGITS = 2**22  # that are held at a time, beside those of a shard
_FORMAT = 1
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Shard:
    """A finished file.

    Attributes:
        file: its name.
        first: number of the first text in it.
        samples: how many texts.
    """

    file: str
    first: int
    samples: int


class TeacherOutputs:
    """A finished cache, mapped into memory: only what a batch needs is read.

    Attributes:
        folder: where it is.
        identity: what it is of.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], shards: Sequence[Shard]):
        self.folder, self.identity = folder, identity
        self._shards = tuple(shards)
        self._mapped: dict[str, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        """Texts."""
        return self.identity["samples"]

    @property
    def stored_bytes(self) -> int:
        return sum((self.folder / shard.file).stat().st_size for shard in self._shards)

    def batch(self, samples: Sequence[int] | Tensor) -> Tensor | TopK:
        """The outputs of some texts, in the order given: logits (batch, length, V), or their top k.

        Raises:
            IndexError: there is no such text.
        """
        rows = [self._of(int(sample)) for sample in samples]
        columns = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        if "logits" in columns:
            return columns["logits"]
        return TopK(**columns, vocabulary=self.identity["vocabulary"])

    def _of(self, sample: int) -> dict[str, Tensor]:
        for shard in self._shards:
            if shard.first <= sample < shard.first + shard.samples:
                mapped = self._mapped.get(shard.file) or self._map(shard.file)
                return {name: tensor[sample - shard.first] for name, tensor in mapped.items()}
        raise IndexError(f"text {sample}; the teacher's outputs are of {len(self)} texts, from 0")

    def _map(self, name: str) -> dict[str, Tensor]:
        with safe_open(self.folder / name, framework="pt") as file:
            self._mapped[name] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        return self._mapped[name]


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """Who is asked.

    Attributes:
        source: its base, fetched; of a published quantized checkpoint, the weights that it stands for.
        open: gives its model, after the recipe; called only if outputs are missing.
        recipe: what it is compressed by before it is asked, "llm_int8" in the papers; needs no calibration.
        device: where it computes.
        seed: of the weights of `random:` bases.
    """

    source: BaseSource
    open: Callable[[], Any]
    recipe: str = "fp16"
    device: str = "cpu"
    seed: int = 0


def teacher_outputs(
    cache: str | Path,
    teacher: Teacher,
    ids: Tensor,
    *,
    mask: Tensor | None = None,
    settings: OutputSettings | None = None,
    progress: Progress | None = None,
) -> TeacherOutputs:
    """The outputs of a teacher for token ids: read where they are in the cache, else computed and put there.

    Args:
        cache: a folder for the caches of any number of teachers and texts; made if need be.
        teacher: who is asked; opened only if something is missing.
        ids: integers (samples, length), what teacher and student read.
        mask: (samples, length), 0 for padding; handed to the teacher.
        settings: what is kept of the outputs, and how they are computed; by default all logits, without loss.
        progress: called with (texts done, texts, what).

    Raises:
        TeacherError: the ids are not the teacher's, k is not 1 to the vocabulary, the disk is too small, what the cache
            holds is damaged or of something else, another process is writing it, or the teacher's outputs are not
            finite.
        RecipeError, CheckpointError: the teacher cannot be opened or compressed so.
    """
    _check(ids, mask, teacher.source.config["vocab_size"])
    rows, recipe = teacher.source.config["vocab_size"], Recipe.parse(teacher.recipe)
    settings = (settings or OutputSettings()).of_teacher(rows, recipe.text)
    identity = _identity(teacher, ids, mask, settings)
    folder = expanded(cache, TeacherError) / key_of(identity)
    outputs = SealedFolder.open(folder, _SEAL, identity)
    if outputs is None or _done(_shards(outputs)) < len(ids):
        busy = f"another process is writing {folder}; start again when it has ended"
        with SealedFolder.claim(folder, _SEAL, identity, busy) as outputs:  # whoever wrote until now may be further
            _Writer(outputs, teacher, settings, progress or (lambda done, total, what: None)).run(ids, mask)
    return TeacherOutputs(folder, identity, _shards(outputs))


def _check(ids: Tensor, mask: Tensor | None, rows: int) -> None:
    if ids.dim() != 2 or ids.is_floating_point() or not ids.numel():
        raise TeacherError(f"token ids must be integers (samples, length), not {tuple(ids.shape)} of {ids.dtype}")
    if not 0 <= int(ids.min()) <= int(ids.max()) < rows:
        raise TeacherError(f"token ids go from {int(ids.min())} to {int(ids.max())}; the teacher has {rows} tokens, "
                           "and must be of the student's tokenizer")  # fmt: skip
    if mask is not None and mask.shape != ids.shape:
        raise TeacherError(f"the mask {tuple(mask.shape)} does not fit token ids {tuple(ids.shape)}")


def _identity(teacher: Teacher, ids: Tensor, mask: Tensor | None, settings: OutputSettings) -> dict[str, Any]:
    """Everything that the numbers depend on."""
    import transformers

    return {
        "format": _FORMAT,
        "teacher": teacher.source.digest,
        "seed": teacher.seed if teacher.source.kind == "random" else None,
        "recipe": Recipe.parse(teacher.recipe).text,
        "arithmetic": settings.arithmetic,
        "tokenizer": tokenizer_digest(teacher.source.tokenizer),
        "token ids": digest_of(ids.long()),
        "mask": None if mask is None else digest_of(mask.bool()),
        "samples": ids.shape[0],
        "length": ids.shape[1],
        "vocabulary": settings.vocabulary,
        "k": settings.k,
        "dtype": settings.dtype,
        "batch": settings.batch,
        "device": torch.device(teacher.device).type,
        "version of torch": torch.__version__,
        "version of transformers": transformers.__version__,
    }


def _done(shards: Sequence[Shard]) -> int:
    """Texts whose outputs are on disk."""
    return sum(shard.samples for shard in shards)


def _shards(outputs: SealedFolder) -> list[Shard]:
    """The finished shards of a cache.

    Raises:
        TeacherError: the seal does not name them one after the other.
    """
    shards: list[Shard] = []
    try:
        for each in outputs.facts.get("shards", ()):
            shard = Shard(**exact_fields(each, {"file", "first", "samples"}))
            if shard.file not in outputs.files:
                raise ValueError(f"file={shard.file!r} must be the name of a sealed file")
            whole_field(vars(shard), "first", _done(shards), _done(shards))
            whole_field(vars(shard), "samples", 1, 2**62)
            shards.append(shard)
    except (ValueError, TypeError) as error:
        raise outputs.damaged(error) from error
    return shards


def _of_schema_1(folder: Path, table: dict[str, Any]) -> dict[str, Any]:
    """The seal of a cache whose shards have their digests with them."""
    names = {"file", "first", "samples", "sha256"}
    shards = [exact_fields(shard, names) for shard in exact_fields(table, {"identity", "shards"})["shards"]]
    return {
        "identity": table["identity"],
        "files": {shard["file"]: shard.pop("sha256") for shard in shards},
        "shards": shards,
    }


_SEAL = Seal(DESCRIPTION, TeacherError, again="have it computed again", earlier=_of_schema_1)


class _Writer:
    """Computes what a cache lacks, shard by shard."""

    def __init__(self, outputs: SealedFolder, teacher: Teacher, settings: OutputSettings, progress: Progress):
        self.outputs, self.teacher, self.settings, self.progress = outputs, teacher, settings, progress
        self.k, self.batch, self.shards = settings.k, settings.batch, _shards(outputs)
        self.vocabulary, self.length = (outputs.identity[name] for name in ("vocabulary", "length"))

    def run(self, ids: Tensor, mask: Tensor | None) -> None:
        done, total, what = _done(self.shards), len(ids), f"teacher {self.teacher.source.label}"
        if done == total:
            return
        self._check_space(total - done)
        model, dtype = self._open()
        each = max(1, self.settings.shard_bytes // (self._bytes_of_text(dtype) * self.batch)) * self.batch
        self.progress(done, total, what)
        while done < total:
            some = slice(done, min(done + each, total))
            tensors = self._outputs(model, dtype, ids[some], None if mask is None else mask[some], done)
            self._write(f"outputs-{len(self.shards):05}.safetensors", tensors, done)
            done = _done(self.shards)
            self.progress(done, total, what)

    def _bytes_of_text(self, dtype: torch.dtype) -> int:
        of_position = self.vocabulary * dtype.itemsize if self.k is None else self.k * (4 + dtype.itemsize) + 4
        return self.length * of_position

    def _check_space(self, texts: int) -> None:
        """Raise TeacherError if the disk cannot hold the outputs of so many texts; the dtype may not be known yet."""
        dtype = _DTYPES.get(self.settings.dtype or "", torch.bfloat16 if self.k is None else torch.float32)
        folder, needed = self.outputs.path, texts * self._bytes_of_text(dtype)
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise TeacherError(
                f"the outputs of {self.teacher.source.label} for {texts} texts take {needed / 1e9:.1f} GB, and "
                f"{folder} has {free / 1e9:.1f}; keep fewer tokens of each position (k), or give another folder"
            )

    def _open(self) -> tuple[Any, torch.dtype]:
        """The teacher, and the dtype that its outputs are kept in."""
        model = self.teacher.open()
        if self.settings.arithmetic == "float32":
            model = model.float()
        own = next(model.parameters()).dtype if self.k is None else torch.float32
        return model, _DTYPES.get(self.settings.dtype or "", own)

    def _outputs(
        self, model: Any, dtype: torch.dtype, ids: Tensor, mask: Tensor | None, first: int
    ) -> dict[str, Tensor]:  # fmt: skip
        """Of some texts, number `first` the first of them.

        Raises:
            TeacherError: they are not finite at a position that is no padding.
        """
        device, parts, logits = model.device, [], Decoder(model).logits
        step = max(1, _LOGITS // self.vocabulary)
        with torch.inference_mode():
            for at in range(0, len(ids), self.batch):
                some = slice(at, at + self.batch)
                padding = None if mask is None else mask[some].to(device).long()
                hidden = model.get_decoder()(
                    input_ids=ids[some].to(device).long(), attention_mask=padding, use_cache=False
                )
                for states in hidden.last_hidden_state.flatten(0, 1).split(step):
                    parts.append(self._keep(logits(states)[:, : self.vocabulary], dtype))
        leading = ids.shape
        tensors = {name: torch.cat([part.pop(name) for part in parts]) for name in list(parts[0])}
        tensors = {name: tensor.view(*leading, *tensor.shape[1:]) for name, tensor in tensors.items()}
        floats = [tensor.view(*leading, -1) for tensor in tensors.values() if tensor.is_floating_point()]
        good = torch.stack([torch.isfinite(tensor).all(-1) for tensor in floats]).all(0)
        if mask is not None:
            good |= ~mask.bool().cpu()
        if not good.all():
            sample, position = (~good).nonzero()[0].tolist()
            raise TeacherError(f"the teacher's output for text {first + sample} is not finite at position {position} "
                               f"in {dtype}; try arithmetic=float32 and dtype=float32, or another teacher")  # fmt: skip
        return tensors

    def _keep(self, logits: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        if self.k is None:
            return {"logits": logits.to("cpu", dtype)}
        top = TopK.of(logits, self.k)
        return {
            "ids": top.ids.to("cpu", torch.int32),
            "log_probs": top.log_probs.to("cpu", dtype),
            "log_tail": top.log_tail.to("cpu", torch.float32),
        }

    def _write(self, name: str, tensors: dict[str, Tensor], first: int) -> None:
        try:
            with self.outputs.writing(name) as temporary:
                save_file(tensors, temporary)
            self.shards.append(Shard(name, first, len(next(iter(tensors.values())))))
            self.outputs.commit(shards=[asdict(shard) for shard in self.shards])
        except (OSError, SafetensorError) as error:
            raise TeacherError(f"the teacher's outputs cannot be written to {self.outputs.path}: {name}: {error}; what "
                               "is finished stays, and the same call resumes from there") from error  # fmt: skip
