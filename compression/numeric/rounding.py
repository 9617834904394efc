"""Which levels of a grid the weights of a layer are rounded to.

What is minimised is the squared output error of a layer, tr(D H D^T), with D = W - Q and H = 2/n sum x x^T over n
inputs x. Shapes: W, Q (rows, cols); x (cols,); H (cols, cols). All arithmetic is in fp32.

That is GPTQ's, on an affine grid (`gptq`), or on any whose parameters are found beforehand (`Factored.codes`).
`half_quadratic`, beside this module, looks at the weights alone.

GPTQ (arXiv 2210.17323) rounds column by column and lets the columns to come make up for the error so far. Its updates
need the Cholesky factor of the inverse of H. The same codes come from H itself: with H = R R^T, R upper triangular,
column j is rounded from

    w_j + sum over i < j of (w_i - q_i) R_ij / R_jj                                                                 (1)

(QuIP, arXiv 2307.13304, calls it LDLQ and proves the two equal), so that one factorization is all: R is the
lower Cholesky factor of H with rows and columns reversed, reversed back. The squared error of the whole is the sum of
R_jj^2 times the squared error of each column against (1).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compression.errors import LayerError
from compression.numeric import grouping
from compression.numeric.grids import AffineGrid
from compression.numeric.grouping import Grid, Params

LEAF = 16  # columns that are rounded one by one before their error is passed on in a matrix product
MOST_DAMPING = 1e3
ERROR_ROWS = 256


@dataclass(frozen=True)
class Rounded:
    """Codes uint8 (rows, cols) and stored parameters of a weight.

    Attributes:
        permutation: for each stored column the input that it multiplies, or None for the order of the inputs.
        damping: what was added to the diagonal of H, as a share of its mean; 0 where H was not factorized.
    """

    codes: Tensor
    params: Params
    permutation: Tensor | None = None
    damping: float = 0.0

    def rows(self, part: slice) -> "Rounded":
        """The same for some rows of the weight."""
        return replace(self, codes=self.codes[part], params={name: p[part] for name, p in self.params.items()})

    def decode(self, grid: Grid) -> Tensor:
        """fp32 (rows, cols), in the order of the inputs."""
        weight = grouping.decode(grid, self.codes, self.params)
        return weight if self.permutation is None else weight[:, self.permutation.argsort()]


def output_error(difference: Tensor, hessian: Tensor) -> Tensor:
    """tr(D H D^T) as one number for each row of D, (rows,)."""
    return ((difference @ hessian) * difference).sum(-1)


def relative_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """tr(D H D^T) / tr(W H W^T) over at most ERROR_ROWS rows, evenly spread: all of them would cost more than the
    rounding itself. 0 where the outputs are all zero."""
    rows = slice(0, None, -(-len(weight) // ERROR_ROWS))
    whole = float(output_error(weight[rows], hessian).sum())
    return float(output_error((weight - quantized)[rows], hessian).sum()) / whole if whole > 0 else 0.0


def gptq(
    weight: Tensor,
    hessian: Tensor,
    grid: AffineGrid,
    *,
    damp: float = 0.01,
    act_order: bool = False,
    params: Params | None = None,
    dtype: torch.dtype | None = None,
) -> Rounded:
    """GPTQ on an affine grid.

    Args:
        weight: fp32 (rows, cols).
        hessian: fp32 (cols, cols).
        damp: share of the mean of H's diagonal that is added to it; ten times as much as long as H cannot be
            factorized.
        act_order: round columns in the order of falling H_jj.
        params: groups' parameters found beforehand ("static groups"); by default those of each group are found when its
            first column is reached, from the weights as they are by then.
        dtype: of stored scales; by default that of the weight.

    With `act_order`, without `params` and in more than one group, groups are made of columns that follow each other in
    the new order, and the codes are stored in it. A column that no input reaches is rounded to nearest. A weight of
    zero, as pruned ones are, stays zero.

    Raises:
        LayerError: H is not finite, or no damping makes it positive definite.
    """
    rows, cols = weight.shape
    diagonal = hessian.diagonal()
    order = diagonal.argsort(descending=True, stable=True) if act_order else None
    if order is not None:
        weight, hessian = weight[:, order], hessian[order][:, order]
    factor, damping = upper_factor(hessian, damp)
    group_size = cols if grid.group_size == -1 else grid.group_size
    solver = _Levels(weight, factor, grid, group_size, dtype or weight.dtype)
    if params is not None:
        columns = torch.arange(cols, device=weight.device) if order is None else order
        scales, zeros = grid.expand(params, rows, cols)
        solver.set_levels(scales, zeros, (columns // group_size).tolist())
    solver.solve(0, cols)
    codes = solver.wanted.t().to(torch.uint8)
    found = grid.store(*solver.levels(), solver.dtype) if params is None else params
    if order is not None and (params is not None or group_size == cols):  # groups are of neighbouring inputs
        codes, order = codes[:, order.argsort()], None
    return Rounded(codes.contiguous(), found, order, damping)


@dataclass(frozen=True)
class Factored:
    """H as rounding needs it, for all layers that read the same inputs.

    Attributes:
        order: in which columns are rounded, that of falling H_jj.
        factor: R of H in that order.
        damping: what was added to the diagonal of H, as a share of its mean.
    """

    order: Tensor
    factor: Tensor
    damping: float

    @classmethod
    def of(cls, hessian: Tensor, damp: float = 0.01) -> "Factored":
        """Of H, fp32 (cols, cols). Raises LayerError: it is not finite, or no damping makes it positive definite."""
        order = hessian.diagonal().argsort(descending=True, stable=True)
        return cls(order, *upper_factor(hessian[order][:, order], damp))

    def codes(self, weight: Tensor, grid: Grid, params: Params) -> Tensor:
        """GPTQ with "static groups" on any grid: uint8 (rows, cols), in the order of the inputs.

        Args:
            weight: (rows, cols).
            params: of the grid, for that weight; they stay as they are.

        A column that no input reaches is rounded to nearest. A weight of zero, as pruned ones are, takes the level that
        is nearest to it.
        """
        solver = _Static(weight.detach().float()[:, self.order], self.factor, grid, params, self.order)
        solver.solve(0, len(self.order))
        return solver.codes[self.order.argsort()].t().contiguous()


class Columns:
    """Settles the columns of a weight one by one, each against (1). Subclasses choose what a column becomes
    (`_settle`), and may look at a block of columns when it begins (`_begin`).

    Columns are rows here: each is contiguous. `wanted[k]` is (1), summed up over what is settled so far, and whatever
    `_settle` leaves there once column k is.
    """

    def __init__(self, weight: Tensor, factor: Tensor, block: int):
        self.block = block
        self.weight = weight.t().contiguous()
        self.factor = factor / factor.diagonal()  # R_ij / R_jj
        self.wanted = self.weight.clone()
        self.difference = torch.empty_like(self.weight)  # w_j - q_j

    def _begin(self, begin: int, end: int) -> None:
        """A block of columns begins, all before it are settled."""

    def _settle(self, j: int) -> None:
        """Choose q_j by `wanted[j]`, and leave w_j - q_j in `difference[j]`."""
        raise NotImplementedError

    def solve(self, begin: int, end: int) -> None:
        """Settle columns begin .. end, whose `wanted` holds all that comes from the columns before: first one half,
        then, with the errors of the first passed on, the other. Blocks stay whole.
        """
        if begin % self.block == 0 and end == min(begin + self.block, len(self.weight)):
            self._begin(begin, end)
        if end - begin <= min(LEAF, self.block):
            for j in range(begin, end):
                self._settle(j)
                if j + 1 < end:
                    self.wanted[j + 1 : end].addr_(self.factor[j, j + 1 : end], self.difference[j])
            return
        whole = self.block if end - begin > self.block else 1
        middle = begin + max(1, -(-(end - begin) // whole) // 2) * whole
        self.solve(begin, middle)
        left, right = slice(begin, middle), slice(middle, end)
        self.wanted[right].addmm_(self.factor[left, right].t(), self.difference[left])
        self.solve(middle, end)

    def current(self, begin: int, end: int) -> Tensor:
        """Columns begin .. end, (end - begin, rows), of the best answer of all coming columns to the errors so far."""
        part = slice(begin, end)
        fed = self.wanted[part] - self.weight[part]
        answer = torch.linalg.solve_triangular(self.factor[part, part].t(), fed, upper=False, unitriangular=True)
        return self.weight[part] + answer


class _Levels(Columns):
    """Columns are rounded to the levels of a grid; `wanted[k]` becomes the code. A weight of zero takes the level zero,
    which every affine grid with whole zero points has."""

    def __init__(self, weight: Tensor, factor: Tensor, grid: AffineGrid, group_size: int, dtype: torch.dtype):
        super().__init__(weight, factor, group_size)
        self.grid, self.dtype = grid, dtype
        self.static = False
        zero = self.weight == 0
        self.zero = zero if zero.any() else None
        groups = len(self.weight) // group_size
        self.scales, self.zeros = (self.weight.new_empty(groups, self.weight.shape[1]) for _ in range(2))
        self.group_of = [column // group_size for column in range(len(self.weight))]

    def set_levels(self, scales: Tensor, zeros: Tensor, group_of: list[int]) -> None:
        self.static, self.group_of = True, group_of
        self.scales, self.zeros = scales.t().contiguous(), zeros.t().contiguous()

    def levels(self) -> tuple[Tensor, Tensor]:
        return self.scales.t().contiguous(), self.zeros.t().contiguous()

    def _begin(self, begin: int, end: int) -> None:
        """The group's levels, from its weights as they are by now."""
        if self.static:
            return
        weight = self.current(begin, end)
        if self.zero is not None:
            weight.masked_fill_(self.zero[begin:end], 0)
        weight = weight.t()
        whole = replace(self.grid, group_size=-1)
        scales, zeros = whole.expand(whole.fit(weight, self.dtype), *weight.shape)
        self.scales[begin // self.block], self.zeros[begin // self.block] = scales[:, 0], zeros[:, 0]

    def _settle(self, j: int) -> None:
        scale, zero = self.scales[self.group_of[j]], self.zeros[self.group_of[j]]
        code = self.wanted[j].div_(scale).add_(zero).round_().clamp_(0, 2**self.grid.bits - 1)
        if self.zero is not None:
            torch.where(self.zero[j], zero, code, out=code)
        torch.addcmul(self.weight[j], torch.sub(code, zero), scale, value=-1, out=self.difference[j])


class _Static(Columns):
    """Columns are rounded to the levels of any grid, whose parameters are known; `order` names the column of the grid
    that each is."""

    def __init__(self, weight: Tensor, factor: Tensor, grid: Grid, params: Params, order: Tensor):
        super().__init__(weight, factor, weight.shape[1])
        rows, cols = weight.shape
        self.grid, self.params = grid, params
        self.size = cols if grid.group_size == -1 else grid.group_size
        self.first = torch.arange(rows, device=weight.device)[:, None] * (cols // self.size)
        self.of = order.tolist()
        zero = self.weight == 0
        self.zero = zero if zero.any() else None
        self.codes = torch.empty_like(self.weight, dtype=torch.uint8)
        self._taken: dict[int, tuple[Grid, Params]] = {}

    def _settle(self, j: int) -> None:
        group, wanted = self.of[j] // self.size, self.wanted[j]
        if group not in self._taken:
            self._taken[group] = self.grid.take(self.params, self.first + group, 1)
        grid, params = self._taken[group]
        if self.zero is not None:
            wanted = torch.where(self.zero[j], self.weight[j], wanted)  # with its sign, which FP4 has for zero too
        codes = grid.encode(wanted[:, None], params)
        self.codes[j] = codes[:, 0]
        torch.sub(self.weight[j], grouping.decode(grid, codes, params)[:, 0], out=self.difference[j])


def upper_factor(hessian: Tensor, damp: float) -> tuple[Tensor, float]:
    """R upper triangular with R R^T = H + damping * mean(diag H) * I, and the damping that it took."""
    mean = float(hessian.diagonal().mean())
    if not all(torch.isfinite(extreme) for extreme in torch.aminmax(hessian)):
        raise LayerError("the inputs of the calibration text to this layer are not finite; check the base")
    damping, failed = damp, torch.zeros((), dtype=torch.int32, device=hessian.device)
    while damping <= MOST_DAMPING:
        lower = hessian.flip(0, 1).mT  # column by column, as LAPACK has it: factorized in place
        diagonal = lower.diagonal()
        diagonal.copy_(torch.where(diagonal == 0, mean or 1.0, diagonal + damping * mean))
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
        if not failed:
            return lower.flip(0, 1), damping
        damping = max(10 * damping, 1e-6)
    raise LayerError(f"the Hessian is not positive definite, not even with {MOST_DAMPING} of its mean diagonal added")
