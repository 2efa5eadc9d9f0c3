"""The split variables of some samples, and the exact minimizer of each: states, inputs of activations, outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nn_adapters.splitting.proximal import Loss
from nn_adapters.splitting.splitlayers import SplitLayer
from pdeopt.core.errors import SolveFailure
from pdeopt.optimize.splitting import SplitWork


class SplitStates:
    """z_k, the inputs of the activations, a_k, the states after them, and lambda, for samples of one rank.

    With m_k = W_k [a_{k-1}; 1] they and the weights make the augmented Lagrangian

        L = loss(z_L) + <lambda, z_L - m_L> + sum_{k<=L} beta_k |z_k - m_k|^2
                                            + sum_{k<L} gamma_k |a_k - skip a_{k-1} - step h(z_k)|^2,

    of which `update_state` and `update_input` find the minimum over one block.

    Args:
        layers: of the network, L of them.
        W: their weights, a list that the caller changes.
        loss: of the outputs.
        penalties: beta_k for k = 1 ... L and gamma_k for k = 1 ... L - 1; entry 0 of either is not used.
        work: where multiplications are counted.
        x, y: samples, (samples, inputs), and classes or targets. A forward pass gives the first states.

    Attributes:
        a, z: states and inputs by layers; a[0] is x, z[0] is empty.
        start: both as the forward pass gave them.
        multiplier: lambda, of the shape of z[L].
    """

    def __init__(
        self,
        layers: Sequence[SplitLayer],
        W: list[Tensor],
        loss: Loss,
        penalties: tuple[Sequence[float], Sequence[float]],
        work: SplitWork,
        x: Tensor,
        y: Tensor,
    ) -> None:
        self.layers, self.W, self.loss, self.work, self.y = layers, W, loss, work, y
        self.beta, self.gamma = penalties
        self._mapped: dict[int, Tensor] = {}
        self.a, self.z = [x], [torch.empty(0)]
        for k, layer in enumerate(layers, start=1):
            self.z.append(self.mapped(k))
            if k < len(layers):
                self.a.append(layer.after(self.a[k - 1], self.z[k]))
        self.start = list(self.a), list(self.z)
        self.multiplier = torch.zeros_like(self.z[-1])

    def mapped(self, k: int) -> Tensor:
        """m_k = W_k [a_{k-1}; 1], (samples, outputs); kept until a_{k-1} or W_k changes."""
        if k not in self._mapped:
            layer, W, before = self.layers[k - 1], self.W[k - 1], self.a[k - 1]
            bias = None if layer.linear.bias is None else W[:, -1]
            self._mapped[k] = nn.functional.linear(before, W[:, : layer.linear.in_features], bias)
            self.work.products += len(before) * W.numel()
        return self._mapped[k]

    def forget(self, k: int | None = None) -> None:
        """Say that W_k or a_{k-1} has changed; by default all."""
        if k is None:
            self._mapped.clear()
        else:
            self._mapped.pop(k, None)

    def update_state(self, k: int) -> None:
        """a_k, the minimum of a quadratic function with one matrix for all samples:

        (beta W'W + gamma + gamma_after) (new - a) = W'(beta (z - m) + lambda/2) + gamma (target - a)
                                                     + gamma_after (a_after - after(a)),

        where W, beta, z, m are of the layer after, gamma_after is of its skip, and lambda of the last layer.
        """
        after, beta, penalty = self.layers[k], self.beta[k + 1], self.gamma[k]
        W = self.W[k][:, : after.linear.in_features]
        residual = beta * (self.z[k + 1] - self.mapped(k + 1))
        if k + 1 == len(self.layers):
            residual = residual + 0.5 * self.multiplier
        target = self.layers[k - 1].after(self.a[k - 1], self.z[k])
        right = torch.addmm(target - self.a[k], residual, W, beta=penalty)
        if after.skip:
            right = right + self.gamma[k + 1] * (self.a[k + 1] - after.after(self.a[k], self.z[k + 1]))
            penalty = penalty + self.gamma[k + 1]
        self.a[k] = finite(self.a[k] + self._damped(W, beta, penalty, right))
        self._mapped.pop(k + 1, None)

    def update_input(self, k: int) -> None:
        """z_k by the proximal map of the activation, or of the loss."""
        m = self.mapped(k)
        if k == len(self.layers):
            z = self.loss.proximal(m - self.multiplier / (2 * self.beta[k]), self.y, self.beta[k])
        else:
            layer = self.layers[k - 1]
            a = (self.a[k] - layer.skip * self.a[k - 1]) / layer.step if layer.skip else self.a[k]
            z = layer.activation.proximal(m, a, self.beta[k], layer.step**2 * self.gamma[k])
        self.z[k] = finite(z)

    def lagrangian(self) -> float:
        """L, the sum over the samples."""
        total = float(self.loss.value(self.z[-1], self.y).sum())
        total += float((self.multiplier * (self.z[-1] - self.mapped(len(self.layers)))).sum())
        for k, layer in enumerate(self.layers, start=1):
            total += self.beta[k] * float((self.z[k] - self.mapped(k)).square().sum())
            if k < len(self.layers):
                total += self.gamma[k] * float((self.a[k] - layer.after(self.a[k - 1], self.z[k])).square().sum())
        return total

    def _damped(self, W: Tensor, beta: float, penalty: float, right: Tensor) -> Tensor:
        """Rows of `right` times (beta W'W + penalty)^-1, by the smaller of the matrices W'W and WW'."""
        outputs, inputs = W.shape
        small = outputs < inputs  # then by the formula of Woodbury
        matrix = W @ W.T if small else W.T @ W
        matrix.diagonal().add_(penalty / beta)
        factor = torch.linalg.cholesky_ex(matrix).L
        self.work.products += len(matrix) * W.numel() + (1 + 2 * small) * len(right) * W.numel()
        self.work.solves += len(matrix) ** 3 / 3 + len(right) * len(matrix) ** 2
        if small:
            return (right - torch.cholesky_solve((right @ W.T).T, factor).T @ W) / penalty
        return torch.cholesky_solve(right.T, factor).T / beta


def finite(values: Tensor) -> Tensor:
    """The values, or `SolveFailure` where one of them is NaN or infinite."""
    if not bool(torch.isfinite(values).all()):
        raise SolveFailure("numbers that are not finite", "a smaller -split_step, or larger -split_ridge")
    return values
