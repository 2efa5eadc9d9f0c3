"""Settings that trust-region methods share: of the model, of the radius, and of batches."""

from __future__ import annotations

from dataclasses import dataclass

from pdeopt.core.errors import InputError
from pdeopt.core.settings import Settings, setting
from pdeopt.functions.smooth import SmoothFunction
from pdeopt.optimize.parts.metricmodel import METRICS, MetricModel
from pdeopt.optimize.parts.trustmodel import MODELS, NORMS, TrustModel, trust_model
from pdeopt.optimize.parts.trustregion import RatioRule


@dataclass(frozen=True)
class ModelSettings(Settings):
    """The model of a trust region."""

    model: str = setting(
        "lsr1",
        "model of the function: first order, the metric as Hessian, secant pairs (L-SR1), or Hessian products",
        choices=MODELS,
    )
    memory: int = setting(10, "secant pairs of the model lsr1", at_least=1)
    cg_rtol: float = setting(
        0.1, "largest relative residual of conjugate gradients in the model hvp", above=0, at_most=1
    )
    cg_max_it: int = setting(100, "Hessian products a step at most, in the model hvp", at_least=1)

    def trust_model(self, function: SmoothFunction, norm: str = "2") -> TrustModel:
        """The model of a function, within a radius in this norm."""
        return trust_model(function, self.model, norm, self.memory, self.cg_rtol, self.cg_max_it)


@dataclass(frozen=True)
class MetricSettings(ModelSettings):
    """The model of a trust region, and the metric in which it is made."""

    metric: str = setting(
        "none",
        "inner product that measures steps: that of numbers, Kronecker factors of a network, functions in space-time",
        choices=METRICS,
    )
    metric_every: int = setting(10, "iterations from one refresh of the metric to the next", at_least=1)

    def trust_model(self, function: SmoothFunction, norm: str = "2") -> TrustModel:
        inner = super().trust_model(function, norm)
        if self.metric == "none":
            return inner
        if norm != "2":
            raise InputError(f"norm of a trust region with metric {self.metric}", norm, "2")
        return MetricModel(function, inner, function.metric(self.metric), self.metric_every)


@dataclass(frozen=True)
class RatioSettings(Settings):
    """How the ratio of decreases sets the radius."""

    radius: float = setting(
        0.0, "first trust radius; 0: the length of the Cauchy step, by a gradient difference", at_least=0, at_most=1e100
    )
    accept: float = setting(1e-4, "ratio of actual to predicted decrease from which a step is taken", above=0)
    poor: float = setting(
        0.25, "ratio of actual to predicted decrease below which the radius shrinks", above=0, at_most=1
    )
    good: float = setting(
        0.75, "ratio of actual to predicted decrease above which the radius grows", above=0, at_most=1
    )

    @property
    def rule(self) -> RatioRule:
        """The rule of the radius."""
        return RatioRule(self.accept, self.poor, self.good)


@dataclass(frozen=True)
class RadiusSettings(RatioSettings):
    """The trust radius."""

    norm: str = setting("2", "norm in which the trust radius is measured", choices=NORMS)
    shrink: float = setting(0.5, "factor of the radius after a poor step", above=0, at_most=1)
    grow: float = setting(2.0, "factor of the radius after a good step", at_least=1)
    smallest: float = setting(0.0, "trust radius at least", at_least=0)
    largest: float = setting(1e30, "trust radius at most", above=0)
    window: int = setting(
        1, "values of which a step must be below the highest; 1: below the last, so that values never rise", at_least=1
    )

    @property
    def rule(self) -> RatioRule:
        return RatioRule(self.accept, self.poor, self.good, self.shrink, self.grow, self.smallest, self.largest)


@dataclass(frozen=True)
class BatchSettings(Settings):
    """Batches of samples."""

    batch: int = setting(0, "samples of the first batch; 0 for all", at_least=0)
    overlap: float = setting(0.5, "share of a batch that the next one has, too", at_least=0, at_most=0.5)
    average: float = setting(
        8.0, "decay of the weights in the mean over the iterates of batches; 0: all weigh the same", at_least=0
    )
    noise: float = setting(
        0.0, "relative error of a batch's gradient above which batches grow; 0: they never do", at_least=0
    )
    growth: float = setting(2.0, "factor by which a batch grows", at_least=1)
    seed: int = setting(0, "seed of the order of the samples")
