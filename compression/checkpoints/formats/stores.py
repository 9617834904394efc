"""How each layer of a published checkpoint is stored, by what the checkpoint says of itself."""

from collections.abc import Callable, Mapping

from compression.checkpoints.formats import compressed_tensors, compressed_tensors_config, hqq_config, torchao_config
from compression.checkpoints.formats.awq import AWQStore
from compression.checkpoints.formats.bitsandbytes import Int8Store, NF4Store
from compression.checkpoints.formats.bitsandbytes_config import BitsAndBytes
from compression.checkpoints.formats.compressed_tensors_config import Scheme
from compression.checkpoints.formats.description import Description, Published
from compression.checkpoints.formats.gptq import GPTQStore
from compression.checkpoints.formats.hqq import HQQStore
from compression.checkpoints.formats.layer import AffineStore, LayerStore
from compression.checkpoints.formats.torchao import TorchAOStore

_STORES: Mapping[str, Callable[[Scheme], LayerStore]] = {  # of a scheme, by the method of the checkpoint
    compressed_tensors_config.METHOD: compressed_tensors.store_of,
    hqq_config.METHOD: HQQStore,
    torchao_config.METHOD: TorchAOStore,
}


def affine_store(published: Published) -> AffineStore:
    """That of every quantized layer of a GPTQ or AWQ checkpoint."""
    if published.quant_method == "awq":
        return AWQStore(published.group_size)
    return GPTQStore(
        published.bits, published.group_size, symmetric=published.symmetric, v1=published.version == "gptq",
        desc_act=published.desc_act,
    )  # fmt: skip


def stores_of(published: Description, names: Mapping[str, str]) -> dict[str, LayerStore]:
    """By the names of linear layers, whose values are those of the checkpoint; without those that stay dense.

    Raises:
        CheckpointError: the description names layers that there are not, or one in two ways.
    """
    if isinstance(published, Published):
        return dict.fromkeys(names, affine_store(published))
    if isinstance(published, BitsAndBytes):
        return dict.fromkeys(names, NF4Store(published.double_quant) if published.bits == 4 else Int8Store())
    published.check_targets(list(names.values()))
    schemes = {ours: published.scheme_of(theirs) for ours, theirs in names.items()}
    store_of = _STORES[published.quant_method]
    return {name: store_of(scheme) for name, scheme in schemes.items() if scheme is not None}
