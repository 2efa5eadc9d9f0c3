"""Losses of the scores after the last layer as objectives of a control problem, with their Gauss-Newton matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nn_adapters.control.densenetwork import DenseNetwork, fits
from nn_adapters.control.designcost import DesignCost
from nn_adapters.control.intervals import exact_cycles
from nn_adapters.control.oneshot import OneShotNetwork
from nn_adapters.curvature.likelihoods import CrossEntropy, Likelihood, SquaredError
from nn_adapters.layers.constraint import LayerConstraint
from pdeopt.control.objective import Objective, Rows, TerminalLoss
from pdeopt.core.autodiff import jvp, vjp
from pdeopt.core.errors import InputError
from pdeopt.functions.curved import CurvedFunction, CurvedTerm
from pdeopt.steps.mgrit import MgritSettings
from pdeopt.steps.timegrid import Steps


class ScoreLoss(TerminalLoss, CurvedTerm):
    """l(scores) of the features after the last layer, l a convex `Likelihood`.

    Args:
        constraint: the layers.
        likelihood: of the scores, (samples, ...).
        targets: what it compares them with.
        head: features (samples, ...) to scores, not trained; None for the head of the constraint, which is.

    Raises:
        InputError: targets of other samples.
    """

    def __init__(
        self,
        constraint: LayerConstraint,
        likelihood: Likelihood,
        targets: Tensor,
        head: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if len(targets) != constraint.shape[0]:
            raise InputError("targets of a network", f"{len(targets)}", f"one a sample, {constraint.shape[0]}")
        self.constraint, self.likelihood, self.targets, self.fixed_head = constraint, likelihood, targets, head
        super().__init__(lambda u, p: likelihood(self.scores(u, p), targets))

    def scores(self, u: Tensor, p: Tensor) -> Tensor:
        """Of flat features, (state_dim,)."""
        if self.fixed_head is None:
            return self.constraint.scores(u, p)
        return self.fixed_head(u.reshape(self.constraint.shape))

    def gauss_newton(  # type: ignore[override]
        self, u: Tensor, z: Tensor, steps: Steps, du: Tensor, dz: Tensor, dp: Tensor
    ) -> Rows:
        """s' H s of the scores s, H the likelihood's, without second derivatives of the head."""
        h_u, h_z, h_p = torch.zeros_like(du), torch.zeros_like(dz), torch.zeros_like(dp)
        if steps.has_last:
            point, direction = (u[-1], steps.p), (du[-1], dp)
            scores = self.scores(*point)
            curved = self.likelihood.times(scores, jvp(self.scores, point, direction))
            h_u[-1], h_p = vjp(self.scores, point, self.likelihood.weight(len(scores)) * curved)
        return h_u, h_z, h_p

    def curved(self, problem: Any, **settings: Any) -> CurvedFunction | None:
        costs = DesignCost.of(problem, self) if fits(problem, self) else None
        if costs is None:
            return None
        mgrit: MgritSettings | None = settings.get("mgrit")
        if mgrit is not None and settings.get("one_shot"):
            return OneShotNetwork(problem, self, costs, mgrit)
        exact = None if mgrit is None else exact_cycles(mgrit, problem.grid.num_steps)
        return DenseNetwork(problem, self, costs, bool(settings.get("unknown")), exact)


def classification_loss(
    constraint: LayerConstraint, head: Callable[[Tensor], Tensor] | None, labels: Tensor
) -> Objective:
    """The mean cross-entropy of the scores after the last layer, as an objective of a control problem.

    Args:
        constraint: the layers.
        head: features (samples, ...) to scores (samples, classes), in double precision, not trained; None for the
            head of the constraint, which is.
        labels: classes, (samples,).
    """
    return ScoreLoss(constraint, CrossEntropy(), labels, head)


def regression_loss(constraint: LayerConstraint, head: Callable[[Tensor], Tensor] | None, targets: Tensor) -> Objective:
    """Half the mean square of outputs less targets after the last layer, as an objective of a control problem.

    Args:
        constraint: the layers.
        head: features (samples, ...) to outputs, in double precision, not trained; None for the head of the
            constraint, which is.
        targets: of the shape of the outputs.
    """
    return ScoreLoss(constraint, SquaredError(factor=len(targets) / targets.numel()), targets, head)
