"""The matched Schur complement: N such that (F_u + N) W^-1 (F_u + N)' is close to S = F W^-1 F'.

J. W. Pearson, M. Stoll, A. J. Wathen, Regularization-robust preconditioners for time-dependent PDE-constrained
optimization problems, SIAM J. Matrix Anal. Appl. 33, 2012. S = F_u W^-1 F_u' + G with G = C Wzz^-1 C'; where
N W^-1 N' = G and F_u W^-1 N' + N W^-1 F_u' is positive semidefinite, the eigenvalues of the preconditioned S lie in
[1/2, 1], whatever the mesh, the steps and the regularization.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from pdeopt.core.errors import InputError
from pdeopt.kkt.blocks import KKTBlocks
from pdeopt.steps.innerproduct import InnerProduct
from pdeopt.steps.matrices.products import PaddedProduct
from pdeopt.steps.sparse import StepMatrix
from pdeopt.steps.sparsity import Sparsity, at_columns
from pdeopt.steps.timegrid import TimeGrid
from pdeopt.steps.windows import alike


def matched_shift(blocks: KKTBlocks, with_old_state: bool = False) -> StepMatrix:
    """N with N W^-1 N' close to G = C Wzz^-1 C', for each step. Collective.

    With lumped forms gamma^2 = G 1 / W 1 in each unknown, N = gamma^1/2 W gamma^1/2; for mass matrices that is exact,
    N = sqrt(tau w / alpha) M. Where controls are fixed, see `_shift_of_free`.

    Args:
        blocks: of the steps.
        with_old_state: add B W^-1 B' to G, for the diagonal block of S alone.

    Returns:
        Square matrices of size n, one a step, or one for all where all steps of all ranks are alike.
    """
    if blocks.whole is not None and not with_old_state:
        return _shift_of_free(blocks, *blocks.whole)
    squared = _lumped(blocks.C, blocks.control)
    if with_old_state:
        squared = squared + _lumped(blocks.B, blocks.state)  # of the step before: its weight is nearly the same
    root = (squared / blocks.state.row_sums()).sqrt().sqrt()
    if alike(blocks.grid, blocks.A, blocks.C, blocks.state.matrix):  # one shift keeps steps alike
        root = _largest(blocks.grid, root * blocks.state.weight[:, None].sqrt())
        form = blocks.state.matrix
    else:
        form = blocks.state.spread()
    return _scaled(root, form)


def _shift_of_free(blocks: KKTBlocks, C: StepMatrix, control: InnerProduct) -> StepMatrix:
    """N where controls are fixed; C and the form of the control are those with the fixed controls.

    G has no full rank then, and a multiple of W would hold what is fixed beside a free control, too. Instead
    N = (W 1 / G 1)^1/4 C L^-1 C' (W 1 / G 1)^1/4 with C of the free controls; the lumped form L and G are of all.
    """
    if C.sparsity.columns is not None:
        got, legal = "fixed controls that other ranks of a step see", "-kkt_precond reduced | direct, or space_ranks 1"
        raise InputError("a matched Schur complement", got, legal)
    squared, pattern = _lumped(C, control), Sparsity(C.sparsity.csr @ C.sparsity.csr.T)
    root = torch.where(squared > 0, blocks.state.row_sums() / squared, 0.0).sqrt().sqrt()
    return _scaled(root, StepMatrix(pattern, _outer(blocks.C, 1.0 / control.row_sums(), pattern)))


def _scaled(root: Tensor, form: StepMatrix) -> StepMatrix:
    """diag(root) form diag(root)."""
    pattern = form.sparsity
    return StepMatrix(pattern, root[:, pattern.rows] * form.values * at_columns(pattern, root))


def _lumped(block: StepMatrix, form: InnerProduct) -> Tensor:
    """Row sums of block form^-1 block' with absolute entries and a lumped form, (batch or 1, n)."""
    size = block.absolute()
    ones = torch.ones(len(form.weight), block.shape[0], dtype=torch.float64)
    return size(size.transpose(ones) / form.row_sums())


def _largest(grid: TimeGrid, rows: Tensor) -> Tensor:
    """The largest entry of each column over all steps, (1, n). Collective."""
    largest = rows.amax(0, keepdim=True)
    if grid.time.size > 1:
        largest = torch.stack([torch.from_numpy(part) for part in grid.time.allgather(largest.numpy())]).amax(0)
    return largest


def _outer(C: StepMatrix, weight: Tensor, pattern: Sparsity) -> Tensor:
    """Those entries of C diag(weight) C' that stand in a pattern, (batch, nnz)."""
    form, every = C.sparsity.padded_transpose, torch.arange(C.shape[0])
    values, rows = PaddedProduct(C.values, form).values, [every[place] for place in form.columns]  # of each column
    keys = torch.from_numpy(pattern.rows * pattern.shape[1] + pattern.cols)
    out = torch.zeros(max(len(C.values), len(weight)), pattern.nnz, dtype=torch.float64)
    for i, k in itertools.product(range(len(rows)), repeat=2):
        key = rows[i] * pattern.shape[1] + rows[k]
        place = torch.searchsorted(keys, key).clamp(max=pattern.nnz - 1)
        found = keys[place] == key
        out.index_add_(1, place[found], (values[i] * values[k] * weight)[:, found])
    return out
