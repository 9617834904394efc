"""How much the layers, heads and neurons of a decoder matter to what it computes on calibration text.

Hidden states are in the dtype of the model, or in fp32 on a CPU without bf16 (`calibration.capture.Inputs`).
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compression.architectures.cuts import weight_of
from compression.architectures.decoder import Block, Decoder
from compression.calibration.capture import Inputs, Stack


def layer_similarity(model: nn.Module, ids: Tensor) -> list[float]:
    """Of each block, the cosine of the hidden state before it and behind it, mean over the tokens of ids (samples,
    length): 1 less the Block Influence of ShortGPT, arXiv 2403.03853, eq. 1."""
    inputs, found = Inputs.of_first_block(model, ids), []
    for block in Decoder(model).blocks:
        before = list(inputs.hidden)
        inputs.advance(block)
        cosines = [
            F.cosine_similarity(x.float(), y.float(), dim=-1) for x, y in zip(before, inputs.hidden, strict=True)
        ]
        found.append(float(torch.cat(cosines).mean()))
    return found


@torch.no_grad()
def perplexity_without(model: nn.Module, ids: Tensor) -> list[float]:
    """Of each block, the perplexity of ids (samples, length) when it alone is left out: Shortened LLaMA, arXiv
    2402.02834, section 3.1.

    The samples go through every block once for each block before it that was left out, and once as they are; in memory
    are their hidden states, blocks + 1 times.
    """
    inputs, samples, decoder = Inputs.of_first_block(model, ids), len(ids), Decoder(model)
    for block in decoder.blocks:
        without = inputs.hidden[:samples]
        inputs.advance(block)
        inputs.hidden += without
    norm, head = (copy.deepcopy(each).to(inputs.dtype) for each in (decoder.norm, decoder.head))
    losses = [
        F.cross_entropy(decoder.logits(norm(states), head)[0, :-1].float(), ids[i % samples, 1:])
        for i, states in enumerate(inputs.hidden)
    ]
    return torch.stack(losses).view(-1, samples).mean(1).exp().tolist()[1:]


def head_contribution(block: Block, inputs: Inputs) -> Tensor:
    """Of each KV head, the norm of what its query heads add to the output of o_proj, over all tokens: fp32 (KV heads,).

    That is |W[:, C] X[:, C]'| (Frobenius), X the input of o_proj and C the columns of these query heads.
    """
    _, heads = block.heads
    weight = weight_of(block.layer(block.attention.writer))
    weight = weight.view(len(weight), heads, -1).permute(1, 2, 0)  # (KV heads, columns of each, hidden)
    squares = torch.zeros(heads, device=weight.device)

    def see(stack: Stack, x: Tensor) -> None:
        if stack.of == "values":
            parts = x.float().view(-1, heads, weight.shape[1]).transpose(0, 1) @ weight
            squares.add_(parts.square().sum((1, 2)))

    inputs.observe(block, see)
    return squares.sqrt()


def neuron_score(block: Block, activation: Tensor) -> Tensor:
    """[O], section 2.1.2: 0.5 w / max w + 0.5 a / max a of each neuron of a block's MLP, float64 (neurons,).

    w is the sum of |W_gate| and |W_up| over the neuron's row (eq. 2), of |W_up| alone where there is no gate, a its
    `activation`.
    """
    rows = [weight_of(block.layer(path)).abs().double().sum(1).cpu() for path in block.mlp.readers]
    parts = (torch.stack(rows).sum(0), activation)
    return sum(0.5 * part / part.max().clamp(min=torch.finfo(part.dtype).tiny) for part in parts)  # type: ignore[return-value]
