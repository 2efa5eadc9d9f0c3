"""A network of dense residual layers, with opening and head, as a function with Gauss-Newton products by hand.

States are eliminated, by a sweep through the layers, or they are unknowns beside the weights. Then a point (u, z) has
the defects c_i = u_i - u_{i-1} - dt act(W_i u_{i-1} + b_i), all at once, and its value is that of the linearly restored
last state, u_N + (-T^-1 c)_N: one linear sweep, which is that of the step to come as well. A step moves u by
-T^-1 c + S d, S d from conjugate gradients. All other sweeps are linear, with coefficients that stay for a whole step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from nn_adapters.control.chain import DenseChain, LinearChain
from nn_adapters.control.designcost import DesignCost
from nn_adapters.control.factors import DenseFactors
from nn_adapters.layers.constraint import LayerConstraint
from nn_adapters.layers.densestep import DENSE_ACTIVATIONS, is_dense
from pdeopt.control.controlmap import Jumps
from pdeopt.control.problem import ControlProblem
from pdeopt.functions.curved import EMPTY, Curvature, CurvatureFactors, CurvedFunction, CurvedPoint, Tangent
from pdeopt.functions.smooth import Costs
from pdeopt.lowrank.kroneckerbatches import FactorPair
from pdeopt.steps.mgrit import MgritSettings

#: Prices in evaluations with gradient: of a pass through the layers, a linear sweep, a pass back with the gradients of
#: the weights, a product, and the factors.
FORWARD, SWEEP, BACKWARD, PRODUCT, FACTORS = 0.4, 0.4, 0.6, 1.0, 2.0


def is_affine(module: nn.Module | None) -> bool:
    """Whether a module is a plain `nn.Linear` with all its parameters."""
    is_plain = type(module) is nn.Linear and not (module._forward_hooks or module._forward_pre_hooks)
    return is_plain and module.bias is not None


def fits(problem: ControlProblem, loss: Any) -> bool:
    """Whether the problem is a network of this kind: dense layers, a dense or affine opening or none, an affine head.

    Args:
        problem: the problem.
        loss: its `ScoreLoss`.
    """
    constraint = problem.constraint
    if not isinstance(constraint, LayerConstraint) or loss.fixed_head is not None:
        return False
    if type(problem.control_map) is not (Jumps if constraint.is_smooth else type(None)):
        return False
    opening = constraint.opening
    has_opening = opening is None or is_affine(opening) or is_dense(opening)
    is_flat = constraint.features.dim() == 2 and len(constraint.shape) == 2
    return is_flat and is_dense(constraint.block) and has_opening and is_affine(constraint.head)


@dataclass
class Ends:
    """Opening and head: K, k, H, h; K and k are None where there is no opening."""

    K: Tensor | None
    k: Tensor | None
    H: Tensor
    h: Tensor

    @classmethod
    def of(cls, parts: tuple[list[Tensor], list[Tensor]]) -> Ends:
        """From the parameters of both."""
        (K, k), (H, h) = parts[0] or (None, None), parts[1]
        return cls(K, k, H, h)


class DenseNetwork(CurvedFunction):
    """The objective of a control problem whose layers are dense, see `fits`, as a `CurvedFunction` of its design.

    Args:
        problem: with a `LayerConstraint`.
        loss: its `ScoreLoss`.
        costs: the rest of its objective.
        unknown: whether the states are unknowns.
        mgrit: for sweeps by MGRIT, see `exact_cycles`; None for one layer after the other.

    Attributes:
        chain: the layers, with the count of its sweeps.
        inputs: of all samples, (inputs, samples).
        carries: whether a step asks how the states follow it.
    """

    def __init__(
        self,
        problem: ControlProblem,
        loss: Any,
        costs: DesignCost,
        unknown: bool = False,
        mgrit: MgritSettings | None = None,
    ) -> None:
        prices = Costs(
            value=FORWARD + SWEEP * unknown, gradient=FORWARD + SWEEP * unknown + BACKWARD, hessian_product=1
        )
        super().__init__(problem.layout.design_size, problem.grid.mpi, prices)
        constraint = problem.constraint
        assert isinstance(constraint, LayerConstraint)
        self.problem, self.loss, self.terms, self.unknown = problem, loss, costs, unknown
        self.constraint, self.samples, self.width = constraint, len(constraint.features), constraint.shape[1]
        self.chain = DenseChain(problem.grid, constraint.block, mgrit)  # type: ignore[arg-type]
        self.carries = unknown
        self.inputs = constraint.features.T.contiguous()
        opening = constraint.opening
        kind = type(opening[1]) if isinstance(opening, nn.Sequential) else nn.Identity
        self.act, self.slope = DENSE_ACTIVATIONS[kind]

    def at(self, x: Tensor, state: Tensor | None = None) -> DensePoint:
        return DensePoint(self, x, state)

    def recalled(self, memory: dict[str, Any]) -> CurvatureFactors:
        return DenseFactors.recalled(self, memory) if memory else super().recalled(memory)

    def outputs(self, x: Tensor, inputs: Tensor) -> Tensor:
        """The scores of other samples, (samples, classes), of a design. Collective.

        Args:
            x: (size,).
            inputs: (samples, inputs).
        """
        W, b, ends = self.split(x)
        first = inputs.to(x).T.contiguous()
        if ends.K is not None and ends.k is not None:
            first = self.act(torch.addmm(ends.k[:, None], ends.K, first))
        states, _ = self.chain.states(first, W, b)
        return torch.addmm(ends.h[:, None], ends.H, self.chain.last_to_all(states[-1])).T

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Ends]:
        """W (n_local, width, width), b (n_local, width), and opening and head, from a design. Collective."""
        layout, w = self.problem.layout, self.width
        z, p = x.split([layout.control_size, layout.param_size])
        rows = z.view(-1, w * w + w)
        W, b = rows[:, : w * w].unflatten(1, (w, w)), rows[:, w * w :]
        return W, b, Ends.of(self.constraint.ends(layout.on_all_ranks(p)))

    def join(self, W: Tensor, b: Tensor, ends: list[Tensor]) -> Tensor:
        """The entries of this rank of a gradient, from those by layers and by opening and head."""
        rows = torch.cat([W.flatten(1), b], 1).reshape(-1)
        p = ends if self.problem.grid.is_first else []
        return torch.cat([rows, *(part.reshape(-1) for part in p)])


class DensePoint(CurvedPoint):
    """A `DenseNetwork` at a design, and at states where these are unknowns.

    Args:
        network: the function.
        x: its design, (size,).
        state: after each layer of this rank, flat; None for those of the design.

    Attributes:
        adjoint: C-points at which the cycles of the gradient's adjoint begin; None for those of coarser levels.
    """

    adjoint: Tensor | None = None

    def __init__(self, network: DenseNetwork, x: Tensor, state: Tensor | None = None) -> None:
        self.network, self.x, chain, tally = network, x, network.chain, network.tally
        self.W, b, self.ends = network.split(x)
        K, k = self.ends.K, self.ends.k
        self.first = (
            network.inputs if K is None or k is None else network.act(torch.addmm(k[:, None], K, network.inputs))
        )
        tally.values += 1
        tally.work += FORWARD
        self.state = EMPTY
        self.end = chain.last_to_all(self._solve(b, state))
        self.outputs = torch.addmm(self.ends.h[:, None], self.ends.H, self.end).T
        loss = network.loss
        self.value = float(loss.likelihood(self.outputs, loss.targets)) + network.terms.value(x)

    def _solve(self, b: Tensor, state: Tensor | None) -> Tensor:
        """The last state of this rank, linearly restored where states are unknowns, those of `state`."""
        network, chain = self.network, self.network.chain
        if state is None or not network.unknown:  # a start on the constraint
            self.U, self.V = chain.states(self.first, self.W, b)
            chain.took(chain.grid.num_steps)
            if network.unknown:
                self.step, self.state = torch.zeros_like(self.U[1:]), self.U[1:].reshape(-1)
            return self.U[-1]
        after = state.view(-1, *self.first.shape)
        before = chain.grid.neighbors.exchange(after[-1], toward=+1)
        self.U = torch.cat([(self.first if before is None else before)[None], after])
        self.V = chain.values(self.U[:-1], self.W, b)
        defect = torch.addcmul(self.U[:-1], self.V, chain.dt).sub_(after)  # -c
        network.tally.work += SWEEP
        self.step = self.linear.forward(torch.zeros_like(self.first), g=defect)
        self.state = state
        return after[-1] + self.step[-1]

    @cached_property
    def linear(self) -> LinearChain:
        """The layers' derivatives here."""
        return self.network.chain.linearized(self.W, self.V)

    @cached_property
    def gradient(self) -> Tensor:
        network, loss = self.network, self.network.loss
        network.tally.gradients += 1
        network.tally.values -= 1  # it was the value of this gradient
        network.tally.work += BACKWARD
        if not self.value < float("inf"):
            return torch.full_like(self.x, torch.nan)
        weight = loss.likelihood.weight(network.samples)
        cotangent = weight * loss.likelihood.gradient(self.outputs, loss.targets)
        return DenseCurvature(self).back(cotangent.T, self.adjoint).add_(network.terms.gradient(self.x))

    def curvature(self, rows: Tensor | None = None) -> DenseCurvature:
        return DenseCurvature(self, rows)

    def tangents(self, d: Tensor) -> Tensor:
        """S d, how the states of all samples follow the design, flat."""
        self.network.tally.work += SWEEP
        return DenseCurvature(self).states(d)[0].reshape(-1)

    def ahead(self, d: Tensor, state: Tensor) -> DensePoint:
        if not self.network.unknown:
            return DensePoint(self.network, self.x + d)
        if not len(state):  # the curvature had some of the samples only
            state = self.tangents(d)
        moved = torch.add(self.state, self.step.reshape(-1)).add_(state)
        return DensePoint(self.network, self.x + d, moved)


class DenseCurvature(Curvature):
    """G of a `DensePoint`, with what the objective says of the design itself; of some samples, in their mean.

    Args:
        point: where.
        rows: numbers of the samples, int64; None for all.
    """

    def __init__(self, point: DensePoint, rows: Tensor | None = None) -> None:
        network = self.network = point.network
        self.x, self.W, self.ends = point.x, point.W, point.ends
        parts = point.U[:-1], point.first, network.inputs, point.end
        if rows is None:
            self.U, self.first, self.inputs, self.end = parts
            self.linear, self.outputs = point.linear, point.outputs
        else:
            self.U, self.first, self.inputs, self.end = (part.index_select(-1, rows) for part in parts)
            self.linear, self.outputs = point.linear.rows(rows), point.outputs.index_select(0, rows)
        self.samples = len(self.outputs)
        self.share = self.samples / network.samples
        self.weight = network.loss.likelihood.weight(self.samples)
        if network.loss.likelihood.reduction == "sum":
            self.weight /= self.share

    def product(self, d: Tensor) -> Tangent:
        network, ends = self.network, self.ends
        network.tally.hessian_products += 1
        network.tally.work += PRODUCT * self.share
        states, step = self.states(d)
        moved = torch.addmm(step.h[:, None], step.H, self.end).addmm_(ends.H, network.chain.last_to_all(states[-1]))
        curved = network.loss.likelihood.times(self.outputs, moved.T).mul_(self.weight)
        image = self.back(curved.T).add_(network.terms.product(d))
        return Tangent(image, states.reshape(-1) if network.carries and self.share == 1.0 else EMPTY)

    def states(self, d: Tensor) -> tuple[Tensor, Ends]:
        """How the states of this rank follow a design, (n_local, width, samples), and its opening and head."""
        dW, db, step = self.network.split(d)
        entry = torch.zeros_like(self.first)
        if step.K is not None and step.k is not None:
            entry = self.network.slope(torch.addmm(step.k[:, None], step.K, self.inputs), self.first)
        return self.linear.forward(entry, torch.baddbmm(db[:, :, None], dW, self.U)), step

    def back(self, w: Tensor, guess: Tensor | None = None) -> Tensor:
        """The gradient of w.scores, w (classes, samples), (size,); cycles may begin with a guess."""
        S, first = self.linear.backward(self.ends.H.T @ w, guess)
        parts = [w @ self.end.T, w.sum(1)]
        if self.ends.K is not None:
            s = self.network.slope(first, self.first)
            parts = [s @ self.inputs.T, s.sum(1), *parts]
        return self.network.join(torch.bmm(S, self.U.mT), S.sum(2), parts)

    def factors(self) -> DenseFactors:
        """Kronecker factors, exact for each layer: one sweep back for all columns of the classes' H."""
        network, N = self.network, self.samples
        network.tally.work += FACTORS * self.share
        columns = torch.stack([column.T for column in network.loss.likelihood.columns(self.outputs)], 1)
        columns = columns.mul_((self.weight) ** 0.5)  # (classes, columns, samples)
        end = (self.ends.H.T @ columns.flatten(1)).view(-1, *columns.shape[1:])
        S, first = self.linear.backward(end)
        layers = FactorPair(_second(_with_ones(self.U)) / N, _second(S.flatten(2)))
        pairs = [layers]
        if network.problem.grid.is_first:
            if self.ends.K is not None:
                s = network.slope(first, self.first[:, None].expand_as(first).contiguous())
                pairs.append(FactorPair(_second(_with_ones(self.inputs[None])) / N, _second(s.flatten(1)[None])))
            pairs.append(FactorPair(_second(_with_ones(self.end[None])) / N, _second(columns.flatten(1)[None])))
        return DenseFactors(network, pairs)


def _with_ones(u: Tensor) -> Tensor:
    return torch.cat([u, u.new_ones(u.shape[0], 1, u.shape[2])], 1)


def _second(rows: Tensor) -> Tensor:
    return torch.bmm(rows, rows.mT)
