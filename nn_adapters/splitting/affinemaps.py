"""Affine maps of layers, W [p; 1] on parts p of a state: what training by splitting asks of them.

A dense layer takes the state as one part. A convolution takes patches, one at each position of its kernel, so that its
weights are found by the same least squares, over samples and positions. Averages over squares may stand in front.

With T the linear part of a map, the update of the state before it has the matrix beta T'T + gamma.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pdeopt.core.errors import InputError, SolveFailure
from pdeopt.optimize.splitting import SplitWork
from pdeopt.squares.gram import add_gram, factor_work

#: What a matrix solves.
Solver = Callable[[Tensor], Tensor]

#: Products with T'T that a solve may take.
MAX_PRODUCTS = 1000


class AffineMap(ABC):
    """m = W [p; 1] for all parts p of a state, with the same W, which is the weight of a module and its bias.

    Attributes:
        module: that has the weights.
    """

    module: nn.Module

    @property
    def weight(self) -> Tensor:
        """The weight of the module."""
        return self.module.weight  # type: ignore[return-value]

    @property
    def inputs(self) -> int:
        """Entries of [p; 1], or of p where the module has no bias."""
        return self.weight[0].numel() + (self.module.bias is not None)

    @property
    def outputs(self) -> int:
        """Entries of W [p; 1]."""
        return len(self.weight)

    @abstractmethod
    def parts(self, a: Tensor) -> Tensor:
        """All p of states (samples, ...), (samples * positions, entries)."""

    @abstractmethod
    def apply(self, W: Tensor, a: Tensor) -> Tensor:
        """m of states (samples, ...): (samples, outputs), or (samples, outputs, height, width)."""

    @abstractmethod
    def transpose(self, W: Tensor, m: Tensor, shape: Sequence[int]) -> Tensor:
        """T'm for states of a shape (samples, ...)."""

    @abstractmethod
    def solver(self, W: Tensor, beta: float, gamma: float, work: SplitWork) -> Solver:
        """(beta T'T + gamma)^-1 for right-hand sides of the shape of states; counts what it takes."""

    @abstractmethod
    def shape_after(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of m for one state of a shape; `InputError` where that does not fit."""

    def rows(self, a: Tensor) -> Tensor:
        """All [p; 1] of states, (samples * positions, inputs)."""
        p = self.parts(a)
        return p if self.module.bias is None else torch.cat([p, p.new_ones(len(p), 1)], dim=1)

    def matrix(self, W: Tensor) -> Tensor:
        """W without the column of the bias."""
        return W[:, : self.weight[0].numel()]

    def bias(self, W: Tensor) -> Tensor | None:
        """The column of the bias, if there is one."""
        return None if self.module.bias is None else W[:, -1]

    def read(self) -> Tensor:
        """W with the bias as last column, (outputs, inputs); a copy."""
        bias = [] if self.module.bias is None else [self.module.bias[:, None]]
        return torch.cat([part.detach() for part in (self.weight.flatten(1), *bias)], dim=1).clone()

    @torch.no_grad()
    def write(self, W: Tensor) -> None:
        """Give the module these weights."""
        self.weight.copy_(self.matrix(W).reshape(self.weight.shape))
        if self.module.bias is not None:
            self.module.bias.copy_(W[:, -1])


@dataclass(frozen=True)
class Dense(AffineMap):
    """W [a; 1] for a state a of any shape.

    Args:
        module: with weight (outputs, entries of a state).
    """

    module: nn.Linear

    def parts(self, a: Tensor) -> Tensor:
        return a.flatten(1)

    def apply(self, W: Tensor, a: Tensor) -> Tensor:
        return F.linear(a.flatten(1), self.matrix(W), self.bias(W))

    def transpose(self, W: Tensor, m: Tensor, shape: Sequence[int]) -> Tensor:
        return (m @ self.matrix(W)).reshape(*shape)

    def solver(self, W: Tensor, beta: float, gamma: float, work: SplitWork) -> Solver:
        solve = solver_of_rows(self.matrix(W), beta, gamma, work)
        return lambda right: solve(right.flatten(1)).reshape(right.shape)

    def shape_after(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        entries = torch.Size(shape).numel()
        if entries != self.module.in_features:
            raise InputError(f"layers that fit: entries of a sample before {self.module}", entries, "as many as it has")
        return (self.module.out_features,)


@dataclass(frozen=True)
class Convolution(AffineMap):
    """A convolution of images (samples, channels, height, width); W is (channels after, channels * kernel + 1).

    Solves are exact, with one small matrix, where the patches do not overlap; else by conjugate gradients, each sample
    until its residual has fallen by `rtol`. Where they start at zero they end below it, at any tolerance.

    Args:
        module: without groups and dilation, padded by zeros.
        rtol: of solves. An update solves for the change of a state, so that rtol does not limit its accuracy; tighter
            solves took twice the time on MNIST, for the same weights to 0.1 points of accuracy.

    Raises:
        InputError: another convolution.
    """

    module: nn.Conv2d
    rtol: float = 1e-1

    def __post_init__(self) -> None:
        conv = self.module
        if conv.groups != 1 or set(conv.dilation) != {1} or conv.padding_mode != "zeros":
            raise InputError("convolution to split", conv, "groups 1, dilation 1, padding by zeros")
        if conv.padding == "same" and not all(size % 2 for size in conv.kernel_size):
            raise InputError("convolution to split", conv, "an odd kernel with padding 'same'")

    @property
    def padding(self) -> tuple[int, ...]:
        """Zeros at each end of height and width."""
        padding, kernel = self.module.padding, self.module.kernel_size
        if isinstance(padding, str):
            return tuple(size // 2 if padding == "same" else 0 for size in kernel)
        return padding

    def parts(self, a: Tensor) -> Tensor:
        return self._patches(a).transpose(1, 2).flatten(0, 1)

    def apply(self, W: Tensor, a: Tensor) -> Tensor:
        return F.conv2d(a, self._kernel(W), self.bias(W), self.module.stride, self.padding)

    def transpose(self, W: Tensor, m: Tensor, shape: Sequence[int]) -> Tensor:
        stride, padding, kernel = self.module.stride, self.padding, self.module.kernel_size
        rest = [
            size - ((n - 1) * s - 2 * p + k)
            for size, n, s, p, k in zip(shape[2:], m.shape[2:], stride, padding, kernel)
        ]
        return F.conv_transpose2d(m, self._kernel(W), None, stride, padding, rest)

    def solver(self, W: Tensor, beta: float, gamma: float, work: SplitWork) -> Solver:
        if self.module.kernel_size == self.module.stride and not any(self.padding):
            return self._solver_of_patches(W, beta, gamma, work)
        kernel = self._kernel(W)

        def product(a: Tensor) -> Tensor:
            m = F.conv2d(a, kernel, None, self.module.stride, self.padding)
            work.products += 2 * m.numel() * kernel[0].numel()
            return torch.add(beta * self.transpose(W, m, a.shape), a, alpha=gamma)

        return lambda right: conjugate_gradients(product, right, self.rtol)

    def shape_after(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        conv, padding = self.module, self.padding
        if len(shape) != 3 or shape[0] != conv.in_channels:
            raise InputError(f"layers that fit: shape before {conv}", shape, f"({conv.in_channels}, height, width)")
        sizes = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(shape[1:], padding, conv.kernel_size, conv.stride)]
        if min(sizes) < 1:
            raise InputError(f"layers that fit: shape before {conv}", shape, "images as large as the kernel")
        return (conv.out_channels, *sizes)

    def _solver_of_patches(self, W: Tensor, beta: float, gamma: float, work: SplitWork) -> Solver:
        """Where each patch has entries of its own; on what is in no patch the matrix is gamma."""
        conv, of_rows = self.module, solver_of_rows(self.matrix(W), beta, gamma, work)

        def inner(patches: Tensor) -> Tensor:
            rows = patches.transpose(1, 2)
            return of_rows(rows.flatten(0, 1)).reshape(rows.shape).transpose(1, 2)

        def solve(right: Tensor) -> Tensor:
            def back(patches: Tensor) -> Tensor:
                return F.fold(patches, right.shape[2:], conv.kernel_size, stride=conv.stride)

            return _solve_through(self._patches, back, 1.0, gamma, inner, right)

        return solve

    def _patches(self, a: Tensor) -> Tensor:
        """(samples, entries, positions)."""
        return F.unfold(a, self.module.kernel_size, padding=self.padding, stride=self.module.stride)

    def _kernel(self, W: Tensor) -> Tensor:
        return self.matrix(W).reshape(self.weight.shape)


@dataclass(frozen=True)
class Averaged(AffineMap):
    """Another map, after averages over squares of an image that do not overlap.

    Args:
        map: what takes the averages.
        size: height and width of the squares.
    """

    map: AffineMap
    size: tuple[int, int]

    @property
    def module(self) -> nn.Module:  # type: ignore[override]
        return self.map.module

    def parts(self, a: Tensor) -> Tensor:
        return self.map.parts(self._average(a))

    def apply(self, W: Tensor, a: Tensor) -> Tensor:
        return self.map.apply(W, self._average(a))

    def transpose(self, W: Tensor, m: Tensor, shape: Sequence[int]) -> Tensor:
        small = [*shape[:2], *(n // size for n, size in zip(shape[2:], self.size))]
        return self._spread(self.map.transpose(W, m, small), shape)

    def solver(self, W: Tensor, beta: float, gamma: float, work: SplitWork) -> Solver:
        scale = 1.0 / (self.size[0] * self.size[1])
        inner = self.map.solver(W, beta * scale, gamma, work)

        def solve(right: Tensor) -> Tensor:
            def back(small: Tensor) -> Tensor:
                return self._spread(small, right.shape)

            return _solve_through(self._average, back, scale, gamma, inner, right)

        return solve

    def shape_after(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if len(shape) != 3 or min(n // size for n, size in zip(shape[1:], self.size)) < 1:
            raise InputError(
                f"layers that fit: shape before averages over {self.size}", shape, "(channels, height, width)"
            )
        return self.map.shape_after((shape[0], *(n // size for n, size in zip(shape[1:], self.size))))

    def _average(self, a: Tensor) -> Tensor:
        return F.avg_pool2d(a, self.size)

    def _spread(self, small: Tensor, shape: Sequence[int]) -> Tensor:
        """The transpose of `_average`."""
        high, wide = self.size
        large = small.repeat_interleave(high, 2).repeat_interleave(wide, 3) / (high * wide)
        return F.pad(large, (0, shape[3] - large.shape[3], 0, shape[2] - large.shape[2]))


def _solve_through(
    P: Callable[[Tensor], Tensor],
    P_transposed: Callable[[Tensor], Tensor],
    scale: float,
    gamma: float,
    solve: Callable[[Tensor], Tensor],
    right: Tensor,
) -> Tensor:
    """(beta P'T'TP + gamma)^-1 right for PP' = scale, by `solve` for beta scale T'T + gamma."""
    small = P(right)
    return right / gamma + P_transposed(solve(small) - small / gamma) / scale


def solver_of_rows(W: Tensor, beta: float, gamma: float, work: SplitWork) -> Solver:
    """(beta W'W + gamma)^-1 for rows of right-hand sides, by the smaller of the matrices W'W and WW'.

    Raises:
        SolveFailure: gamma is lost in the rounding of beta W'W, or W is not finite.
    """
    outputs, inputs = W.shape
    small = outputs < inputs  # then by the formula of Woodbury
    factor = W.new_zeros(min(W.shape), min(W.shape))
    add_gram(factor, W.T if small else W)
    factor.diagonal().add_(gamma / beta)
    factor, info = torch.linalg.cholesky_ex(factor)
    if int(info):
        what = f"states: beta W'W + gamma is singular to rounding, beta {beta:g}, gamma {gamma:g}"
        raise SolveFailure(what, "penalties that differ less, or double precision")
    work.products += len(factor) * (len(factor) + 1) / 2 * max(W.shape)
    work.solves += factor_work(len(factor))

    def solve(right: Tensor) -> Tensor:
        work.products += 2 * small * len(right) * W.numel()
        work.solves += len(right) * len(factor) ** 2
        if small:
            return (right - torch.cholesky_solve((right @ W.T).T, factor).T @ W) / gamma
        return torch.cholesky_solve(right.T, factor).T / beta

    return solve


def conjugate_gradients(product: Callable[[Tensor], Tensor], right: Tensor, rtol: float) -> Tensor:
    """x with product(x) = right, for each sample (row) a positive definite system of its own.

    A sample rests when its residual has fallen by rtol; what is found for it depends on no other. For vectors over
    ranks there are PETSc's solvers; these are thousands of small systems with one operator.

    Raises:
        SolveFailure: numbers that are not finite, or `MAX_PRODUCTS` are not enough.
    """

    def inner(one: Tensor, other: Tensor) -> Tensor:
        return (one * other).flatten(1).sum(1)[:, None, None, None]

    x, r, p = torch.zeros_like(right), right, right
    rr = finite(inner(r, r))
    goal = rtol**2 * rr
    for _ in range(MAX_PRODUCTS):
        active = rr > goal
        if not bool(active.any()):
            return x
        q = product(p)
        step = torch.where(active, rr / inner(p, q), 0.0)
        x, r = x + step * p, r - step * q
        new = finite(inner(r, r))
        p = r + torch.where(active, new / rr, 0.0) * p
        rr = new
    raise SolveFailure(
        f"states: {MAX_PRODUCTS} products do not solve for them", "a larger -split_ridge or -split_gamma"
    )


def finite(values: Tensor) -> Tensor:
    """The values, or `SolveFailure` where one of them is NaN or infinite."""
    if not bool(torch.isfinite(values).all()):
        raise SolveFailure("numbers that are not finite", "a smaller -split_step, or larger -split_ridge")
    return values
