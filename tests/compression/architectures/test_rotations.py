"""A decoder rotated as a whole computes the same to 1e-9 in fp64, on every architecture that allows it; others say why
not; and no tensor that a base shares is written into."""

import copy

import pytest
import torch
from exact_models import TOKENS, model_of, norms_in_fp64, orthogonal  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_outliers import in_principal_basis

from compression import LayerError
from compression.architectures import rotations
from compression.architectures.decoder import Decoder
from compression.architectures.description import describe
from compression.architectures.edits import FoldNorm, Turn, fold_norms
from compression.architectures.rotations import RotateStream
from compression.architectures.table import ARCHITECTURES
from compression.layers.rounded import transformed_inputs

TURNED = sorted(name for name, row in ARCHITECTURES.items() if row.unturned is None)
STAY = {
    **dict.fromkeys(["Gemma2ForCausalLM", "Gemma3ForCausalLM", "Olmo2ForCausalLM"], "norms behind its sublayers"),
    **dict.fromkeys(["StableLmForCausalLM", "GPTNeoXForCausalLM", "OPTForCausalLM"], "its norms subtract the mean"),
}


def logits(model):
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def moved(model, before):
    return float((logits(model) - before).norm() / before.norm())


def heads_of(decoder, seed):
    return [orthogonal(seed + i, block.head_size, block.head_size) for i, block in enumerate(decoder.blocks)]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", TURNED)
def test_all_rotations_together_change_nothing_and_leave_a_plain_model(family, tied):
    model = model_of(family, seed := 5, tied)
    before, kind = logits(model), type(Decoder(model).blocks[0].module)

    decoder = fold_norms(model)
    for edit in rotations.merged(decoder, orthogonal(seed, 32, 32), heads_of(decoder, seed)):
        edit.apply(decoder)
    plain = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for block, path in rotations.down_projections(decoder):
        block.replace(block.full(path), transformed_inputs(block.layer(path), 32))

    # routers of Deepseek multiply in fp32
    assert (1e-5 if family.startswith("Deepseek") else 1e-9) > moved(model, before) > 0
    assert kind is type(decoder.blocks[0].module) and [] == describe(model)
    assert plain == {name: t.shape for name, t in fold_norms(model_of(family, seed, tied)).model.state_dict().items()}


@pytest.mark.parametrize("family", TURNED)
def test_the_principal_basis_changes_nothing_and_orders_the_channels(family):
    model = model_of(family, 5, tied=True)
    with torch.no_grad():
        before = model(TOKENS, use_cache=False).logits
        in_principal_basis(model, TOKENS)
        after, spread = model(TOKENS, use_cache=False).logits, []
        Decoder(model).norm.register_forward_pre_hook(lambda _, x: spread.append(x[0].square().mean((0, 1))))
        model(TOKENS, use_cache=False)

    # routers of Deepseek multiply in fp32
    assert (1e-5 if family.startswith("Deepseek") else 1e-9) > float((after - before).norm() / before.norm())
    assert spread[0][:4].mean() > spread[0][-4:].mean()


@settings(max_examples=4)
@given(st.sampled_from(TURNED), st.integers(0, 2**20))
def test_one_rotation_is_the_next_ones_start_and_its_inverse_undoes_it(family, seed):
    decoder = fold_norms(model_of(family, seed))
    first, second = orthogonal(seed, 32, 32), orthogonal(seed + 1, 32, 32)
    before = {name: tensor.clone() for name, tensor in decoder.model.state_dict().items()}

    for matrix in (first, second, (first @ second).T):
        RotateStream(matrix).apply(decoder)

    for name, tensor in decoder.model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", sorted(ARCHITECTURES.keys() - set(TURNED)))
def test_what_an_architecture_does_not_allow_is_refused_in_words(family):
    decoder = Decoder(model_of(family, 1))

    with pytest.raises(LayerError, match=f"cannot be turned: {STAY[family]}"):
        RotateStream(orthogonal(1, 32, 32)).apply(decoder)


def test_what_is_not_ready_is_refused_in_words():
    with pytest.raises(LayerError, match="untie it before it is turned"):
        tied = model_of("LlamaForCausalLM", 1, tied=True)
        for place in Decoder(tied).places():
            place.norm.weight.data.fill_(1)
        RotateStream(orthogonal(1, 32, 32)).apply(Decoder(tied))
    with pytest.raises(LayerError, match="fold it into its readers first"):
        RotateStream(orthogonal(1, 32, 32)).apply(Decoder(model_of("LlamaForCausalLM", 1)))
    with pytest.raises(LayerError, match=r"must be \(32, 32\), not \(16, 16\)"):
        RotateStream(orthogonal(1, 16, 16)).apply(Decoder(model_of("LlamaForCausalLM", 1)))
    turned = fold_norms(model_of("LlamaForCausalLM", 1))
    for number in (2, 3):
        FoldNorm(number).apply(turned)
        Turn(number, orthogonal(1, 32, 32)).apply(turned)
    with pytest.raises(LayerError, match="passes a matrix beside this block already"):
        RotateStream(orthogonal(1, 32, 32)).apply(turned)


def test_in_float32_edits_round_once_and_nothing_shared_is_written_into():
    base = model_of("LlamaForCausalLM", 3).bfloat16()
    kept = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    wide, matrix = fold_norms(copy.deepcopy(base).float()), orthogonal(3, 32, 32)

    model = copy.copy(base)
    memo = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    model = copy.deepcopy(base, memo)
    with rotations.in_float32(model):
        RotateStream(matrix).apply(fold_norms(model))
    RotateStream(matrix).apply(wide)

    assert {torch.bfloat16} == {each.dtype for each in model.parameters()}
    for name, tensor in wide.model.state_dict().items():
        assert torch.equal(tensor.to(model.state_dict()[name].dtype), model.state_dict()[name]), name
    assert all(torch.equal(kept[name], tensor) for name, tensor in base.state_dict().items())
