"""Weights of terms that follow their sizes: so that none of them is left for the end."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from nn_adapters.pinn.device import home
from nn_adapters.pinn.termrows import TermRows
from pdeopt.core.errors import InputError

#: As an option says.
BALANCES = ("none", "ntk", "gradients")

#: Of the logarithm of an earlier factor, what the next one keeps; and rows of a term whose Jacobian is looked at.
KEPT, LOOKED_AT = 0.5, 256


def check_balance(rule: str) -> None:
    """Refuse a rule that is none of `BALANCES`."""
    if rule not in BALANCES:
        raise InputError("balance of terms", repr(rule), " | ".join(BALANCES))


def balanced_factors(function: TermRows, theta: Tensor, rule: str) -> tuple[float, ...]:
    """By what to multiply the weights of the terms, the first one's by 1: on the way from earlier ones to those that
    make sizes equal, whatever the weights are, half of the way in logarithms.

    * `ntk`: means over the rows of |r_i'|^2 become equal, the traces of the neural tangent kernel over the rows of each
      term: all of them are then learned equally fast (S. Wang, X. Yu, P. Perdikaris, J. Comput. Phys. 449, 2022).
    * `gradients`: the norms of the gradients of the terms become equal (S. Wang, S. Sankaran, H. Wang, P. Perdikaris,
      An expert's guide to training physics-informed neural networks, arXiv:2308.08468, 2023, eq. (3.8)).

    Args:
        function: the terms, with their present weights and factors.
        theta: parameters.
        rule: one of `BALANCES`.
    """
    if rule == "none" or len(function.evaluated) == 1:
        return function.factors
    sizes = _kernels(function, theta) if rule == "ntk" else _gradients(function, theta)
    wanted = [sizes[0] / size if size > 0.0 else 1.0 for size in sizes]
    return tuple(old * new ** (1.0 - KEPT) for old, new in zip(function.factors, wanted))


def _spans(function: TermRows) -> list[tuple[int, int]]:
    """First row of each term, and the one behind its last."""
    ends = torch.tensor([0, *(term.count for term in function.evaluated)]).cumsum(0).tolist()
    return list(pairwise(ends))


def _kernels(function: TermRows, theta: Tensor) -> list[float]:
    """Of each term, the sum of |r_i'|^2 over its rows, which have the roots of weights and of 1 / points, from some."""
    found = []
    for begin, end in _spans(function):
        rows = torch.linspace(begin, end - 1, min(LOOKED_AT, end - begin), dtype=torch.float64).round().long()
        function.tally.work += function.costs.jacobian * len(rows) / function.rows
        J = function._linearize(theta, rows)[1]
        found.append(float(home(J.square().sum())) * (end - begin) / len(rows))
    return found


def _gradients(function: TermRows, theta: Tensor) -> list[float]:
    """Of each term, the norm of its gradient."""
    function.tally.work += function.costs.value + function.costs.gradient
    r, found = function._residual(theta), []
    for begin, end in _spans(function):
        own = torch.zeros_like(r)
        own[begin:end] = r[begin:end]
        found.append(float(function._vjp(theta, own).norm()))
    return found
