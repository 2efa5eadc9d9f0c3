"""Kronecker factors of many blocks of equal shape, in eigenvectors: damped inverses for any damping, batched."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from pdeopt.core.errors import InputError, SolveFailure


class FactorPair(NamedTuple):
    """A, (blocks, n, n), and G, (blocks, m, m), symmetric positive semidefinite."""

    A: Tensor
    G: Tensor


class KroneckerBatches:
    """diag_b(G_b (x) A_b) + damping, inverted exactly: what `KroneckerBlocks.solve(exact=True)` does block by block.

    Args:
        pairs: a group of blocks each, of one shape; blocks of unlike shapes are unlike groups.

    Raises:
        InputError: factors that are not square, or not as many A as G.

    Example:
        >>> batches = KroneckerBatches([FactorPair(A, G)])
        >>> (V,) = batches.solve([gradient], 1e-2)            # (blocks, m, n)
    """

    def __init__(self, pairs: Sequence[FactorPair]) -> None:
        for A, G in pairs:
            is_square = all(each.dim() == 3 and each.shape[1] == each.shape[2] for each in (A, G))
            if not is_square or len(A) != len(G):
                raise InputError("Kronecker factors", f"{tuple(A.shape)}, {tuple(G.shape)}", "(blocks, n, n) each")
        self.pairs = list(pairs)

    @cached_property
    def _eigen(self) -> list[tuple[Tensor, ...]]:
        """Eigenvalues of the blocks, (blocks, m, n), eigenvectors of A and G, and these transposed."""
        found: list[tuple[Tensor, ...]] = []
        for A, G in self.pairs:
            if not bool(A.isfinite().all() and G.isfinite().all()):
                raise SolveFailure("Kronecker factors are not finite", "smaller steps, or more damping")
            (a, Ua), (g, Ug) = torch.linalg.eigh(A), torch.linalg.eigh(G)
            values = g.clamp_min(0.0)[:, :, None] * a.clamp_min(0.0)[:, None, :]
            found.append((values, Ua.contiguous(), Ug.contiguous(), Ua.mT.contiguous(), Ug.mT.contiguous()))
        return found

    def solve(self, parts: Sequence[Tensor], damping: float | Sequence[float]) -> list[Tensor]:
        """(G (x) A + damping)^-1 V of each group.

        Args:
            parts: V, (blocks, m, n) of each group.
            damping: > 0, one for all, or one a group.

        Raises:
            SolveFailure: factors that are not finite.
        """
        dampings = [damping] * len(parts) if isinstance(damping, float) else damping
        found = []
        for V, (values, Ua, Ug, Ua_t, Ug_t), shift in zip(parts, self._eigen, dampings):
            inner = torch.bmm(torch.bmm(Ug_t, V), Ua).div_(values + shift)
            found.append(torch.bmm(torch.bmm(Ug, inner), Ua_t))
        return found
