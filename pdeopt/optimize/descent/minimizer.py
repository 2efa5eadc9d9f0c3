"""What all optimizers of a smooth function share: settings, the loop, units, calls that are counted, TAO, restarts.

An optimizer writes `start` and `step`, and `memory` and `recall` for what it remembers beside its point.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
from typing import Any, ClassVar

import torch
from petsc4py import PETSc
from torch import Tensor

from pdeopt.core.autodiff import in_turn
from pdeopt.core.errors import InputError
from pdeopt.core.monitor import DescentRecord, History, Monitor, Reason, Result, print_monitor, remedy
from pdeopt.core.settings import Settings, check, read, setting
from pdeopt.functions import border
from pdeopt.functions.smooth import SmoothFunction, Tally
from pdeopt.functions.units import in_units, unit_of
from pdeopt.optimize.descent import taotype
from pdeopt.optimize.parts.linesearch import Ray
from pdeopt.optimize.parts.loop import Observer, iterate
from pdeopt.optimize.parts.progress import NOISE, Stagnation

#: The settings of a method.
SettingsGroup = type[Settings]

#: Part of the first gradient's norm at which a run has converged, where nobody says.
RTOL = 1e-8


@dataclass(frozen=True)
class StopSettings(Settings, prefix="opt_"):
    """When optimizers of smooth functions stop."""

    max_it: int = setting(1000, "iterations at most", at_least=0)
    max_gradients: int = setting(0, "gradients at most, those of parts and samples too; 0 for no limit", at_least=0)
    max_work: float = setting(0.0, "calls at most, in equivalents of full gradients; 0 for no limit", at_least=0)
    gtol: float = setting(None, "norm of the gradient at which a run has converged", kind=float, at_least=0)
    rtol: float = setting(
        None,
        f"the same as part of the first norm; {RTOL:g} where there is no gtol either; of both, what is met first",
        kind=float,
        at_least=0,
    )
    target: float = setting(None, "value of the function at which a run ends", kind=float)
    monitor: bool = setting(False, "print a line an iteration")

    def tolerance(self, first: float) -> float:
        """Norm of the gradient at which a run has converged whose first gradient has this norm."""
        relative = RTOL if self.gtol is None and self.rtol is None else self.rtol or 0.0
        return max(self.gtol or 0.0, relative * first if math.isfinite(first) else 0.0)

    def stalled(self) -> Reason:
        """Why to stop where nothing is gained any more, for reasons that are not the derivatives'."""
        is_given = self.gtol is not None or self.rtol is not None
        return Reason.DIVERGED_STAGNATION if is_given else Reason.CONVERGED_ROUNDING


class Minimizer(ABC):
    """min f(x) over x in R^n: what all optimizers of a `SmoothFunction` share.

    A subclass states its `Settings` and writes `start` and `step`; the loop, limits, records, restarts and the way from
    TAO are here::

        class SteepestDescent(Minimizer):
            Settings = SteepestDescentSettings                  # with a field `size`

            def step(self) -> Reason:
                self.x = self.x - self.settings.size * self.g
                self.f, self.g = self.function.value_and_gradient(self.x)
                return Reason.ITERATING

    An optimizer is used once or many times; each call of `minimize` is a run of its own::

        solver = LBFGS(function, memory=20, gtol=1e-6)
        result = solver.minimize(torch.zeros(function.size, dtype=torch.float64))
        result.converged, result.design, result.history["objective"]

    All calls are collective over `function.comm`. Numbers are of double precision. A step that raises `SolveFailure`
    ends the run with a reason, and the last good point is returned. Functions with values and gradients beyond 1e10 or
    below 1e-10 are minimized in units of their own: f, g and `function` of this object are then in this `unit`, and
    records and results in that of the user.

    Args:
        function: f; TAO's objective where this object is the context of a TAO of type python.
        settings: of the method; by default from the options `-{prefix}{Settings.prefix}*`.
        stop: when to stop; by default from the options `-{prefix}opt_*`.
        prefix: of the options.
        **defaults: settings of either kind that replace the defaults; options win.

    Attributes:
        x, f, g: the present point, its value and gradient.
        radius: step size or trust radius of the last step.
        note: what happened to it.
        unit: of f and g; 1 for usual functions.
        gtol: norm of the gradient at which this run has converged, in the unit.
        highest: value of the start, which no step exceeds, in the unit; infinite where values of the start and of later
            points are of different functions.
        is_monotone: whether values never rise: a run that gains nothing for long has then stagnated.
        is_limited: whether a trust radius has limited the last step: what it gains says nothing of a minimum.

    Raises:
        InputError: settings that the method does not have, or that are not legal.
    """

    Settings: ClassVar[SettingsGroup]
    Record: ClassVar[type[DescentRecord]] = DescentRecord  # of its history
    has_units: ClassVar[bool] = True  # whether the unit of f matters to it

    x: Tensor
    f: float
    g: Tensor
    settings: Any
    stop: Any
    unit: float = 1.0
    gtol: float = 0.0
    highest: float = math.inf
    is_monotone: bool = False
    is_limited: bool = False
    first: float = math.nan  # norm of the first gradient

    def __init__(
        self,
        function: SmoothFunction | None = None,
        settings: Any = None,
        stop: StopSettings | None = None,
        prefix: str = "",
        **defaults: Any,
    ) -> None:
        own, shared = ({field.name for field in fields(cls)} for cls in (self.Settings, StopSettings))
        if unknown := set(defaults) - own - shared:
            raise InputError(
                f"{type(self).__name__}: setting", ", ".join(sorted(unknown)), ", ".join(sorted(own | shared))
            )
        mine = {key: value for key, value in defaults.items() if key in own}
        rest = {key: value for key, value in defaults.items() if key in shared}
        self.settings = read(self.Settings, prefix, **mine) if settings is None else settings
        self.stop = read(StopSettings, prefix, **rest) if stop is None else stop
        check(self.settings)
        self.prefix = prefix
        if function is not None:
            self.attach(function)

    def attach(self, function: SmoothFunction) -> None:
        """Make `function` the one that is minimized."""
        self._given, self.unit = function, 1.0
        self.adopt(function)
        self._before = function.tally.copy()  # for steps without `minimize`, as a part of another method

    def adopt(self, function: SmoothFunction) -> None:
        """Prepare for this function; subclasses do more."""
        self.function = function

    def measure_in(self, unit: float) -> None:
        """Minimize the function in this unit from now on."""
        if unit != self.unit:
            self.unit = unit
            self.adopt(self._given if unit == 1.0 else in_units(self._given, unit))

    def setFromOptions(self, tao: PETSc.TAO) -> None:
        """TAO's hook: read the settings again, with its prefix."""
        type(self).__init__(self, prefix=tao.getOptionsPrefix() or "")

    def solve(self, tao: PETSc.TAO) -> None:
        """TAO's hook: minimize its objective from its solution, which is overwritten."""
        taotype.solve(self, tao)

    @in_turn
    def minimize(
        self,
        x: Tensor,
        *,
        monitors: Sequence[Monitor] = (),
        observers: Sequence[Observer] = (),
        until: Callable[[Any], bool] | None = None,
        memory: dict[str, Any] | None = None,
        history: History | None = None,
        unit: float | None = None,
        **given: Any,
    ) -> Result:
        """Go down from x, (size,) real numbers of any kind, which are copied. Collective.

        Args:
            monitors: called with each record.
            observers: called with this object and the history after each record.
            until: of this object: whether to stop as converged.
            memory, history: what `memory()` and the history were: go on with the same iterates; x is then ignored, and
                the function's tally goes on from that of the run.
            unit: of f, a power of two; by default it is found from the first value and gradient.
            **given: what `start` takes beside x: `known`, the pair f(x) and f'(x), where the caller knows it.

        Returns:
            the last point, a tensor, with the history of `DescentRecord`; it is never worse than the start.

        Raises:
            InputError: x is not of the function's size, or not finite; a memory that is not this method's.
        """
        x = border.start(x, self.function.size)
        if memory is None:
            self._before = self.function.tally.copy()
            self._begin(x, unit, given)
        else:
            self.radius, self.note = math.nan, "start"
            _recall(self, memory)
        if self.stop.monitor:
            monitors = [print_monitor(PETSc.COMM_WORLD, type(self).__name__), *monitors]
        stagnation = Stagnation()
        for record in _since_start(history)[:-1]:
            stagnation.take(record)

        def test(record: DescentRecord) -> Reason:
            has_stalled = stagnation.take(record) and self.is_monotone
            reason = self.test(record)
            if reason == Reason.ITERATING and until and until(self):
                return Reason.CONVERGED_TARGET
            if reason == Reason.ITERATING and has_stalled:
                return Reason.DIVERGED_STAGNATION if self.is_limited else self.stop.stalled()
            return reason

        result = iterate(self, test, monitors=monitors, observers=observers, history=history)
        _count_all(result.history, self.spent())
        return result

    def _begin(self, x: Tensor, unit: float | None, given: dict[str, Any]) -> None:
        """Start at x, once more where it turns out that f is to be measured in a unit of its own."""
        self.radius, self.note = math.nan, "start"
        self.measure_in(unit or 1.0)
        self.start(x.clone(), **given)
        found = 1.0 if unit is not None or not self.has_units else unit_of(self.f, self.optimality())
        if found != 1.0:
            self.radius, self.note = math.nan, "start"
            self.measure_in(found)
            if given.get("known") is not None:
                given = given | {"known": (given["known"][0] / found, given["known"][1] / found)}
            self.start(x.clone(), **given)

    def hand_over(self, inner: Minimizer) -> None:
        """Let another method, whose point is that of this one, begin as this one does."""
        inner.stop, inner.radius, inner.note = self.stop, self.radius, self.note

    def start(self, x: Tensor, known: tuple[float, Tensor] | None = None) -> None:
        """Begin at x, (size,) double precision, which is this object's to keep.

        Args:
            known: f(x) and f'(x), if the caller has them; else they are evaluated.
        """
        self.x = x
        self.f, self.g = self.function.value_and_gradient(x) if known is None else known
        self.note_first()

    def note_first(self) -> None:
        """Set what later points are compared with, at the start."""
        self.highest = self.f if math.isfinite(self.f) else math.inf
        self.first = self.optimality() * self.unit
        self.gtol = self.stop.tolerance(self.first) / self.unit

    def why_none(self, *rays: Ray) -> Reason:
        """Why no step along these rays serves: no values, wrong derivatives, or nothing more to be seen of f."""
        searched = [ray for ray in rays if ray.slope_at_start < 0]
        if searched and not any(ray.met_finite for ray in searched):
            return Reason.DIVERGED_NAN
        promised = max((ray.promised for ray in searched), default=0.0)
        is_lost = promised <= NOISE * abs(self.f) and not any(ray.doubt.is_settled for ray in searched)
        return self.stop.stalled() if is_lost else Reason.DIVERGED_STAGNATION

    @abstractmethod
    def step(self) -> Reason:
        """Move x, f and g; ITERATING, or why there is no next point. A step that fails leaves them."""

    def memory(self) -> dict[str, Any]:
        """What a restart needs, tensors and numbers; subclasses add what they remember."""
        tally = self.spent()
        return {
            "x": self.x.clone(),
            "f": self.f,
            "g": self.g.clone(),
            "radius": self.radius,
            "first": self.first,
            "highest": self.highest,
            "unit": self.unit,
            "tally": torch.tensor(astuple(tally), dtype=torch.float64),
        }

    def recall(self, memory: dict[str, Any]) -> None:
        """Go on from the `memory` of an earlier run."""
        self.x, self.f, self.g = memory["x"].clone(), float(memory["f"]), memory["g"].clone()
        self.radius = float(memory["radius"])
        self.first, self.highest = float(memory["first"]), float(memory["highest"])
        self.gtol = self.stop.tolerance(self.first) / self.unit

    def spent(self) -> Tally:
        """Calls of the function since the start."""
        return self.function.tally - self._before

    def record(self, iteration: int) -> DescentRecord:
        """The present point in numbers."""
        tally = self.spent()
        return DescentRecord(
            iteration,
            self.f * self.unit,
            self.optimality() * self.unit,
            self.radius,
            int(tally.values),
            int(tally.gradients),
            int(tally.hessian_products),
            tally.work,
            self.note,
        )

    def optimality(self) -> float:
        """|f'| at x."""
        return self.function.norm(self.g)

    def unsolved(self) -> DescentRecord:
        """What stands for a start without a value."""
        return DescentRecord(0, math.nan, math.nan, math.nan, 0, 0, 0, 0.0, "start")

    def remedy(self, reason: Reason) -> str:
        """What to try next, by the options of this object."""
        return remedy(reason, "opt").replace("-opt_", f"-{self.prefix}opt_")

    def result(self, reason: Reason, message: str, history: History) -> Result:
        """The point that is returned, with why the run ended."""
        return Result(self.x, reason, message, history)

    def test(self, record: DescentRecord) -> Reason:
        """Why to stop at a record, or ITERATING."""
        stop = self.stop
        if not (math.isfinite(record.objective) and math.isfinite(record.optimality)):
            return Reason.DIVERGED_NAN
        if record.optimality <= self.gtol * self.unit:
            return Reason.CONVERGED_OPTIMALITY
        if stop.target is not None and record.objective <= stop.target:
            return Reason.CONVERGED_TARGET
        if record.iteration >= stop.max_it:
            return Reason.DIVERGED_MAX_IT
        spent = 0 < stop.max_gradients <= record.gradients or 0 < stop.max_work <= record.work
        return Reason.WORK_DONE if spent else Reason.ITERATING


def _recall(method: Minimizer, memory: dict[str, Any]) -> None:
    """Let a method go on from a memory that has all that it remembers, and nothing else."""
    what, legal = f"memory of {type(method).__name__}", "what `memory` of this method and function gave"
    try:
        method.measure_in(float(memory["unit"]))
        method.function.tally.set(Tally(*memory["tally"].tolist()))  # sums go on without another rounding
        method._before = Tally()
        method.recall(memory)
        again = method.memory()
    except InputError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise InputError(what, f"one that does not fit ({type(error).__name__}: {error})", legal) from error
    if unlike := sorted(set(again) ^ set(memory)):
        raise InputError(what, f"one with other entries ({', '.join(unlike[:3])})", legal)
    fits = method.x.shape == method.g.shape == (method.function.size,)
    tensors = [value for value in memory.values() if isinstance(value, Tensor)]
    if not fits or any(value.is_floating_point() and value.dtype != torch.float64 for value in tensors):
        raise InputError(what, f"unknowns of shape {tuple(method.x.shape)}, {method.x.dtype}", legal)


def _since_start(history: History | None) -> list[Any]:
    """The records since the last start: a run may go on with another function, whose values are others."""
    records = history.records if history else []
    first = max((place for place, record in enumerate(records) if record.note == "start"), default=0)
    return records[first:]


def _count_all(history: History, tally: Tally) -> None:
    """Let the last record count what came after it, too: a step that failed, a comparison with the start."""
    if history.records:
        last = history.records[-1]
        known = {name: amount for name, amount in asdict(tally).items() if hasattr(last, name)}
        counts = {name: amount if name == "work" else int(amount) for name, amount in known.items()}
        history.records[-1] = replace(last, **counts)


def flattened(nested: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Dictionaries in one, with dots in the names."""
    return {f"{name}.{key}": value for name, inner in nested.items() for key, value in inner.items()}


def part_of(memory: dict[str, Any], name: str) -> dict[str, Any]:
    """The dictionary of this name among those that `flattened` has put into one; empty where there is none."""
    return {key.removeprefix(f"{name}."): value for key, value in memory.items() if key.startswith(f"{name}.")}
