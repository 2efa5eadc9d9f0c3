"""Additively preconditioned trust-region methods: local solves in parts of the unknowns, of the samples, or of both."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from pdeopt.core.monitor import History, Reason, Result
from pdeopt.core.settings import setting
from pdeopt.core.team import Team
from pdeopt.functions.decomposition import Decomposition
from pdeopt.functions.sharing import share
from pdeopt.functions.smooth import FirstOrderConsistent, SmoothFunction
from pdeopt.optimize.descent.minimizer import Minimizer
from pdeopt.optimize.descent.trust import TrustRegionMinimizer, TrustSettings
from pdeopt.optimize.descent.trustsettings import BatchSettings, MetricSettings, RadiusSettings
from pdeopt.optimize.parts.trustmodel import TrustModel
from pdeopt.optimize.parts.trustregion import reduction_ratio


@dataclass(frozen=True)
class APTSSettings(BatchSettings, RadiusSettings, MetricSettings, prefix="apts_"):
    """Additively preconditioned trust-region method (APTS)."""

    overlap: float = setting(0.25, "share of a batch that the next one has, too", at_least=0, at_most=0.5)
    weights: int = setting(1, "parts of the unknowns", at_least=1)
    data: int = setting(1, "parts of the samples", at_least=1)
    lenience: float = setting(
        0.2, "factor of the poor and good ratios where the samples are in parts", above=0, at_most=1
    )
    local_it: int = setting(2, "trust-region steps in each part", at_least=1)
    global_it: int = setting(1, "trust-region steps after the local ones, in all unknowns and samples", at_least=0)

    @property
    def whole(self) -> TrustSettings:
        """Those of the trust region around the local steps."""
        factor = self.lenience if self.data > 1 else 1.0
        shared = {each.name: getattr(self, each.name) for each in fields(TrustSettings)}
        return TrustSettings(**(shared | {"poor": factor * self.poor, "good": factor * self.good}))


class APTS(Minimizer):
    """x <- x + sum_s R_s' W_s mean_d d_sd, then trust-region steps (K. Trotti, S. A. Cruz Alegría, A. Kopaničáková,
    R. Krause, parallel trust-region approaches in neural network training, 2023).

    d_sd comes of `local_it` trust-region steps, in part s of the unknowns, on

        h_sd(d) = f_d(x + R_s' d) + <R_s (f' - f_d')(x), d>,

    f_d the mean over part d of the samples: h' is that of f at x. They stay within a local radius that keeps the whole
    step within the radius. Their last step is not evaluated: its decrease is the model's, and the ratio of the
    decrease of f to the sum of local decreases judges it with the others. So one part, one local step and no global
    ones is `TrustRegionMinimizer`, step by step.

    Few samples promise more than f keeps: so, where they are in parts, smaller ratios are poor and good.

    Args:
        decomposition: parts of the unknowns; by default `weights` parts by `function.decompose`.
        team: ranks that share the local solves and the cells of batches, and get the same bits on any number of them;
            by default that of the decomposition.

    Attributes:
        method: the trust region around the local steps; its point is that of this object.
    """

    Settings = APTSSettings

    def __init__(
        self,
        function: SmoothFunction | None = None,
        *args: Any,
        decomposition: Decomposition | None = None,
        team: Team | None = None,
        **defaults: Any,
    ) -> None:
        self._parts, self.team = decomposition, team
        super().__init__(function, *args, **defaults)

    def adopt(self, function: SmoothFunction) -> None:
        super().adopt(function)
        self.decomposition = self._parts or function.decompose(self.settings.weights, team=self.team)
        self.team = self.team or self.decomposition.team
        self._disjoint = all(bool((weights == 1).all()) for weights in self.decomposition.weights)
        whole, cells = self.settings.whole, self.settings.data
        self.method = TrustRegionMinimizer(function, whole, self.stop, team=self.team, cells=cells)
        self.method.unit, self.is_monotone = self.unit, self.method.is_monotone

    def start(self, x: Tensor, known: tuple[float, Tensor] | None = None) -> None:
        self.hand_over(self.method)
        self.method.start(x, known)
        self._follow()

    @property
    def mean(self) -> Tensor:
        """The mean over the iterates of batches; see `TrustRegionMinimizer`."""
        return self.method.mean

    def _follow(self) -> None:
        """The point of the trust-region method is that of this one."""
        method = self.method
        self.x, self.f, self.g, self.radius, self.note = method.x, method.f, method.g, method.radius, method.note
        self.first, self.gtol, self.highest = method.first, method.gtol, method.highest
        self.is_limited = method.is_limited

    def step(self) -> Reason:
        method = self.method
        self._domain_step()
        note = f"parts {method.note}".strip()
        for _ in range(self.settings.global_it):
            method.trust_step()
        method.note = f"{note} {method.note}".strip()
        reason = method.next_batch()
        self._follow()
        return reason

    def _domain_step(self) -> bool:
        """The local solves of all parts as one step."""
        parts, data = len(self.decomposition), self.settings.data
        found = share(self.team, parts * data, lambda task: self._solve(*divmod(task, data)), self.function.tally)
        means = {s: torch.stack([d for d, _ in found[s * data : (s + 1) * data]]).mean(0) for s in range(parts)}
        predicted = math.fsum(decrease for _, decrease in found) / data
        return self.method.attempt(self.decomposition.assemble(means), predicted)

    def _solve(self, part: int, data: int) -> tuple[Tensor, float]:
        """The local step of a part, and how much the local function decreases."""
        function, z, value, model = self._local(part, data)
        g, left = self.method.g[self.decomposition.parts[part]], self.settings.local_it
        bound = self._bound()
        rule, radius = replace(self.method.rule, smallest=0.0, largest=bound), bound / left
        d, decrease = torch.zeros_like(g), 0.0
        while (reach := min(radius, bound - model.length(d))) > 1e-12 * bound:
            step, left = model.step(z + d, g, reach), left - 1
            if left == 0:
                return d + step.d, decrease + step.decrease
            trial, trial_g = function.value_and_gradient(z + d + step.d)
            ratio = reduction_ratio(value, trial, step.decrease)
            if math.isfinite(ratio):
                model.update(step.d, trial_g - g)
            radius = rule.after(ratio, reach, model.length(step.d))
            if ratio >= rule.accept:
                d, decrease, value, g = d + step.d, decrease + value - trial, trial, trial_g
        return d, decrease

    def _local(self, part: int, data: int) -> tuple[SmoothFunction, Tensor, float, TrustModel]:
        """A part's function, its point and value there, and the model of it."""
        whole_space = len(self.decomposition) == 1
        indices = None if whole_space else self.decomposition.parts[part]
        value, g_data = self.method.at.of_part(data, self.settings.data)
        function = self.method.batches.part(data)
        z = self.method.x
        if indices is not None:
            function, z = function.local(self.decomposition, part, self.method.x), torch.zeros(len(indices)).double()
        if self.settings.data > 1:
            own = slice(None) if indices is None else indices
            function = FirstOrderConsistent(function, z, self.method.g[own], g_data[own])
        return function, z, value, self.method.model.local(function, indices)

    def _bound(self) -> float:
        """The local radius: that of the whole step over the norm of the sum of unit steps."""
        parts = len(self.decomposition)
        if self.settings.norm == "inf":  # weights of the partition of unity sum to one
            return self.method.radius
        return self.method.radius / (math.sqrt(parts) if self._disjoint else parts)

    def result(self, reason: Reason, message: str, history: History) -> Result:
        return self.method.result(reason, message, history)

    def memory(self) -> dict[str, Any]:
        return self.method.memory() | super().memory()

    def recall(self, memory: dict[str, Any]) -> None:
        self.hand_over(self.method)
        self.method.recall(memory)
        self._follow()
