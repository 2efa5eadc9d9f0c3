"""LSGD: gradient steps for the hidden layers, in turn with an exact least-squares solve for the last, linear layer.

The features of the hidden layers are a basis, the last layer holds the coefficients of the best approximation in
it (E. C. Cyr, M. A. Gulian, R. G. Patel, M. Perego, N. A. Trask, Robust training and initialization of deep neural
networks: An adaptive basis viewpoint, 2020, Algorithm 3).

    head = nn.Linear(16, 1)
    losses = lsgd(hidden, head, x, y, steps=200, lr=1e-3)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pdeopt.core.errors import InputError, SolveFailure

#: Samples whose features are in memory at a time.
CHUNK = 65536


def least_squares(
    features: Tensor,
    targets: Tensor,
    ridge: float = 0.0,
    rtol: float | None = None,
    comm: Any = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """W and b that minimize 1/n sum_s |W x_s + b - y_s|^2 + ridge (|W|^2 + |b|^2); of several, those of least norm.

    See `Triangle` for the method.

    Args:
        features: x, (n, in).
        targets: y, (n, out) or (n,).
        ridge: Tikhonov parameter.
        rtol: singular values below rtol times the largest count as zero; by default the rounding of the features.
        comm: mpi4py communicator over whose ranks the samples are spread; the call is then collective. None: all
            samples are here.
        chunk: samples that are factored at a time.

    Returns:
        W (out, in) and b (out,), in the dtype and on the device of the features.

    Raises:
        InputError: shapes or numbers that are not legal, on all ranks.
        SolveFailure: samples that are not finite, on all ranks.
    """
    targets = targets[:, None] if targets.dim() == 1 else targets
    _check_shapes(features, targets, comm)
    _check_numbers(ridge, rtol, chunk)
    triangle = Triangle(features.shape[1], targets.shape[1])
    for x, y in zip(features.split(chunk), targets.split(chunk)):
        triangle.add(x, y)
    weight, bias = triangle.over_ranks(comm).solve(ridge, rtol)
    return weight.to(features), bias.to(features)


class Triangle:
    """All that least squares has to know of its samples: the factor R of [X 1 Y] = Q R, and their number.

    X = Q1 R11 and Y = Q1 R12 + Q2 R22, so |X w - Y|^2 = |R11 w - R12|^2 + |R22|^2 for every w, whatever the rank.
    R is found part by part (TSQR: J. Demmel, L. Grigori, M. Hoemmen, J. Langou, 2012): unlike the normal equations,
    it does not square the condition. The rank is that of R11, by its singular values.

    Args:
        inputs, outputs: columns of X and of Y.
        bias: whether there is a column of ones.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        self.inputs, self.outputs, self.bias = inputs, outputs, bias
        self.samples = 0
        self.eps = torch.finfo(torch.float64).eps
        self.R = torch.zeros(0, inputs + bias + outputs, dtype=torch.float64)

    def add(self, features: Tensor, targets: Tensor) -> None:
        """More samples: X (n, inputs) and Y (n, outputs)."""
        ones = features.new_ones(len(features), int(self.bias))
        rows = torch.cat([part.detach().double() for part in (features, ones, targets)], dim=1)
        self.R = _factor(torch.cat([self.R.to(rows.device), rows]))
        self.samples += len(features)
        self.eps = max(self.eps, torch.finfo(features.dtype).eps)

    def over_ranks(self, comm: Any) -> Triangle:
        """The triangle of the samples of all ranks, equal on all of them to the last bit. Collective."""
        if comm is None:
            return self
        whole = Triangle(self.inputs, self.outputs, self.bias)
        parts = comm.allgather((self.R.cpu().numpy(), self.samples, self.eps))
        whole.R = _factor(torch.cat([torch.from_numpy(R) for R, _, _ in parts]))
        whole.samples = sum(samples for _, samples, _ in parts)
        whole.eps = max(eps for _, _, eps in parts)
        return whole

    def solve(self, ridge: float = 0.0, rtol: float | None = None) -> tuple[Tensor, Tensor]:
        """W (outputs, inputs) and b (outputs,) of `least_squares`, float64.

        Raises:
            InputError: no samples.
            SolveFailure: samples that are not finite.
        """
        if self.samples == 0:
            raise InputError("least squares: samples", 0, ">= 1")
        if not self.R.isfinite().all():
            raise SolveFailure("least squares: the features or targets are not finite", "a smaller learning rate")
        R11, R12 = self._blocks()
        U, s, Vh = torch.linalg.svd(R11 / self.samples**0.5, full_matrices=False)
        if rtol is None:
            rtol = self.eps * max(self.samples, self.inputs)
        keep = s > rtol * s[0]
        inverse = torch.where(keep, s / (s.square() + ridge), 0.0)
        w = Vh.T @ (inverse[:, None] * (U.T @ R12)) / self.samples**0.5
        bias = w[-1] if self.bias else w.new_zeros(self.outputs)
        return w[: self.inputs].T.contiguous(), bias.contiguous()

    def loss(self, weight: Tensor, bias: Tensor | None = None) -> float:
        """Mean over samples and outputs of (W x + b - y)^2."""
        R11, R12 = self._blocks()
        columns = [weight.detach().T]
        if self.bias:
            columns.append(weight.new_zeros(1, self.outputs) if bias is None else bias.detach()[None])
        inside = R11 @ torch.cat(columns).to(R11) - R12
        outside = self.R[len(R11) :, R11.shape[1] :]
        return float(inside.square().sum() + outside.square().sum()) / (self.samples * self.outputs)

    def _blocks(self) -> tuple[Tensor, Tensor]:
        columns = self.inputs + self.bias
        return self.R[:columns, :columns], self.R[:columns, columns:]


class LSGD:
    """The alternation, step by step; `lsgd` is its loop.

    Args:
        hidden: maps x (n, ...) to features (n, in).
        head: the last layer, (n, in) to (n, out). Its parameters are found by least squares alone.
        x, y: the samples, (n, ...) and (n, out) or (n,); with `comm` those of this rank.
        lr: learning rate of Adam, where no optimizer is given.
        optimizer: any of torch's, for the parameters of `hidden`.
        ridge, rtol, comm, chunk: as in `least_squares`. With `comm`, `hidden` must be equal on all ranks; it stays so.

    Raises:
        InputError: a head that is not linear, or shapes or numbers that are not legal, on all ranks.

    Example:
        >>> method = LSGD(hidden, head, x, y, optimizer=torch.optim.SGD(hidden.parameters(), lr=1e-2))
        >>> method.step_hidden()
        >>> loss = method.solve_head()
    """

    def __init__(
        self,
        hidden: nn.Module,
        head: nn.Linear,
        x: Tensor,
        y: Tensor,
        lr: float = 1e-3,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        ridge: float = 0.0,
        rtol: float | None = None,
        comm: Any = None,
        chunk: int = CHUNK,
    ) -> None:
        if not isinstance(head, nn.Linear):
            raise InputError("lsgd: head", type(head).__name__, "Linear")
        if not lr > 0:
            raise InputError("lsgd: lr", lr, "> 0")
        _check_numbers(ridge, rtol, chunk)
        y = y[:, None] if y.dim() == 1 else y
        _check_shapes(x.flatten(1) if x.dim() > 2 else x, y, comm)
        if y.shape[1] != head.out_features:
            raise InputError("lsgd: columns of y", y.shape[1], f"{head.out_features}, the outputs of the head")
        self.hidden, self.head, self.x, self.y = hidden, head, x, y
        self.optimizer = optimizer or torch.optim.Adam(hidden.parameters(), lr=lr)
        self.ridge, self.rtol, self.comm, self.chunk = ridge, rtol, comm, chunk
        self.samples = len(x) if comm is None else comm.allreduce(len(x))

    def solve_head(self) -> float:
        """Give the head its best parameters for the present features. Collective.

        Returns:
            The loss with them, the mean over samples and outputs of the squared error.

        Raises:
            SolveFailure: features that are not finite.
        """
        triangle = Triangle(self.head.in_features, self.head.out_features, self.head.bias is not None)
        with torch.no_grad():
            for x, y in self._chunks():
                triangle.add(self.hidden(x), y)
        triangle = triangle.over_ranks(self.comm)
        weight, bias = triangle.solve(self.ridge, self.rtol)
        with torch.no_grad():
            self.head.weight.copy_(weight)
            if self.head.bias is not None:
                self.head.bias.copy_(bias)
        return triangle.loss(self.head.weight, self.head.bias)

    def step_hidden(self) -> None:
        """One step of the optimizer for the hidden layers, the head held fixed. Collective."""
        self.optimizer.step(self._loss_and_gradient)

    def _loss_and_gradient(self) -> float:
        """The loss; its gradient is left in `.grad` of the hidden layers."""
        self.optimizer.zero_grad()
        weight = self.head.weight.detach()
        bias = None if self.head.bias is None else self.head.bias.detach()
        total = 0.0
        with torch.enable_grad():
            for x, y in self._chunks():
                error = nn.functional.linear(self.hidden(x), weight, bias) - y
                loss = error.square().sum() / (self.samples * y.shape[1])
                loss.backward()
                total += float(loss.detach())
        return total if self.comm is None else self._over_ranks(total)

    def _over_ranks(self, loss: float) -> float:
        parameters = [p for p in self.hidden.parameters() if p.requires_grad]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([g.reshape(-1).cpu().double() for g in gradients] + [torch.tensor([loss]).double()])
        flat = torch.from_numpy(self.comm.allreduce(flat.numpy()))
        for p, g, part in zip(parameters, gradients, flat[:-1].split([p.numel() for p in parameters])):
            p.grad = g.copy_(part.reshape(p.shape))
        return float(flat[-1])

    def _chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.x.split(self.chunk), self.y.split(self.chunk))


def lsgd(
    hidden: nn.Module, head: nn.Linear, x: Tensor, y: Tensor, steps: int, lr: float = 1e-3, **more: Any
) -> list[float]:
    """Fit head(hidden(x)) to y: solve for the head; then, `steps` times, step the hidden layers and solve again.

    Both modules are changed in place. Collective where a communicator is given.

    Source: E. C. Cyr, M. A. Gulian, R. G. Patel, M. Perego, N. A. Trask, Robust training and initialization of deep
    neural networks: An adaptive basis viewpoint, 2020, Algorithm 3.

    Args:
        hidden, head, x, y, lr, more: as for `LSGD`.
        steps: gradient steps.

    Returns:
        steps + 1 losses (mean squared errors), one after each solve.

    Raises:
        InputError: a negative number of steps, or what `LSGD` refuses.
        SolveFailure: the features are no longer finite.

    Example:
        >>> hidden, head = nn.Sequential(nn.Linear(1, 16), nn.Tanh()), nn.Linear(16, 1)
        >>> losses = lsgd(hidden, head, x, y, steps=200, lr=1e-3)
    """
    if steps < 0:
        raise InputError("lsgd: steps", steps, ">= 0")
    method = LSGD(hidden, head, x, y, lr, **more)
    losses = [method.solve_head()]
    for _ in range(steps):
        method.step_hidden()
        losses.append(method.solve_head())
    return losses


def _factor(rows: Tensor) -> Tensor:
    R: Tensor = torch.linalg.qr(rows, mode="r").R
    return R


def _check_shapes(features: Tensor, targets: Tensor, comm: Any) -> None:
    """One number of samples for both, one number of columns on all ranks. Collective."""
    own = (tuple(features.shape), tuple(targets.shape))
    everyone = [own] if comm is None else comm.allgather(own)
    columns = {(x[1:], y[1:]) for x, y in everyone}
    fits = all(len(x) == len(y) == 2 and x[0] == y[0] for x, y in everyone)
    if not fits or len(columns) > 1 or sum(x[0] for x, _ in everyone) == 0:
        got = "; ".join(f"{x} and {y}" for x, y in everyone)
        raise InputError("least squares: shapes", got, "(n, in) and (n, out) or (n,), n >= 1")


def _check_numbers(ridge: float, rtol: float | None, chunk: int) -> None:
    if not ridge >= 0 or not (rtol is None or rtol >= 0) or chunk < 1:
        got = f"{ridge}, {rtol}, {chunk}"
        raise InputError("least squares: ridge, rtol, chunk", got, "ridge >= 0, rtol >= 0 or None, chunk >= 1")
