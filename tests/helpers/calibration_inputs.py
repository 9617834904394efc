"""Inputs of linear layers as calibration meets them, and their Hessian."""

from strategies import gaussian


def inputs(cols, *, seed=0, tokens=300):
    """Inputs of a layer whose channels are correlated and of uneven size."""
    x = gaussian(tokens, cols, seed=seed, std=1)
    return (x @ gaussian(cols, cols, seed=seed + 1, std=cols**-0.5)) * gaussian(1, cols, seed=seed + 2, std=0.5).exp()


def hessian_of(x):
    return 2 * x.t() @ x / len(x)
