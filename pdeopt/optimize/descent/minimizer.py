"""What all optimizers of a smooth function share: settings, the loop, calls that are counted, TAO, restarts.

An optimizer writes `start` and `step`, and `memory` and `recall` for what it remembers beside its point.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any, ClassVar

import torch
from petsc4py import PETSc
from torch import Tensor

from pdeopt.core.errors import InputError
from pdeopt.core.monitor import DescentRecord, History, Monitor, Reason, Result, print_monitor
from pdeopt.core.settings import Settings, check, read, setting
from pdeopt.functions.smooth import SmoothFunction, Tally
from pdeopt.optimize.descent import taotype
from pdeopt.optimize.parts.loop import Observer, iterate

#: The settings of a method.
SettingsGroup = type[Settings]


@dataclass(frozen=True)
class StopSettings(Settings, prefix="opt_"):
    """When optimizers of smooth functions stop."""

    max_it: int = setting(1000, "iterations at most", at_least=0)
    max_gradients: int = setting(0, "gradients at most, those of parts and samples too; 0 for no limit", at_least=0)
    max_work: float = setting(0.0, "calls at most, in equivalents of full gradients; 0 for no limit", at_least=0)
    gtol: float = setting(1e-8, "norm of the gradient at which a run has converged", at_least=0)
    target: float = setting(None, "value of the function at which a run ends", kind=float)
    monitor: bool = setting(False, "print a line an iteration")


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
    ends the run with a reason, and the last good point is returned.

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

    Raises:
        InputError: settings that the method does not have, or that are not legal.
    """

    Settings: ClassVar[SettingsGroup]

    x: Tensor
    f: float
    g: Tensor
    settings: Any
    stop: Any

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
        if function is not None:
            self.attach(function)

    def attach(self, function: SmoothFunction) -> None:
        """Make `function` the one that is minimized."""
        self.function = function
        self._before = function.tally.copy()  # for steps without `minimize`, as a part of another method

    def setFromOptions(self, tao: PETSc.TAO) -> None:
        """TAO's hook: read the settings again, with its prefix."""
        type(self).__init__(self, prefix=tao.getOptionsPrefix() or "")

    def solve(self, tao: PETSc.TAO) -> None:
        """TAO's hook: minimize its objective from its solution, which is overwritten."""
        taotype.solve(self, tao)

    def minimize(
        self,
        x: Tensor,
        *,
        monitors: Sequence[Monitor] = (),
        observers: Sequence[Observer] = (),
        until: Callable[[Any], bool] | None = None,
        memory: dict[str, Any] | None = None,
        history: History | None = None,
        **given: Any,
    ) -> Result:
        """Go down from x, (size,), which is copied. Collective.

        Args:
            monitors: called with each record.
            observers: called with this object and the history after each record.
            until: of this object: whether to stop as converged.
            memory, history: what `memory()` and the history were: go on with the same iterates; x is then ignored.
            **given: what `start` takes beside x: `known`, the pair f(x) and f'(x), where the caller knows it.

        Returns:
            the last point, a tensor, with the history of `DescentRecord`; it is never worse than the start.

        Raises:
            InputError: x is not of the function's size, or not finite.
        """
        _check_start(x, self.function.size)
        self.radius, self.note = math.nan, "start"
        if memory is None:
            self._before = self.function.tally.copy()
            self.start(x.detach().to(torch.float64).clone(), **given)
        else:
            self._before = self.function.tally - Tally(*memory["tally"].tolist())
            self.recall(memory)
        if self.stop.monitor:
            monitors = [print_monitor(PETSc.COMM_WORLD, type(self).__name__), *monitors]

        def test(record: DescentRecord) -> Reason:
            reason = self.test(record)
            return Reason.CONVERGED_TARGET if reason == Reason.ITERATING and until and until(self) else reason

        return iterate(self, test, monitors=monitors, observers=observers, history=history)

    def start(self, x: Tensor, known: tuple[float, Tensor] | None = None) -> None:
        """Begin at x, (size,) double precision, which is this object's to keep.

        Args:
            known: f(x) and f'(x), if the caller has them; else they are evaluated.
        """
        self.x = x
        self.f, self.g = self.function.value_and_gradient(x) if known is None else known

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
            "tally": torch.tensor(astuple(tally), dtype=torch.float64),
        }

    def recall(self, memory: dict[str, Any]) -> None:
        """Go on from the `memory` of an earlier run."""
        self.x, self.f, self.g = memory["x"].clone(), float(memory["f"]), memory["g"].clone()
        self.radius = float(memory["radius"])

    def spent(self) -> Tally:
        """Calls of the function since the start."""
        return self.function.tally - self._before

    def record(self, iteration: int) -> DescentRecord:
        """The present point in numbers."""
        tally = self.spent()
        return DescentRecord(
            iteration,
            self.f,
            self.optimality(),
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

    def result(self, reason: Reason, message: str, history: History) -> Result:
        """The point that is returned, with why the run ended."""
        return Result(self.x, reason, message, history)

    def test(self, record: DescentRecord) -> Reason:
        """Why to stop at a record, or ITERATING."""
        stop = self.stop
        if not (math.isfinite(record.objective) and math.isfinite(record.optimality)):
            return Reason.DIVERGED_NAN
        if record.optimality <= stop.gtol:
            return Reason.CONVERGED_OPTIMALITY
        if stop.target is not None and record.objective <= stop.target:
            return Reason.CONVERGED_TARGET
        if record.iteration >= stop.max_it:
            return Reason.DIVERGED_MAX_IT
        spent = 0 < stop.max_gradients <= record.gradients or 0 < stop.max_work <= record.work
        return Reason.DIVERGED_MAX_WORK if spent else Reason.ITERATING


def _check_start(x: Tensor, size: int) -> None:
    if x.shape != (size,):
        raise InputError("start", f"a tensor of shape {tuple(x.shape)}", f"({size},), the unknowns")
    if not bool(torch.isfinite(x).all()):
        raise InputError("start", "entries that are not finite", "finite numbers")


def flattened(nested: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Dictionaries in one, with dots in the names."""
    return {f"{name}.{key}": value for name, inner in nested.items() for key, value in inner.items()}


def part_of(memory: dict[str, Any], name: str) -> dict[str, Any]:
    """The dictionary of this name among those that `flattened` has put into one; empty where there is none."""
    return {key.removeprefix(f"{name}."): value for key, value in memory.items() if key.startswith(f"{name}.")}
