"""The solution of a control problem as a function that PyTorch differentiates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pdeopt.control.problem import ControlProblem
from pdeopt.core.errors import SolveFailure
from pdeopt.optimize.choice import solve
from pdeopt.optimize.solutions.sensitivity import Optimum, Sensitivity

#: Arguments of `solve` that are limits.
LIMITS = ("lower", "upper", "state_lower", "state_upper", "path")


def optimum(make: Callable[..., ControlProblem], *parameters: Tensor, **settings: Any) -> Optimum:
    """The solution of a problem as a function that PyTorch differentiates: a solve forward, one KKT solve backward.

    Collective; gradients are those of the sum over ranks of what each makes of its rows, and of the mean over ranks of
    what each makes of p and J. Derivatives of first order only.

    Args:
        make: (*parameters) -> the problem, whose functions are made of these tensors. They are leaves of their own.
        parameters: tensors; they may be computed by others.
        **settings: of `solve`: method, bounds, paths, start and others.

    Raises:
        SolveFailure: the problem was not solved.
        InputError: what `solve` and `Sensitivity` refuse.

    Example:
        >>> def make(k): return ControlProblem(Heat(k), objective, grid)
        >>> k = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
        >>> best = optimum(make, k)
        >>> (best.value + best.state[-1].square().sum()).backward()      # k.grad
    """
    return Optimum(*Solution.apply(make, settings, *parameters))  # type: ignore[no-untyped-call]


class Solution(torch.autograd.Function):
    """See `optimum`."""

    @staticmethod
    def forward(ctx: Any, make: Callable[..., ControlProblem], settings: dict[str, Any], *parameters: Tensor) -> Any:
        leaves = [q.detach().requires_grad_(q.requires_grad) for q in parameters]
        problem = make(*leaves)
        result = solve(problem, **settings)
        if not result.converged:
            raise SolveFailure(f"the problem whose solution is to be differentiated: {result.message}", "see `solve`")
        ctx.wanted = [q.requires_grad for q in leaves]
        ctx.how = None
        if any(ctx.wanted):
            given = {name: settings[name] for name in LIMITS if name in settings}
            ctx.how = Sensitivity(problem, result, [q for q in leaves if q.requires_grad], **given)
        u, z, p = problem.unpack(result)
        value = torch.tensor(result.objective, dtype=torch.float64)
        return u, z, p, problem.layout.rows(result.multiplier), value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        parts = iter(ctx.how.adjoint(*cotangents))
        ctx.how.destroy()
        return None, None, *(next(parts) if wanted else None for wanted in ctx.wanted)
