"""Weights that are B-splines in depth: as many coefficients as the function of depth wants, however many layers.

    z_i = sum_k B_k(t_i) c_k,   t_i = i / (N - 1),   i = 0..N-1

B_k are the K B-splines of one degree over equal pieces of [0, 1]; each c_k has the shape of the weights of a layer
(S. Guenther, W. Pazner, D. Qi, Spline parameterization of neural network controls for deep learning, arXiv:2103.00301,
2021). With as many coefficients as layers, and degree 0 or 1, they are the layers' own weights.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from scipy.interpolate import BSpline
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nn_adapters.layers.parts.context import summed_gradient
from nn_adapters.layers.parts.stacking import ParameterStack
from pdeopt.core.errors import InputError
from pdeopt.steps.exchange.parcels import sum_over_ranks

#: Degrees of splines: constant, linear, quadratic and cubic pieces.
DEGREES = range(4)


@lru_cache(maxsize=16)
def spline_basis(layers: int, degree: int, points: int) -> Tensor:
    """B_k(t_i), (layers, points), in double precision; rows are >= 0 and add up to 1.

    Args:
        layers: N.
        degree: of the pieces.
        points: K, from degree + 1 to N.
    """
    ends = np.zeros(degree), np.ones(degree)
    knots = np.concatenate([ends[0], np.linspace(0.0, 1.0, points - degree + 1), ends[1]])
    return torch.from_numpy(BSpline.design_matrix(np.linspace(0.0, 1.0, layers), knots, degree).toarray())


class DepthSpline(nn.Module):
    """z = B c, a parametrization (`torch.nn.utils.parametrize`) of the stacked weights of this rank's layers.

    The coefficients c, (points, ...), are equal on all ranks. So are their gradients, B' dJ/dz summed over ranks: the
    backward pass is collective.

    Args:
        degree: 0, 1, 2 or 3.
        points: coefficients, from degree + 1 to the number of layers.
        solver: a `LayerMgrit`, whose grid knows the layers of this rank.

    Raises:
        InputError: a degree or a number of coefficients that is not legal.
    """

    def __init__(self, degree: int, points: int, solver: Any) -> None:
        super().__init__()
        layers = solver.grid.num_steps
        if degree not in DEGREES:
            raise InputError("degree of splines", degree, " | ".join(map(str, DEGREES)))
        if not degree < points <= layers:
            legal = f"{degree + 1} to {layers}, from one more than the degree to the layers"
            raise InputError("coefficients of splines", points, legal)
        self.degree, self.points, self.solver = degree, points, solver
        self._own: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def forward(self, c: Tensor) -> Tensor:
        return torch.tensordot(self._rows(c), summed_gradient(c, self.solver.grid.mpi), 1)

    def right_inverse(self, z: Tensor) -> Tensor:
        """The coefficients of the spline that is nearest to the weights of all layers, by least squares. Collective."""
        basis, grid = spline_basis(self.solver.grid.num_steps, self.degree, self.points).to(z.device), self.solver.grid
        seen = sum_over_ranks(grid.mpi, torch.tensordot(basis[grid.begin : grid.end].mT, z.double(), 1))
        return torch.linalg.solve(basis.mT @ basis, seen.flatten(1)).reshape(seen.shape).to(z)

    def _rows(self, like: Tensor) -> Tensor:
        """The rows of B of this rank's layers, kept for each dtype and device."""
        key, grid = (like.dtype, like.device), self.solver.grid
        if key not in self._own:
            self._own[key] = spline_basis(grid.num_steps, self.degree, self.points)[grid.begin : grid.end].to(like)
        return self._own[key]

    def extra_repr(self) -> str:
        return f"degree={self.degree}, points={self.points}"


def parametrize_stack(stack: ParameterStack, names: list[str], spline: DepthSpline) -> None:
    """Make stacked parameters splines, those that are nearest to what they are. Collective.

    Args:
        stack: of the layers of this rank.
        names: of its parameters.
        spline: serves for all of them.

    Raises:
        InputError: a parameter that has a parametrization.
    """
    places = [name.rpartition(".") for name in names]
    for path, _, leaf in places:
        if parametrize.is_parametrized(stack.get_submodule(path), leaf):
            raise InputError("weights that are to be splines", f"{leaf} with a parametrization", "weights without")
    for path, _, leaf in places:
        parametrize.register_parametrization(stack.get_submodule(path), leaf, spline)


def spline_coefficients(network: nn.Module) -> list[nn.Parameter]:
    """The coefficients of all splines in depth, which are equal on all ranks, though layers are not.

    Args:
        network: any module.
    """
    lists = (module for module in network.modules() if isinstance(module, parametrize.ParametrizationList))
    return [each.original for each in lists if any(isinstance(part, DepthSpline) for part in each)]  # type: ignore[misc]
