"""Models without weights: built from a configuration, and finished once their tensors are there."""

from collections.abc import Mapping
from typing import Any

from compression import architectures
from compression.architectures.table import architecture_of, named
from compression.errors import CheckpointError
from compression.files.libraries import failures_as

_NOT_OF_THE_MODEL = ("architectures", "auto_map", "attn_implementation", "trust_remote_code")


def model_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers is told of a configuration: nothing of how, or by whose code, it is to be run."""
    return {key: value for key, value in config.items() if key not in _NOT_OF_THE_MODEL and not key.startswith("_")}


def build(config: Mapping[str, Any], dtype: Any, device: str) -> Any:
    """The transformers model of a configuration with unset weights, fused layers and experts opened apart.

    Raises:
        CheckpointError: there is no such model, or it is not of the architecture that the configuration names.
    """
    import torch
    from transformers import AutoModelForCausalLM

    row = named(config["architectures"][0])
    known = known_config(config)
    attention = "sdpa" if row.sdpa else "eager"
    said = failures_as(lambda why: CheckpointError(f"config.json does not describe a model: {why}"))
    with said, torch.device(device):
        model = AutoModelForCausalLM.from_config(
            known, dtype=dtype, attn_implementation=attention, trust_remote_code=False
        )
    if type(model).__name__ != config["architectures"][0]:
        raise CheckpointError(f"config.json names the architecture {config['architectures'][0]}, but its model_type "
                              f"{config['model_type']!r} is that of {type(model).__name__}")  # fmt: skip
    architectures.published.open_apart(model, row)
    return model


def known_config(config: Mapping[str, Any]) -> Any:
    """A configuration as transformers has it, with its defaults.

    Raises:
        CheckpointError: it describes no model.
    """
    from transformers import AutoConfig

    values = model_values(config)
    with failures_as(lambda why: CheckpointError(f"config.json does not describe a model: {why}")):
        return AutoConfig.for_model(values.pop("model_type"), **values)


def finish(model: Any, device: str, generation_config: Any) -> Any:
    """Ties what the configuration ties, makes the tables that no checkpoint stores, freezes.

    How texts are generated is in no configuration of the model: `generation_config` is transformers', or None.
    """
    tie(model)
    with failures_as(lambda why: CheckpointError(f"config.json does not describe positions: {why}")):
        if not all(table.isfinite().all() for table in renew_tables(model)):
            raise ValueError("their frequencies are not finite")
    model.generation_config = generation_config
    return model.to(device).eval().requires_grad_(False)


def renew_tables(model: Any) -> list[Any]:
    """Make what no checkpoint stores anew, where the model is; returns the tables of rotary positions."""
    import torch

    row = architecture_of(model)
    embeddings = model.get_submodule(row.embeddings)
    if row.embeddings_scaled and hasattr(embeddings, "scalar_embed_scale"):
        embeddings.embed_scale = torch.tensor(embeddings.scalar_embed_scale, device=embeddings.weight.device)
    if row.rotary is None:
        return []
    fresh = type(model.get_submodule(row.rotary))(model.config)
    tables = list(fresh.buffers())
    model.set_submodule(row.rotary, fresh.to(model.device))
    return tables


def tie(model: Any) -> None:
    """Ties what the configuration ties; packed embeddings are on their head already."""
    from torch import nn

    if isinstance(model.get_submodule(architecture_of(model).embeddings), nn.Embedding):
        model.tie_weights()
