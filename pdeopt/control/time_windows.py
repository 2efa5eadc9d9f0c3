"""A window of the steps of a problem as a problem of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from pdeopt.control.controlmap import StepControls
from pdeopt.control.linearization import InitialNode
from pdeopt.control.objective import Objective
from pdeopt.control.problem import ControlProblem, StateFunction
from pdeopt.control.propagator import Propagator
from pdeopt.steps.timegrid import Steps
from pdeopt.steps.vectorlayout import VectorLayout


def window_problem(problem: ControlProblem, begin: int, end: int, start: Tensor, slope: Tensor) -> ControlProblem:
    """The steps begin + 1 to end of a problem, from a given state, on this rank alone.

    Args:
        problem: of all steps, with one control a step and without global parameters.
        begin, end: numbers of steps, 0 <= begin < end <= N.
        start: the state u_begin, (n,).
        slope: what the steps after the window say about its last state: slope.u_end is added to the objective, (n,).
    """
    start = start.clone()
    window = window_from(problem, begin, end, lambda: start)
    window.objective = problem.objective + LinearTerminal(slope, end)
    window.initial = _initial_node(window)
    return window


def window_from(problem: ControlProblem, begin: int, end: int, start: Callable[[], Tensor]) -> ControlProblem:
    """The steps begin + 1 to end of a problem, on this rank alone, with the objective of all steps.

    Args:
        problem, begin, end: see `window_problem`.
        start: gives the state u_begin, (n,), whenever the window is evaluated.
    """
    window = copy.copy(problem)  # its parts are checked, and there are many windows
    window.grid = problem.grid.window(begin, end)
    window.initial_state = StateFunction(lambda p: start(), problem.n)
    window.controls = StepControls(window.grid, problem.m)
    window.layout = VectorLayout(window.grid, problem.n, window.controls.size, problem.param_dim)
    window.propagator, window.initial = Propagator(window.grid), _initial_node(window)
    return window


def _initial_node(window: ControlProblem) -> InitialNode:
    """The node before its first step, with its own state and objective."""
    return InitialNode(window.initial_state, window.objective, window.grid.node_zero, window.m)


class LinearTerminal(Objective):
    """c.u_k for one step k.

    Args:
        c: coefficients, (n,).
        k: the number of the step.
    """

    def __init__(self, c: Tensor, k: int) -> None:
        self.c, self.k = c.clone(), k

    def value(self, u: Tensor, z: Tensor, steps: Steps) -> Tensor:
        return torch.where(steps.index == self.k, u @ self.c, 0.0)

    def gradient(self, u: Tensor, z: Tensor, steps: Steps) -> tuple[Tensor, Tensor, Tensor]:
        du = torch.where((steps.index == self.k)[:, None], self.c, 0.0)
        return du, torch.zeros_like(z), torch.zeros_like(steps.p)

    def hvp(
        self, u: Tensor, z: Tensor, steps: Steps, du: Tensor, dz: Tensor, dp: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.zeros_like(du), torch.zeros_like(dz), torch.zeros_like(dp)
