"""Hypothesis strategies: weights as checkpoints hold them and as they should not, codes, grids, recipes."""

import dataclasses
import types
import typing

import torch
from hypothesis import strategies as st

from compression import Recipe
from compression.errors import RecipeError
from compression.numeric.grids import AffineGrid, Int8RowGrid
from compression.numeric.normal_float import NF4Grid
from compression.recipes.recipe import Step
from compression.recipes.registry import built_in

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BITS = (2, 3, 4, 8)

seeds = st.integers(0, 2**31 - 1)
dtypes = st.sampled_from(DTYPES)


def gaussian(rows, cols, *, seed=0, std=0.02, dtype=torch.float32):
    """A weight as trained layers have it."""
    return (torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * std).to(dtype)


def _zeros(w):
    return torch.zeros_like(w)


def _half_zeros(w):
    return w * (w > 0)


def _constant(w):
    return torch.full_like(w, float(w[0, 0]))


def _one_sided(w):
    return w.abs() + w.abs().max()


def _one_outlier(w):
    w = w.clone()
    w[w.shape[0] // 2, w.shape[1] // 3] = 1000 * w.abs().max()
    return w


def _wide(w):
    """Every row of its own size, 2**-14 to 2**7 times the first."""
    exponents = torch.arange(w.shape[0]).remainder(22) - 14
    return w * torch.pow(2.0, exponents.float())[:, None]


def _subnormal(w):
    return w.sign() * torch.finfo(torch.float32).tiny * w.abs() * 8


def _tiny_subnormal(w):
    """A few multiples of the smallest number that fp32 has."""
    return w.sign() * (w.abs() * 300).round() * 2.0**-149


def _on_levels(w):
    """Whole numbers: ties, and values that sit on a level."""
    return (w / w.std()).round()


SHAPERS = (_zeros, _half_zeros, _constant, _one_sided, _one_outlier, _wide, _on_levels, lambda w: w)
EXTREME = (_subnormal, _tiny_subnormal)


@st.composite
def weights(draw, max_rows=6):
    """(rows, 64) finite weights of any of the kinds above."""
    dtype = draw(dtypes)
    shape = draw(st.sampled_from(SHAPERS + (EXTREME if dtype == torch.float32 else ())))
    rows, std = draw(st.integers(1, max_rows)), draw(st.sampled_from((0.02, 1)))
    return shape(gaussian(rows, 64, seed=draw(seeds), std=std)).to(dtype)


@st.composite
def codes(draw, bits, max_rows=4, max_cols=70):
    """uint8 (rows, cols) below 2**bits; rows and columns may be of any number, none of them included."""
    shape = draw(st.integers(0, max_rows)), draw(st.integers(0, max_cols))
    generator = torch.Generator().manual_seed(draw(seeds))
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator)


group_sizes = st.sampled_from((8, 16, 32, 64, -1))
affine_grids = st.builds(AffineGrid, bits=st.sampled_from(BITS), group_size=group_sizes, symmetric=st.booleans())
nf4_grids = st.builds(NF4Grid, group_size=st.sampled_from((32, 64)), double_quant=st.booleans())
grids = st.one_of(affine_grids, nf4_grids, st.just(Int8RowGrid()))


# --- Recipes ----------------------------------------------------------------------------------------------------------

VALUES = {  # of parameters by the type that they are declared with
    bool: st.booleans(),
    int: st.integers(1, 9) | st.integers(-1, 4096),
    float: st.floats(0, 1) | st.floats(allow_nan=False, allow_infinity=False),
    str: st.sampled_from(("2:4", "1:4", "fp16", "nf4")),
    type(None): st.none(),
}


def values(hint):
    """Values of a declared type, also such as the method refuses."""
    if typing.get_origin(hint) is typing.Literal:
        return st.sampled_from(typing.get_args(hint))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return st.one_of(*map(values, typing.get_args(hint)))
    return VALUES[hint]


@st.composite
def instances(draw, cls):
    """A registered method with some of its parameters set; what it refuses beside those before is left out."""
    hints, given = typing.get_type_hints(cls), {}
    for field in draw(st.lists(st.sampled_from(dataclasses.fields(cls)), max_size=4, unique_by=lambda each: each.name)):
        more = given | {field.name: draw(values(hints[field.name]))}
        try:
            cls(**more)
        except RecipeError:
            continue
        given = more
    return cls(**given)


patterns = st.one_of(st.sampled_from(("*.down_proj", "model.layers.0.*", "*")), st.text(max_size=8))


@st.composite
def steps(draw):
    """A method, and layers on which it has other parameters or does nothing."""
    same = instances(draw(st.sampled_from(tuple(built_in().values()))))
    method = draw(same)
    layers = draw(st.dictionaries(patterns, st.none() | same, max_size=2)) if method.per_layer else {}
    return Step(method, tuple(layers.items()))


recipes = st.builds(lambda steps: Recipe(tuple(steps)), st.lists(steps(), max_size=4))

_PIECES = (
    *("fp16", "q", *built_in(), "bits", "group_size", "threshold", "layers", "backend"),
    *("(", ")", "=", ",", "-", ":", '"', "{", "}", "[", " ", "\n", "\0", "\ud800", ".json"),
    *("none", "true", "torch", "3", "-1", "6.0", "1e999", "1" * 400, "\N{ARABIC-INDIC DIGIT THREE}", "NaN"),
    *("(bits=3)", ":bits=2", '{"*":none}', '{"*.down_proj":{"bits":8}}', '{"*":null}'),
)
recipe_texts = st.one_of(
    st.text(max_size=20),
    st.lists(st.sampled_from(_PIECES), max_size=10).map("".join),
    st.builds(
        lambda text, at, piece: text[: at % (len(text) + 1)] + piece + text[at % (len(text) + 1) :],
        recipes.map(lambda recipe: recipe.text),
        st.integers(0, 200),
        st.sampled_from(_PIECES),
    ),
)
