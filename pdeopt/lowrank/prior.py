"""Gaussian processes as priors of parameters that are a field: a covariance as the Riesz map of an inverse problem."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pdeopt.core.errors import InputError
from pdeopt.lowrank.hodlr import HierarchicalKernel
from pdeopt.lowrank.kernels import Array, Kernel, require_positive
from pdeopt.lowrank.symmetric import SymmetricFactor


class GaussianPrior:
    """p of mean zero and covariance K + nugget at some points, which is S S' with the factor of hierarchical blocks.

    In p = S w, w is white noise: |S^-1 p|^2 is the price of p, and K + nugget maps its gradients to functions. (A. M.
    Stuart, Inverse problems: a Bayesian perspective, Acta Numerica 19, 2010, section 6.) Two ways into a problem:

    - p are its parameters, and the precision is their inner product, in which gradients are measured;
    - w are its parameters, and `field` makes p of them where they are used: the Hessian is then the identity plus what
      the data say, which is of low rank, and counts of iterations do not depend on the mesh of p.

    Args:
        kernel: k; Matern kernels suit fields of few derivatives.
        points: (n, d), where p has its values; on each rank.
        nugget: variance of noise at single points, which bounds the condition number by about n / nugget.
        rtol: of the blocks.

    Raises:
        InputError: points or nugget that are not legal.
        SolveFailure: blocks too coarse for the nugget.

    Example:
        >>> prior = GaussianPrior(Matern(0.2), x)
        >>> constraint.param_mass = prior.precision
        >>> objective = misfit + po.TerminalLoss(lambda u, p: prior.penalty(p))
    """

    def __init__(self, kernel: Kernel, points: Any, nugget: float = 1e-6, rtol: float = 1e-10) -> None:
        self._blocks = HierarchicalKernel(kernel, points, rtol=rtol)
        self._factor = SymmetricFactor(self._blocks, require_positive("nugget of a prior", nugget))

    @cached_property
    def inverse_root(self) -> Tensor:
        """S^-1, (slots, n), slots >= n."""
        return torch.from_numpy(self._factor.half_solve(self._blocks.from_points(np.eye(self._blocks.tree.n))))

    @cached_property
    def root(self) -> Tensor:
        """S, (n, n)."""
        blocks = self._blocks
        return torch.from_numpy(blocks.to_points(self._factor.product(blocks.from_points(np.eye(blocks.tree.n)))))

    def field(self, w: Tensor) -> Tensor:
        """p = S w, (n,), with the price |w|^2 / 2; differentiable."""
        return self.root @ w

    @property
    def precision(self) -> Array:
        """(K + nugget)^-1, (n, n), dense and symmetric: for `param_mass` of a constraint."""
        found: Array = (self.inverse_root.T @ self.inverse_root).numpy()
        return found

    def penalty(self, p: Tensor) -> Tensor:
        """p'(K + nugget)^-1 p / 2, the negative logarithm of the density up to a constant; differentiable."""
        w = self.inverse_root @ p
        return 0.5 * (w * w).sum()

    def sample(self, noise: Any) -> Array:
        """S w of the prior, (n,), from (n,) independent numbers w of variance 1.

        Raises:
            InputError: noise of another shape.
        """
        w = np.asarray(noise, dtype=float)
        if w.shape != (self._blocks.tree.n,):
            raise InputError("noise of a prior", w.shape, f"({self._blocks.tree.n},)")
        return self._blocks.to_points(self._factor.product(self._blocks.from_points(w)))
