"""Kronecker factors: block diagonal matrices G (x) A, their damped inverses, as a PC of PETSc and as a metric.

The curvature of a layer with weights V, (outputs, inputs), is about G (x) A with A = E aa' of its inputs a and
G = E gg' of the derivatives g of the loss by its outputs: (G (x) A) vec V = vec(G V A) (J. Martens, R. Grosse,
Optimizing neural networks with Kronecker-factored approximate curvature, ICML 2015).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from petsc4py import PETSc
from torch import Tensor

from pdeopt.core.arrays import assign, copy
from pdeopt.core.errors import InputError, SolveFailure
from pdeopt.functions.metrics import FixedMetric
from pdeopt.precond.base import Preconditioner

#: Eigenvalues below this share of the largest count as zero, and those that rounding alone may have made.
NULL = 1e-15


class KroneckerBlocks:
    """The symmetric positive semidefinite matrix diag_b(G_b (x) A_b) of flat vectors.

    Vectors have the blocks in a row, each the rows of a matrix V (m, n): `apply` gives G V A. A block whose A is (1, 1)
    is a dense matrix G.

    Args:
        A: symmetric, (n, n) each.
        G: symmetric, (m, m) each; as many.

    Attributes:
        shapes: (m, n) of each block.
        sizes: m n.
        size: of vectors.

    Raises:
        InputError: factors that are not square, or not as many.

    Example:
        >>> blocks = KroneckerBlocks([A], [G])
        >>> blocks.inverse(damping=1e-2).apply(gradient)
    """

    def __init__(self, A: Sequence[Tensor], G: Sequence[Tensor]) -> None:
        square = all(factor.dim() == 2 and factor.shape[0] == factor.shape[1] for factor in (*A, *G))
        if len(A) != len(G) or not square:
            got = ", ".join(str(tuple(factor.shape)) for factor in (*A, *G))
            raise InputError("Kronecker factors", f"{len(A)} and {len(G)}: {got}", "square ones, as many A as G")
        self.A, self.G = list(A), list(G)
        self.shapes = [(len(g), len(a)) for a, g in zip(A, G)]
        self.sizes = [m * n for m, n in self.shapes]
        self.size = sum(self.sizes)

    def apply(self, v: Tensor) -> Tensor:
        """diag(G (x) A) v, (size,)."""
        return self._join([g @ V @ a for a, g, V in zip(self.A, self.G, self._split(v))])

    def damped(self, damping: float) -> KroneckerBlocks:
        """The blocks (G + sqrt(damping)/pi I) (x) (A + pi sqrt(damping) I), which are about G (x) A + damping I.

        pi^2 = (tr A / n) / (tr G / m) makes the bound of the difference least (Martens and Grosse, section 6.3). A
        dense block becomes G + damping / A.

        Args:
            damping: >= 0.
        """
        pairs = [_damp(a, g, damping) for a, g in zip(self.A, self.G)]
        return KroneckerBlocks([a for a, _ in pairs], [g for _, g in pairs])

    def inverse(self, damping: float = 0.0) -> KroneckerBlocks:
        """The inverse of `damped`, of the same kind; of singular factors, the pseudo-inverse.

        Eigenvalues that are negative, or below 1e-15 or the rounding of the largest, are dropped: a component that the
        curvature knows nothing of is left out, not amplified.

        Args:
            damping: >= 0.

        Raises:
            SolveFailure: factors that are not finite.
        """
        damped = self.damped(damping) if damping else self
        return KroneckerBlocks([inverse_factor(a) for a in damped.A], [inverse_factor(g) for g in damped.G])

    def solve(self, v: Tensor, damping: float = 0.0, exact: bool = False) -> Tensor:
        """The damped inverse times v, (size,).

        Args:
            v: (size,).
            damping: >= 0.
            exact: (G (x) A + damping I)^-1 by eigenvectors, instead of the pi rule.

        Raises:
            SolveFailure: factors that are not finite.
        """
        if not exact:
            return self.inverse(damping).apply(v)
        found = []
        for ((a, Ua), (g, Ug)), V in zip(self._eigen, self._split(v)):
            values = g[:, None] * a + damping
            inverse = torch.where(values > NULL * values.max().clamp_min(1e-300), 1.0 / values, 0.0)
            found.append((Ug @ (inverse * (Ug.T @ V.to(Ug) @ Ua)) @ Ua.T).to(V))
        return self._join(found)

    @cached_property
    def _eigen(self) -> list[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
        """Eigenvalues, those that are dropped as 0, and eigenvectors of A and G."""
        return [(_spectrum(a), _spectrum(g)) for a, g in zip(self.A, self.G)]

    def _split(self, v: Tensor) -> list[Tensor]:
        if v.shape != (self.size,):
            raise InputError("vector of Kronecker blocks", tuple(v.shape), f"({self.size},)")
        return [part.reshape(shape) for part, shape in zip(v.split(self.sizes), self.shapes)]

    def _join(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.reshape(-1) for part in parts]) if parts else torch.zeros(0)


class KroneckerPC(Preconditioner):
    """The damped inverse of Kronecker blocks, as the context of a PC of type `python`; on one rank.

    Args:
        blocks: whose size is that of the matrix.
        damping: >= 0.

    Example:
        >>> ksp.getPC().setType("python")
        >>> ksp.getPC().setPythonContext(KroneckerPC(blocks, damping=1e-2))
    """

    def __init__(self, blocks: KroneckerBlocks, damping: float = 0.0) -> None:
        self.blocks, self.damping = blocks, damping

    def update(self, pc: PETSc.PC) -> None:
        size = pc.getOperators()[1].getSize()[0]
        if size != self.blocks.size or pc.getComm().getSize() > 1:
            got = f"{self.blocks.size} for a matrix of {size} on {pc.getComm().getSize()} ranks"
            raise InputError("size of Kronecker blocks", got, "that of the matrix, on one rank")
        self._inverse = self.blocks.inverse(self.damping)

    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        vector = copy(x)
        like = next(iter(self._inverse.A), vector)
        assign(y, self._inverse.apply(vector.to(like)).to(vector))


class KroneckerMetric(FixedMetric):
    """The inner product of damped Kronecker blocks, u.(G (x) A)v, and its Riesz map.

    With A = L L' and G = K K' its coordinates are R V = K'V L. Of singular factors, components that they know nothing
    of have no length, and stay as they are.

    Args:
        blocks: of the matrix.
        damping: > 0 where factors are singular: else it is a seminorm.
        order: place in the vectors of each entry of the blocks, int64, (size,); by default the same.

    Example:
        >>> metric = KroneckerMetric(blocks, 1e-2)
        >>> step = -metric.solve(gradient)                # steepest descent in this metric
    """

    def __init__(self, blocks: KroneckerBlocks, damping: float = 0.0, order: Tensor | None = None) -> None:
        self._blocks = blocks.damped(damping) if damping else blocks
        self._order = torch.arange(blocks.size) if order is None else order

    def multiply(self, v: Tensor) -> Tensor:
        """The matrix times v, (size,)."""
        return self._times(self._blocks, v)

    def solve(self, g: Tensor) -> Tensor:
        """Its inverse times a gradient, (size,): the Riesz representative."""
        return self._times(self._inverse, g)

    def norm(self, v: Tensor) -> float:
        """sqrt(v.(G (x) A)v)."""
        return math.sqrt(max(float(v @ self.multiply(v)), 0.0))

    def dual_norm(self, g: Tensor) -> float:
        """sqrt(g.(G (x) A)^-1 g) of a gradient."""
        return math.sqrt(max(float(g @ self.solve(g)), 0.0))

    def root(self, v: Tensor) -> Tensor:
        return self._times(self._roots[0], v)

    def root_solve(self, w: Tensor) -> Tensor:
        return self._times(_transposed(self._roots[1]), w)

    def adjoint(self, w: Tensor) -> Tensor:
        return self._times(_transposed(self._roots[0]), w)

    def adjoint_solve(self, g: Tensor) -> Tensor:
        return self._times(self._roots[1], g)

    def local(self, indices: Tensor) -> KroneckerMetric:
        places = torch.full((self._blocks.size,), -1)
        places[indices] = torch.arange(len(indices))
        orders = places[self._order].split(self._blocks.sizes)
        if any(bool((own < 0).any()) and bool((own >= 0).any()) for own in orders):
            raise InputError("part of the unknowns with a metric", "a part of a layer", "whole layers")
        own = [k for k, order in enumerate(orders) if bool((order >= 0).all())]
        found = KroneckerMetric(_some(self._blocks, own), 0.0, torch.cat([orders[k] for k in own]))
        root, inverse = self._roots
        found._roots = _some(root, own), _some(inverse, own)
        return found

    def _times(self, blocks: KroneckerBlocks, v: Tensor) -> Tensor:
        found = torch.empty_like(v)
        found[self._order] = blocks.apply(v[self._order])
        return found

    @cached_property
    def _inverse(self) -> KroneckerBlocks:
        return self._blocks.inverse()

    @cached_property
    def _roots(self) -> tuple[KroneckerBlocks, KroneckerBlocks]:
        """K'V L, and K^-1 V L^-T."""
        A, G = ([root_factor(each) for each in factors] for factors in (self._blocks.A, self._blocks.G))
        root = KroneckerBlocks([L for L, _ in A], [K.T for K, _ in G])
        return root, KroneckerBlocks([L.T for _, L in A], [K for _, K in G])


def _some(blocks: KroneckerBlocks, own: Sequence[int]) -> KroneckerBlocks:
    return KroneckerBlocks([blocks.A[k] for k in own], [blocks.G[k] for k in own])


def _transposed(blocks: KroneckerBlocks) -> KroneckerBlocks:
    return KroneckerBlocks([a.T for a in blocks.A], [g.T for g in blocks.G])


def root_factor(factor: Tensor) -> tuple[Tensor, Tensor]:
    """L with L L' the positive part of a symmetric matrix, and the inverse of L, or its pseudo-inverse.

    Args:
        factor: (n, n).

    Raises:
        SolveFailure: entries that are not finite.
    """
    lower = _cholesky(factor)
    if lower is not None:
        eye = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        return lower, torch.linalg.solve_triangular(lower, eye, upper=False)
    values, vectors = _spectrum(factor)
    roots = values.sqrt()
    return (vectors * roots).to(factor), (vectors * torch.where(roots > 0.0, 1.0 / roots, 0.0)).T.to(factor)


def inverse_factor(factor: Tensor) -> Tensor:
    """The inverse of a symmetric positive definite matrix, or the pseudo-inverse of its positive part.

    Args:
        factor: (n, n).

    Raises:
        SolveFailure: entries that are not finite.
    """
    if len(factor) == 1 and float(factor) > 0.0 and math.isfinite(float(factor)):
        return 1.0 / factor
    if (lower := _cholesky(factor)) is not None:
        return torch.cholesky_inverse(lower).contiguous()  # by rows, as after a restart
    values, vectors = _spectrum(factor)
    inverse = torch.where(values > 0.0, 1.0 / values, 0.0)
    return ((vectors * inverse) @ vectors.T).to(factor)


def _cholesky(factor: Tensor) -> Tensor | None:
    """The Cholesky factor of a matrix that is definite beyond rounding; None of others."""
    lower, info = torch.linalg.cholesky_ex(factor)
    pivots = lower.diagonal().square()
    rounding = len(factor) * torch.finfo(factor.dtype).eps
    return lower if int(info) == 0 and bool(pivots.min() > rounding * pivots.max()) else None


def _spectrum(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues in double precision, 0 where they are dropped, and eigenvectors in columns."""
    if not bool(factor.isfinite().all()):
        raise SolveFailure("Kronecker factors are not finite", "smaller steps, or more damping")
    values, vectors = torch.linalg.eigh(factor.double())
    least = max(NULL, len(factor) * torch.finfo(factor.dtype).eps) * values[-1].clamp_min(0.0)
    return torch.where(values > least, values, 0.0), vectors


def _damp(a: Tensor, g: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    if len(a) == 1:
        scale = max(float(a), 0.0) or 1.0
        return torch.full_like(a, scale), _shifted(g if float(a) > 0.0 else torch.zeros_like(g), damping / scale)
    mean_a, mean_g = float(a.diagonal().mean()), float(g.diagonal().mean())
    ratio = math.sqrt(mean_a / mean_g) if mean_a > 0.0 and mean_g > 0.0 else 1.0
    root = math.sqrt(damping)
    return _shifted(a, ratio * root), _shifted(g, root / ratio)


def _shifted(matrix: Tensor, shift: float) -> Tensor:
    matrix = matrix.clone()
    matrix.diagonal().add_(shift)
    return matrix
