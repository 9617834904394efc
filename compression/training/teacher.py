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
held); see `compression.sealed_folder` for what is refused.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from compression.checkpoints import base as _checkpoint
from compression.errors import RecipeError, TeacherError
from compression.files.atomic import digest_of, key_of
from compression.files.strict_json import exact_fields, expanded, whole_field
from compression.numeric.losses_in_chunks import TopK
from compression.recipes.recipe import Recipe
from compression.sealed_folder import Seal, SealedFolder

DESCRIPTION = "teacher.json"

_SHARD = 2**26  # bytes
_LOGITS = 2**22  # that are held at a time, beside those of a shard
_FORMAT = 1
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PROBE = (
    "The 3 quick brown foxes' 1,024 jumps, over 27.5 dogs?\n\n    def f(x_1, y):\n\treturn {'key': [x_1 ** 2, y]}\n"
    "https://example.org/a-b?c=d&e=%20  naïve café Übermaß señor Привет мир 你好世界 こんにちは مرحبا 🙂 ½ “so” — on…"
)

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


def teacher_outputs(
    cache: str | Path,
    teacher: str,
    ids: Tensor,
    *,
    mask: Tensor | None = None,
    k: int | None = None,
    vocabulary: int | None = None,
    recipe: str = "fp16",
    arithmetic: Literal["stored", "float32"] = "stored",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    batch: int = 4,
    device: str = "cpu",
    seed: int = 0,
    shard_bytes: int = _SHARD,
    progress: Progress | None = None,
) -> TeacherOutputs:
    """The outputs of a teacher for token ids: read where they are in the cache, else computed and put there.

    The teacher is opened only if something is missing.

    Args:
        cache: a folder for the caches of any number of teachers and texts; made if need be.
        teacher: the text of a base; of a published quantized checkpoint, the weights that it stands for.
        ids: integers (samples, length), what teacher and student read.
        mask: (samples, length), 0 for padding; handed to the teacher.
        k: how many tokens of each position are kept; None keeps all logits, which is exact.
        vocabulary: only the first so many tokens are taken: what `shared_vocabulary` says; default all.
        recipe: what the teacher is compressed by before it is asked, "llm_int8" in the papers; needs no calibration.
        arithmetic: whether the teacher computes in the dtype of its weights or in fp32.
        dtype: what logits or log-probabilities are kept in; default without loss: for logits the arithmetic's, for
            log-probabilities, computed in fp32, float32.
        batch: texts at a time.
        device: where the teacher computes.
        seed: of the weights of `random:` teachers.
        shard_bytes: about the size of a file, and what is done again after a kill.
        progress: called with (texts done, texts, what).

    Raises:
        TeacherError: the ids are not the teacher's, k is not 1 to the vocabulary, the disk is too small, what the cache
            holds is damaged or of something else, another process is writing it, or the teacher's outputs are not
            finite.
        RecipeError, CheckpointError: the teacher cannot be opened or compressed so.
    """
    source = _checkpoint.locate(teacher).fetch()
    rows = source.config["vocab_size"]
    vocabulary = rows if vocabulary is None else vocabulary
    _check(ids, mask, k, vocabulary, rows, batch)
    parsed = Recipe.parse(recipe)
    if arithmetic not in ("stored", "float32") or (arithmetic == "float32" and parsed.steps):
        raise RecipeError(f"arithmetic={arithmetic!r} of a teacher by {parsed.text}: allowed are stored, and for an "
                          "uncompressed one float32")  # fmt: skip
    if dtype not in (None, *_DTYPES):
        raise RecipeError(f"dtype={dtype!r}: allowed are {', '.join(_DTYPES)}, or None to lose nothing")
    k = None if k == vocabulary else k
    identity = _identity(source, ids, mask, k=k, vocabulary=vocabulary, recipe=parsed.text, arithmetic=arithmetic,
                         dtype=dtype, batch=batch, device=device, seed=seed)  # fmt: skip
    folder = expanded(cache, TeacherError) / key_of(identity)
    outputs = SealedFolder.open(folder, _SEAL, identity)
    if outputs is None or _done(_shards(outputs)) < len(ids):
        busy = f"another process is writing {folder}; start again when it has ended"
        with SealedFolder.claim(folder, _SEAL, identity, busy) as outputs:  # whoever wrote until now may be further
            _Writer(outputs, progress or (lambda done, total, what: None)).run(source, device, ids, mask, shard_bytes)
    return TeacherOutputs(folder, identity, _shards(outputs))


def shared_vocabulary(
    student: Any, teacher: Any, rows: tuple[int, int], *, allow_vocab_mismatch: bool = False
) -> int:  # fmt: skip
    """How many tokens student and teacher have in common: the smaller number of rows, once the tokenizers agree.

    They agree if every id that both know is the same token, and both cut a text of a few scripts and some code into the
    same ids. One may know more tokens than the other, behind those that both know, and have more rows than tokens.

    Args:
        student, teacher: their tokenizers (transformers).
        rows: logits that student and teacher give.
        allow_vocab_mismatch: take ids to mean the same although the tokenizers say otherwise.

    Raises:
        TeacherError: the tokenizers disagree, or one is missing; names the first tokens that differ.
    """
    if allow_vocab_mismatch:
        return min(rows)
    way_out = "give a teacher of the student's tokenizer, or allow_vocab_mismatch=true to take ids to mean the same"
    if student is None or teacher is None:
        missing = " and ".join(name for name, each in (("student", student), ("teacher", teacher)) if each is None)
        raise TeacherError(f"the {missing} has no tokenizer to compare; {way_out}")
    ours, theirs = ({number: token for token, number in each.get_vocab().items()} for each in (student, teacher))
    both = min(max(ours), max(theirs)) + 1
    different = [i for i in range(both) if ours.get(i) != theirs.get(i)]
    if different:
        named = "; ".join(f"id {i} is {ours.get(i)!r} and {theirs.get(i)!r}" for i in different[:3])
        raise TeacherError(f"student and teacher have different tokenizers, {len(different)} of {both} tokens: "
                           f"{named}; {way_out}")  # fmt: skip
    found = [each.encode(_PROBE, add_special_tokens=False) for each in (student, teacher)]
    if found[0] != found[1]:
        at = next((i for i, (one, other) in enumerate(zip(*found, strict=False)) if one != other), min(map(len, found)))
        tokens = [
            each.convert_ids_to_tokens(some[at : at + 3]) for each, some in zip((student, teacher), found, strict=True)
        ]
        raise TeacherError(f"student and teacher have the same tokens but cut text otherwise: {tokens[0]} "
                           f"and {tokens[1]} of the same words; {way_out}")  # fmt: skip
    return min(rows)


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 of how a tokenizer cuts text, "none" without one; padding and truncation, set by calls, are left out."""
    if tokenizer is None:
        return "none"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = sorted(tokenizer.get_vocab().items()) if backend is None else json.loads(backend.to_str())
    if isinstance(state, dict):
        state = {key: value for key, value in state.items() if key not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _check(ids: Tensor, mask: Tensor | None, k: int | None, vocabulary: int, rows: int, batch: int) -> None:
    if ids.dim() != 2 or ids.is_floating_point() or not ids.numel():
        raise TeacherError(f"token ids must be integers (samples, length), not {tuple(ids.shape)} of {ids.dtype}")
    if not 0 <= int(ids.min()) <= int(ids.max()) < rows:
        raise TeacherError(f"token ids go from {int(ids.min())} to {int(ids.max())}; the teacher has {rows} tokens, "
                           "and must be of the student's tokenizer")  # fmt: skip
    if mask is not None and mask.shape != ids.shape:
        raise TeacherError(f"the mask {tuple(mask.shape)} does not fit token ids {tuple(ids.shape)}")
    if not 1 <= vocabulary <= rows:
        raise TeacherError(f"vocabulary={vocabulary}: allowed are 1 to {rows}, the teacher's")
    if k is not None and not 1 <= k <= vocabulary:
        raise TeacherError(f"k={k}: allowed are 1 to the vocabulary of {vocabulary}, or None for all")
    if batch < 1:
        raise TeacherError(f"batch={batch}: must be at least 1")


def _identity(
    source: _checkpoint.BaseSource, ids: Tensor, mask: Tensor | None, *, k: int | None, vocabulary: int, recipe: str,
    arithmetic: str, dtype: str | None, batch: int, device: str, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Everything that the numbers depend on."""
    import transformers

    return {
        "format": _FORMAT,
        "teacher": source.digest,
        "seed": seed if source.kind == "random" else None,
        "recipe": recipe,
        "arithmetic": arithmetic,
        "tokenizer": tokenizer_digest(source.tokenizer),
        "token ids": digest_of(ids.long()),
        "mask": None if mask is None else digest_of(mask.bool()),
        "samples": ids.shape[0],
        "length": ids.shape[1],
        "vocabulary": vocabulary,
        "k": k,
        "dtype": dtype,
        "batch": batch,
        "device": torch.device(device).type,
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

    def __init__(self, outputs: SealedFolder, progress: Progress):
        self.outputs, self.identity, self.shards, self.progress = outputs, outputs.identity, _shards(outputs), progress
        self.k, self.vocabulary, self.batch = (self.identity[name] for name in ("k", "vocabulary", "batch"))

    def run(
        self, source: _checkpoint.BaseSource, device: str, ids: Tensor, mask: Tensor | None, shard_bytes: int
    ) -> None:
        done, total = _done(self.shards), len(ids)
        if done == total:
            return
        self._check_space(source, total - done)
        model, dtype = self._open(source, device)
        each = max(1, shard_bytes // (self._bytes_of_text(dtype) * self.batch)) * self.batch  # batches stay whole
        self.progress(done, total, f"teacher {source.label}")
        while done < total:
            some = slice(done, min(done + each, total))
            tensors = self._outputs(model, dtype, ids[some], None if mask is None else mask[some], done)
            self._write(f"outputs-{len(self.shards):05}.safetensors", tensors, done)
            done = _done(self.shards)
            self.progress(done, total, f"teacher {source.label}")

    def _bytes_of_text(self, dtype: torch.dtype) -> int:
        of_position = self.vocabulary * dtype.itemsize if self.k is None else self.k * (4 + dtype.itemsize) + 4
        return self.identity["length"] * of_position

    def _check_space(self, source: _checkpoint.BaseSource, texts: int) -> None:
        """Raise TeacherError if the disk cannot hold the outputs of so many texts; the dtype may not be known yet."""
        dtype = _DTYPES.get(self.identity["dtype"] or "", torch.bfloat16 if self.k is None else torch.float32)
        folder, needed = self.outputs.path, texts * self._bytes_of_text(dtype)
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise TeacherError(f"the outputs of {source.label} for {texts} texts take {needed / 1e9:.1f} GB, and "
                               f"{folder} has {free / 1e9:.1f}; keep fewer tokens of each position (k), or give "
                               "another folder")  # fmt: skip

    def _open(self, source: _checkpoint.BaseSource, device: str) -> tuple[Any, torch.dtype]:
        """The teacher, and the dtype that its outputs are kept in."""
        from compression.engine.run import compress

        base = _checkpoint.open_base(source, device, seed=self.identity["seed"] or 0, dequantize=True)
        model = base.model
        if self.identity["recipe"] != "fp16":
            model = compress(base, self.identity["recipe"]).model
        if self.identity["arithmetic"] == "float32":
            model = model.float()
        own = next(model.parameters()).dtype if self.k is None else torch.float32
        return model, _DTYPES.get(self.identity["dtype"] or "", own)

    def _outputs(
        self, model: Any, dtype: torch.dtype, ids: Tensor, mask: Tensor | None, first: int
    ) -> dict[str, Tensor]:  # fmt: skip
        """Of some texts, number `first` the first of them.

        Raises:
            TeacherError: they are not finite at a position that is no padding.
        """
        device, parts = model.device, []
        step = max(1, _LOGITS // self.vocabulary)
        with torch.inference_mode():
            for at in range(0, len(ids), self.batch):
                some = slice(at, at + self.batch)
                padding = None if mask is None else mask[some].to(device).long()
                hidden = model.model(input_ids=ids[some].to(device).long(), attention_mask=padding, use_cache=False)
                for states in hidden.last_hidden_state.flatten(0, 1).split(step):
                    parts.append(self._keep(model.lm_head(states)[:, : self.vocabulary], dtype))
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
