"""ggml's block types: read as the library `gguf` reads them, rounded to the bytes of ggml's reference quantizers."""

import hashlib

import ggml_by_hand
import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SHAPERS, gaussian, seeds

from compression import LayerError
from compression.numeric import ggml

of_32 = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
all_types = pytest.mark.parametrize("name", ggml.TYPES)
GGML = {  # SHA-256 of what ggml makes of `spread()`: `ggml_quantize_chunk` of xllamacpp 2026.10.11549
    "Q4_0": "621fa1a7a7138522f7aeb170598f1383ef591b957fe1af86d379bbe993f8379f",
    "Q4_1": "49fa2f508531e53814252a49ed5624993cd99851a7635a2e77b0b34e53df4f15",
    "Q5_0": "0dec615508c94e7d3490681d022ebc0bf8f1c199f7e95c769195afa2fa314c3b",
    "Q5_1": "64191cb5389cb0646a7cfc621e8f05fd641b84746ab8995e557ed69952ad079e",
    "Q8_0": "d718b614b980786f3fbcae0bbc490f3be8321a1880786091053e664e39eef3fa",
    "Q4_K": "62d98e14ea51d52d354de3247806e81a0793fc26ea4dc57bb5f3c5d25ae8efd2",
    "Q6_K": "e9a5749f8b4cd4709d8257d636c2d329221d3e71ee7604766441cf58215bf25d",
}


def raw_bytes(name, seed, rows=3, blocks=2):
    """Bytes of any kind, scales finite."""
    kind, draw = ggml.TYPES[name], np.random.default_rng(seed)
    raw = draw.integers(0, 256, (rows * blocks, kind.bytes), dtype=np.uint8)
    for at in kind.halves:
        raw[:, at : at + 2] = draw.standard_normal((len(raw), 1)).astype(np.float16).view(np.uint8)
    if name == "BF16":
        raw = gaussian(rows, blocks, seed=seed, dtype=torch.bfloat16).view(torch.uint8).numpy()
    return raw.reshape(rows, -1)


@st.composite
def weights(draw, cols=512):
    return draw(st.sampled_from(SHAPERS))(gaussian(2, cols, seed=draw(seeds), std=draw(st.sampled_from((0.02, 1)))))


def spread():
    """(16, 1024) numbers that are the same everywhere: of a linear congruence, large ones few."""
    state, found = 1, []
    for _ in range(16 * 1024):
        state = (state * 1103515245 + 12345) % 2**31
        found.append((state / 2**30 - 1) ** 3)
    return torch.tensor(found, dtype=torch.float64).float().view(16, 1024)


@all_types
@given(seed=seeds)
def test_every_bit_is_read_as_the_library_reads_it(name, seed):
    raw = raw_bytes(name, seed)

    theirs = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])

    assert np.array_equal(theirs, ggml.decode(torch.from_numpy(raw), name).numpy())


@pytest.mark.parametrize("name", of_32)
@given(weight=weights())
def test_bytes_in_blocks_of_32_are_those_of_the_library(name, weight):
    theirs = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[name])

    assert np.array_equal(theirs, ggml.encode(weight, name).numpy())


@pytest.mark.parametrize(("name", "by_hand"), [("Q4_K", ggml_by_hand.q4_k), ("Q6_K", ggml_by_hand.q6_k)])
@settings(max_examples=15)
@given(weight=weights(256))
def test_bytes_of_super_blocks_are_those_of_ggmls_steps_one_by_one(name, by_hand, weight):
    for row, raw in zip(weight.numpy(), ggml.encode(weight, name), strict=True):
        assert by_hand(row) == bytes(raw.tolist())


@pytest.mark.parametrize("name", GGML)
def test_bytes_are_those_that_ggml_itself_made(name):
    assert GGML[name] == hashlib.sha256(ggml.encode(spread(), name).numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("name", ggml.encodable())
@given(weight=weights())
def test_rows_are_rounded_each_by_itself(name, weight):
    raw = ggml.encode(weight, name)

    assert (2, ggml.row_bytes(name, 512)) == raw.shape
    assert torch.equal(raw[1:], ggml.encode(weight[1:], name))


def test_large_weights_are_taken_in_pieces(monkeypatch):
    weight = gaussian(5, 512)
    whole = ggml.encode(weight, "Q4_K")

    monkeypatch.setattr(ggml, "AT_ONCE", 768)

    assert torch.equal(whole, ggml.encode(weight, "Q4_K"))
    assert torch.equal(ggml.decode(whole[:1], "Q4_K"), ggml.decode(whole, "Q4_K")[:1])


def test_more_bits_lose_less():
    weight = gaussian(16, 1024)
    errors = {
        name: float((ggml.decode(ggml.encode(weight, name), name) - weight).norm() / weight.norm())
        for name in ("Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q6_K", "Q8_0")
    }

    assert list(errors.values()) == sorted(errors.values(), reverse=True), errors


REFUSED = {
    "blocks": (lambda: ggml.row_bytes("Q8_0", 48), "blocks of 32 weights, which do not tile 48 inputs"),
    "super-blocks": (lambda: ggml.row_bytes("Q4_K", 576), "do not tile 576 inputs; llama.cpp takes Q5_0 there"),
    "name": (lambda: ggml.find("Q9"), "type='Q9' must be one of F16, BF16, Q4_0"),
    "no name": (lambda: ggml.find(["Q4_0"]), r"type=\['Q4_0'\] must be"),
    "read alone": (lambda: ggml.encode(gaussian(2, 256), "Q2_K"), "Q2_K is read and not written; written are F16"),
    "range": (lambda: ggml.encode(gaussian(2, 64) * 1e9, "Q4_0"), "exceed what the fp16 scales of Q4_0 reach"),
}


@pytest.mark.parametrize(("call", "words"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_blocks_is_refused(call, words):
    with pytest.raises(LayerError, match=words):
        call()
