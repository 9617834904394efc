"""Files that accompany the weights of a checkpoint: tokenizer, chat templates, generation settings.

These files are copied byte for byte. Read and written again, a tokenizer loses the files that other engines look for,
and the sampling defaults of a published model lose what transformers takes for wrong or for its own default.
"""

import shutil
from pathlib import Path
from typing import Any

from compression import checkpoints
from compression.errors import CheckpointError

GENERATION = "generation_config.json"
COPIED = (
    GENERATION, "tokenizer*.json", "tokenizer.model*", "special_tokens_map.json", "added_tokens.json", "vocab*",
    "merges*", "*.model", "*.tiktoken", "chat_template*", "additional_chat_templates/*",
)  # fmt: skip


def copy_beside(source: Path, target: Path) -> None:
    """Copy what goes with the checkpoint in `source` into the folder `target`."""
    for pattern in COPIED:
        for path in sorted(filter(Path.is_file, source.glob(pattern))):
            copied = target / path.relative_to(source)
            copied.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copied)


def read_generation_config(folder: Path | None) -> Any:
    """transformers' GenerationConfig of a folder, None if there is no folder or no generation_config.json in it.

    Raises:
        CheckpointError: it cannot be read, or its end tokens are no ids.
    """
    if folder is None or not (path := folder / GENERATION).exists():
        return None
    from transformers import GenerationConfig

    values = checkpoints.base._read_json(path)
    ends = values.get("eos_token_id")
    if not all(type(each) is int and each >= 0 for each in (ends if isinstance(ends, list) else [ends or 0])):
        raise CheckpointError(f"{path}: eos_token_id {ends!r} must be a token id or a list of them")
    try:
        return GenerationConfig.from_dict(values)
    except Exception as error:  # whatever wrong values lead to
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {str(error)[:300]}") from error
