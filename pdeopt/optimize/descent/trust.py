"""Trust-region methods, on all samples or on batches that overlap: nothing to set for a learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pdeopt.core.monitor import History, Reason, Result
from pdeopt.core.team import Team
from pdeopt.functions.minibatch import Batches, Evaluation
from pdeopt.functions.smooth import SmoothFunction
from pdeopt.optimize.descent.minimizer import Minimizer, flattened, part_of
from pdeopt.optimize.descent.trustsettings import BatchSettings, MetricSettings, RadiusSettings
from pdeopt.optimize.parts.progress import Doubt, ValueWindow
from pdeopt.optimize.parts.trustmodel import TrustModel
from pdeopt.optimize.parts.trustregion import NEAR_THE_BOUNDARY, RatioRule, has_vanished, reduction_ratio

#: Length of the step that finds the first radius, relative to max(1, |x|).
PROBE_LENGTH = 1e-3
#: Below this length a point says in which unit x is measured.
TINY = 1e-3


@dataclass(frozen=True)
class TrustSettings(BatchSettings, RadiusSettings, MetricSettings, prefix="tr_"):
    """Trust-region method, on all samples or on batches."""


class TrustRegionMinimizer(Minimizer):
    """x <- x + d, d the minimizer of a model within a radius; the radius follows the ratio of decreases.

    With `batch`, a step's decrease is that of the batch that it was made for; then the next batch comes. Values at
    samples of both are kept. With `noise`, a batch whose gradient is mostly noise, by its spread over the cells of the
    batch, grows (R. H. Byrd, G. M. Chin, J. Nocedal, Y. Wu, Math. Program. 134, 2012, equation 3.10). What is returned
    is the last point or `mean`, whichever is better on all samples.

    With a `window` of values, steps are taken that decrease the highest of them; the radius still follows the ratio to
    the last value. Where all samples are used, the best point is returned.

    Args:
        team: ranks that share the cells of a batch; see `Batches`.
        cells: parts of each batch that can be asked for one by one.

    Attributes:
        at: value and gradient of the batch at x, cell by cell.
        mean: of the iterates of batches, with weights that decay by a power of their age (O. Shamir, T. Zhang,
            Stochastic gradient descent for non-smooth optimization, ICML 2013); the point where there are no batches.
    """

    Settings = TrustSettings
    model: TrustModel
    rule: RatioRule
    batches: Batches

    def __init__(
        self,
        function: SmoothFunction | None = None,
        *args: Any,
        team: Team | None = None,
        cells: int = 1,
        **defaults: Any,
    ) -> None:
        self.team, self.cells, self.doubt = team, cells, Doubt()
        super().__init__(function, *args, **defaults)

    def adopt(self, function: SmoothFunction) -> None:
        super().adopt(function)
        self.is_monotone = not self.settings.batch and self.settings.window == 1

    def start(self, x: Tensor, known: tuple[float, Tensor] | None = None) -> None:
        self._prepare()
        if known is not None and self.batches.whole and self.batches.parts == 1:
            at = self.batches.known(torch.tensor([known[0]], dtype=torch.float64), known[1][None])
        else:
            at = self.batches.evaluate(x)
        self._set(x, at)
        self.note_first()
        if self.settings.batch:
            self.highest = math.inf
        self.doubt, self._window, self._best = Doubt(), ValueWindow(self.settings.window), (self.f, x.clone())
        self._start, self.mean, self._count = (x.clone() if self.settings.batch else None), x.clone(), 1
        if math.isfinite(self.f):
            self.model.refresh(x)
        self._scale = self._length() if math.isfinite(self.f) else 1.0
        self.radius = self.settings.radius or (self._probe() if math.isfinite(self.f) else math.nan)

    def _prepare(self) -> None:
        s = self.settings
        self.rule = s.rule
        self.batches = Batches(self.function, s.batch, s.overlap, self.cells, s.seed, self.team)
        self.model = s.trust_model(self.batches.batch, s.norm)

    def _set(self, x: Tensor, at: Evaluation) -> None:
        self.x, self.at = x, at
        self.f, self.g = at.f, at.g

    def _length(self) -> float:
        """The scale of x: 1 or |x|; where x is tiny, the larger of |x| and the way on which f would fall to zero."""
        size, slope = self.function.norm(self.x), self.function.norm(self.g)
        own = max(size, abs(self.f) / slope if slope > 0 else 0.0)
        return own if 0.0 < own < TINY else max(1.0, size)

    def _probe(self) -> float:
        """The length of the Cauchy step, by a gradient difference along the steepest descent, in the metric."""
        function, scale = self.function, self._scale
        direction = self.model.riesz(self.g)
        length = function.norm(direction)
        if length == 0.0:
            return scale
        s = direction * (-PROBE_LENGTH * scale / length)
        y = self.batches.evaluate(self.x + s).g - self.g
        slope, unit = self.model.size(direction), self.model.size(s)
        curvature, most = function.dot(s, y) / unit**2, unit / PROBE_LENGTH
        radius = min(slope / curvature, most) if curvature > 0 else most
        if self.settings.norm == "inf":
            radius /= math.sqrt(float(function.comm.allreduce(function.size)))
        if math.isfinite(curvature):
            self.model.update(s, y)
        return float(min(max(radius, self.settings.smallest), self.settings.largest))

    def step(self) -> Reason:
        self.trust_step()
        return self.next_batch()

    def trust_step(self) -> bool:
        """One step of the model."""
        step = self.model.step(self.x, self.g, self.radius)
        return self.attempt(step.d, step.decrease)

    def attempt(self, d: Tensor, predicted: float) -> bool:
        """Take the step if the batch decreases; the model learns in any case, and the radius follows."""
        trial = self.batches.evaluate(self.x + d)
        f, g = trial.f, trial.g
        ratio = reduction_ratio(self.f, f, predicted)
        usable = math.isfinite(f) and math.isfinite(self.function.norm(g))
        if usable:
            self.model.update(d, g - self.g)
        least = reduction_ratio(self._window.highest(self.f), f, predicted)
        taken = usable and f <= self.highest and least >= self.rule.accept
        ratio = ratio if usable and f <= self.highest else -math.inf
        self.doubt.judge(self.f, f, self.function.dot(self.g, d), lambda: self.function.dot(g, d))
        size = self.model.length(d)
        self.is_limited = size >= NEAR_THE_BOUNDARY * self.radius
        self.radius = self.rule.after(ratio, self.radius, size)
        self.radius = self.radius if taken else self.radius * self.doubt.shrink
        self.note = "" if taken else "rejected"
        if taken:
            self._set(self.x + d, trial)
            if f < self._best[0]:
                self._best = f, self.x
        return taken

    def next_batch(self) -> Reason:
        """Go to the next batch, if there are batches; why to stop where the radius has vanished."""
        s = self.settings
        self._count += 1
        self.mean = self.mean.lerp(self.x, (s.average + 1.0) / (s.average + self._count)) if s.batch else self.x
        if not self.batches.whole:
            if s.noise and self.at.uncertainty() > s.noise**2 * self.function.dot(self.g, self.g):
                self.batches.grow(s.growth)
                self.note = f"{self.note} batch {self.batches.size}".strip()
            self._set(self.x, self.batches.advance(self.x, self.at))
            self.model.function = self.batches.batch
        self.model.refresh(self.x)
        vanished = has_vanished(self.radius, self.model.size(self.x), min(self._scale, 1.0)) or self.doubt.is_settled
        return Reason.DIVERGED_STAGNATION if vanished else Reason.ITERATING

    def result(self, reason: Reason, message: str, history: History) -> Result:
        """The last point; after batches, the one of the start, the last and the mean that all samples say is best.

        With a window a run that has not converged gives its best point.
        """
        found = super().result(reason, message, history)
        if self._start is None and not found.converged and self._best[0] < self.f:
            found.design, found.value = self._best[1].clone(), self._best[0] * self.unit
        if self._start is not None:
            points = [self._start, self.x, self.mean]
            values = [self.function.value(x) for x in points]
            best = min(range(3), key=lambda k: values[k] if values[k] == values[k] else math.inf)
            found.design, found.value = points[best], values[best] * self.unit
        return found

    def memory(self) -> dict[str, Any]:
        found = super().memory() | {"at.values": self.at.values.clone(), "at.gradients": self.at.gradients.clone()}
        found |= {"mean": self.mean.clone(), "count": self._count, "doubt": self.doubt.count}
        found |= {"scale": self._scale, "best": self._best[1].clone(), "best_value": self._best[0]}
        found["window"] = torch.tensor([*self._window.earlier], dtype=torch.float64)
        found |= {} if self._start is None else {"start": self._start.clone()}
        return found | flattened({"model": self.model.memory(), "batches": self.batches.memory()})

    def recall(self, memory: dict[str, Any]) -> None:
        super().recall(memory)
        self._prepare()
        self.batches.recall(part_of(memory, "batches"))
        self.model.recall(part_of(memory, "model"))
        self.model.function = self.batches.batch
        self._start = memory["start"].clone() if "start" in memory else None
        self.mean, self._count = memory["mean"].clone(), int(memory["count"])
        self.doubt, self._scale = Doubt(int(memory["doubt"])), float(memory["scale"])
        self._window = ValueWindow(self.settings.window, memory["window"].tolist())
        self._best = float(memory["best_value"]), memory["best"].clone()
        at = self.batches.known(memory["at.values"].clone(), memory["at.gradients"].clone())
        self._set(self.x, at)
