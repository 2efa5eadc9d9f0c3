"""The Lagrangian at a point as PyTorch records it, with the tensors that a user's functions are made of.

Solvers treat such tensors q, targets, coefficients, initial states, as constants. Here the graph reaches them: the
derivative of L = J + lam.F by q, and of its gradient G = (L_x, F) by q, as G_q dq and as G_q' v. As the rows of steps
do not interact, a rank records its own steps, and nothing is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pdeopt.control.linearization import Linearization
from pdeopt.control.problem import ControlProblem
from pdeopt.steps.timegrid import Steps

#: (u_i, z_i, steps) -> rows of numbers, as an inequality along the path is.
PathFunction = Callable[[Tensor, Tensor, Steps], Tensor]


class RecordedLagrangian:
    """L = J + lam.F + nu.c of the steps of this rank, and its gradient, both with their graph.

    The gradient is that by rows of u, (n_local, n), by the state before the first of them, (1, n), by the controls of
    steps, (n_local, m), by p, and by lam. On the rank of step 1 that state is G(p; q), and its derivative is part of
    those by p and by q.

    Args:
        problem: whose functions they are.
        lin: the point.
        lam: rows of the multiplier, (n_local, n).
        parameters: q, tensors that require gradients.
        path: c and weight nu, rows (n_local, k); None where there are none.

    Attributes:
        used: which of `parameters` the functions of these steps depend on.
    """

    def __init__(
        self,
        problem: ControlProblem,
        lin: Linearization,
        lam: Tensor,
        parameters: Sequence[Tensor],
        path: tuple[PathFunction, Tensor] | None = None,
    ) -> None:
        self.parameters = list(parameters)
        with torch.enable_grad():
            u, before, z, p, rows = (
                x.detach().clone().requires_grad_() for x in (lin.u, lin.u_old[:1], lin.z_step, lin.p, lam)
            )
            self._variables = [u, before, z, p, rows]
            steps, is_first = lin.steps.with_parameters(p), problem.grid.is_first
            u0 = problem.initial_state.recorded(p)[None] if is_first else before
            F = problem.constraint.residual(torch.cat([u0, u[:-1]]), u, z, steps)
            self.value = problem.objective.value(u, z, steps).sum() + (rows * F).sum()
            node = problem.grid.node_zero
            if is_first and len(node):
                self.value = (
                    self.value + problem.objective.value(u0, z.new_zeros(1, problem.m), node.with_parameters(p)).sum()
                )
            self._c: Tensor | None = None
            if path is not None:
                function, nu = path
                c = function(u, z, steps)
                self._c = torch.where(c.isinf(), 0.0, c)  # such an entry asks for nothing
                self.value = self.value + (nu * self._c).sum()
            self._gradient = torch.autograd.grad(
                self.value, self._variables, create_graph=True, allow_unused=True, materialize_grads=True
            )
        self._by_q = self._backward(self.value)
        self.used = [each is not None for each in self._by_q]

    def by_parameters(self) -> list[Tensor]:
        """L_q, in the shapes of the parameters; the part of these steps."""
        return self._filled(self._by_q)

    def adjoint(self, v: Sequence[Tensor], r: Tensor | None = None) -> list[Tensor]:
        """G_q' v + c_q' r, the part of these steps.

        Args:
            v: directions of u, of the state before, of z, p and lam, as the gradient has them.
            r: rows, (n_local, k).
        """
        with torch.enable_grad():
            return self._filled(self._backward(self._tilted(v, r)))

    def direct(self, dq: Sequence[Tensor]) -> tuple[list[Tensor], Tensor | None]:
        """G_q dq, as the gradient has it, and c_q dq, (n_local, k)."""
        with torch.enable_grad():
            v = [torch.zeros_like(x, requires_grad=True) for x in self._variables]
            r = None if self._c is None else torch.zeros_like(self._c, requires_grad=True)
            products = self._backward(self._tilted(v, r), create_graph=True)
            total = sum(((w * d).sum() for w, d in zip(products, dq) if w is not None), v[0].new_zeros(()))
            inputs = [*v, *([] if r is None else [r])]
            if not total.requires_grad:
                return [torch.zeros_like(x) for x in v], None if r is None else torch.zeros_like(r)
            found = torch.autograd.grad(total, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
        return list(found[: len(v)]), None if r is None else found[-1]

    def _tilted(self, v: Sequence[Tensor], r: Tensor | None) -> Tensor:
        """G.v + c.r, linear in v and r."""
        total = torch.stack([(g * d).sum() for g, d in zip(self._gradient, v)]).sum()
        return total if r is None or self._c is None else total + (r * self._c).sum()

    def _backward(self, value: Tensor, create_graph: bool = False) -> list[Tensor | None]:
        if not value.requires_grad:
            return [None] * len(self.parameters)
        return list(
            torch.autograd.grad(value, self.parameters, retain_graph=True, create_graph=create_graph, allow_unused=True)
        )

    def _filled(self, parts: Sequence[Tensor | None]) -> list[Tensor]:
        return [torch.zeros_like(q) if part is None else part.detach() for q, part in zip(self.parameters, parts)]
