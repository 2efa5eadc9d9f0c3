"""The split variables of some samples, and the exact minimizer of each: states, inputs of activations, outputs."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from nn_adapters.splitting.affinemaps import Solver, finite
from nn_adapters.splitting.proximal import Loss
from nn_adapters.splitting.splitlayers import SplitLayer
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
        x, y: samples, (samples, ...), and classes or targets. A forward pass gives the first states.

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
        """m_k = W_k [a_{k-1}; 1], (samples, ...); kept until a_{k-1} or W_k changes."""
        if k not in self._mapped:
            m = self.layers[k - 1].map.apply(self.W[k - 1], self.a[k - 1])
            self._mapped[k] = m
            self.work.products += m.numel() * self.W[k - 1].shape[1]
        return self._mapped[k]

    def forget(self, k: int | None = None) -> None:
        """Say that W_k or a_{k-1} has changed; by default all."""
        if k is None:
            self._mapped.clear()
        else:
            self._mapped.pop(k, None)

    def part(self, rows: slice) -> SplitStates:
        """Some of the samples, their numbers in the memory of these; a block that is updated there gets its own."""
        part = copy(self)
        part.a, part.z = [a[rows] for a in self.a], [z[rows] for z in self.z]
        part.y, part.multiplier, part._mapped = self.y[rows], self.multiplier[rows], {}
        return part

    def solver(self, k: int) -> Solver:
        """The matrix of `update_state` for a_k, the same for all samples."""
        after, penalty = self.layers[k], self.gamma[k] + (self.gamma[k + 1] if self.layers[k].skip else 0.0)
        return after.map.solver(self.W[k], self.beta[k + 1], penalty, self.work)

    def update_state(self, k: int, solver: Solver | None = None) -> None:
        """a_k, the minimum of a quadratic function with one matrix for all samples:

        (beta T'T + gamma + gamma_after) (new - a) = T'(beta (z - m) + lambda/2) + gamma (target - a)
                                                     + gamma_after (a_after - after(a)),

        where T (W, or a convolution), beta, z, m are of the layer after, gamma_after is of its skip, and lambda of the
        last layer; `solver(k)` has the matrix, where it is at hand.
        """
        after, W, beta, penalty = self.layers[k], self.W[k], self.beta[k + 1], self.gamma[k]
        solver = solver or self.solver(k)
        residual = beta * (self.z[k + 1] - self.mapped(k + 1))
        if k + 1 == len(self.layers):
            residual = residual + 0.5 * self.multiplier
        target = self.layers[k - 1].after(self.a[k - 1], self.z[k])
        right = after.map.transpose(W, residual, target.shape).add_(target - self.a[k], alpha=penalty)
        self.work.products += residual.numel() * W.shape[1]
        if after.skip:
            missing = self.a[k + 1] - after.after(self.a[k], self.z[k + 1])
            right = right + self.gamma[k + 1] * missing.reshape(right.shape)
        self.a[k] = finite(self.a[k] + solver(right))
        self._mapped.pop(k + 1, None)

    def update_input(self, k: int) -> None:
        """z_k by the proximal map of the activation, or of the loss."""
        m = self.mapped(k)
        if k == len(self.layers):
            z = self.loss.proximal(m - self.multiplier / (2 * self.beta[k]), self.y, self.beta[k])
        else:
            layer, a = self.layers[k - 1], self.a[k]
            if layer.skip:
                a = (a - layer.skip * self.a[k - 1].reshape(m.shape)) / layer.step
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
