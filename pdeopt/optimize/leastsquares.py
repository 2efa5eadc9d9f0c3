"""min |r(x)|^2 by SciPy's conventions::

    result = po.least_squares(lambda x: [10 * (x[1] - x[0] ** 2), 1 - x[0]], [-1.2, 1.0])
    result.x, result.cost, result.success           # array([1., 1.]), 0.0, True, up to the tolerances

For residuals with structure write a `ResidualFunction` and call `LevenbergMarquardt`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pdeopt.core.autodiff import in_turn
from pdeopt.core.errors import InputError
from pdeopt.core.monitor import History, Reason
from pdeopt.core.settings import check
from pdeopt.functions import border
from pdeopt.optimize.blackbox import Kind, box, first_point
from pdeopt.optimize.descent.minimizer import StopSettings
from pdeopt.optimize.parts.bounds import Bounds
from pdeopt.optimize.results import LeastSquaresResult
from pdeopt.optimize.squares.dampedsteps import LevenbergSettings
from pdeopt.optimize.squares.levenberg import LevenbergMarquardt
from pdeopt.squares.residual import ResidualFunction

#: Relative steps of differences, by the word for them.
DIFFERENCES = {"2-point": 2.0**-26, "3-point": 2.0**-17}
#: Unknowns up to which the damping follows a trust radius.
BY_RADIUS = 300
#: Points whose residuals are remembered: those that an iteration looks at.
REMEMBERED = 30


class UserResiduals(ResidualFunction):
    """A black box r of arrays or tensors, called in double precision, once at each point.

    Args:
        fun, jac: as for `least_squares`.
        x: where r is first asked for, to see how many rows it has.
        as_tensor: whether they are called with tensors.

    Attributes:
        nfev, njev: calls.
    """

    def __init__(self, fun: Any, jac: Any, x: Tensor, as_tensor: bool) -> None:
        if not (jac is None or callable(jac) or (isinstance(jac, str) and jac in DIFFERENCES)):
            legal = f"a function x -> J | {' | '.join(DIFFERENCES)} | None, for torch"
            raise InputError("jac", border.described(jac), legal)
        self.fun, self.jac, self.as_tensor = fun, jac, as_tensor or jac is None
        self.nfev = self.njev = 0
        self._known: dict[bytes, Tensor] = {}
        first = self._call(x)
        self.nfev, self._known = 1, {x.numpy().tobytes(): first}
        super().__init__(len(x), len(first))

    def _residual(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        key = x.numpy().tobytes()
        if key not in self._known:
            self.nfev += 1
            self._known[key] = self._call(x)
            if len(self._known) > REMEMBERED:
                del self._known[next(iter(self._known))]
        return self._known[key] if rows is None else self._known[key][rows]

    def _linearize(self, x: Tensor, rows: Tensor | None = None, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.njev += 1
        r = self._residual(x)
        if callable(self.jac):
            J = border.real(self.jac(self._out(x)))
            if J is None or J.size != self.rows * self.size:
                raise InputError("Jacobian", border.described(J), f"({self.rows}, {self.size}) real numbers")
            matrix = torch.from_numpy(np.array(J, dtype=float)).reshape(self.rows, self.size)
        else:
            matrix = self._graph(x) if self.jac is None else self._differences(x, r)
        return (r, matrix) if rows is None else (r[rows], matrix[rows])

    def _jvp(self, x: Tensor, d: Tensor, rows: Tensor | None = None) -> Tensor:
        return self._linearize(x, rows)[1] @ d

    def _vjp(self, x: Tensor, w: Tensor, rows: Tensor | None = None) -> Tensor:
        return self._linearize(x, rows)[1].T @ w

    def _value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        r, J = self._linearize(x)
        return float(r @ r), 2.0 * (J.T @ r)

    def _call(self, x: Tensor) -> Tensor:
        if self.jac is not None:
            return _vector(self.fun(self._out(x)))
        try:
            return _vector(self.fun(x.clone()))
        except InputError:
            raise
        except Exception as found:  # whatever a function for arrays does with a tensor
            raise _no_jacobian(f"a function that fails with tensors ({type(found).__name__}: {found})") from found

    def _graph(self, x: Tensor) -> Tensor:
        """J by torch, row by row of r."""
        with torch.enable_grad():
            leaf = x.clone().requires_grad_()
            r = self.fun(leaf)
            r = torch.stack([torch.as_tensor(each) for each in r]) if isinstance(r, (list, tuple)) else r
        if not (isinstance(r, Tensor) and r.requires_grad):
            raise _no_jacobian(f"a function that returns {type(r).__name__} without a graph")
        rows = [torch.autograd.grad(each, leaf, retain_graph=True, allow_unused=True)[0] for each in r.reshape(-1)]
        return torch.stack([torch.zeros_like(x) if row is None else row for row in rows]).double()

    def _differences(self, x: Tensor, r: Tensor) -> Tensor:
        """J by differences, column by column, forward or central."""
        columns = []
        for i in range(self.size):
            e = torch.zeros_like(x)
            e[i] = DIFFERENCES[self.jac] * max(1.0, abs(float(x[i])))
            ahead = _vector(self.fun(self._out(x + e)))
            behind, width = (r, (x + e - x)[i]) if self.jac == "2-point" else (None, (x + e - (x - e))[i])
            behind = _vector(self.fun(self._out(x - e))) if behind is None else behind
            columns.append((ahead - behind) / width)
        return torch.stack(columns, 1)

    def _out(self, x: Tensor) -> Any:
        """A copy for the user, who may keep it or write to it."""
        return x.clone() if self.as_tensor else x.numpy().copy()


@in_turn
def least_squares(
    fun: Callable[..., Any],
    x0: Any,
    jac: Callable[..., Any] | str | None = None,
    bounds: Any = None,
    ftol: float | None = 1e-8,
    xtol: float | None = 1e-8,
    gtol: float | None = 1e-8,
    x_scale: str = "identity",
    max_nfev: int | None = None,
    verbose: int = 0,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    callback: Callable[..., Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> LeastSquaresResult:
    """min |r(x)|^2 / 2 over x in R^n, or in a box, by Levenberg-Marquardt, as `scipy.optimize.least_squares` is called.

    The damping follows a trust radius, by singular values, up to some hundred unknowns; for more it is searched for.
    All numbers are of double precision inside. Errors that `fun` and `jac` raise come through. Where the residuals are
    not finite the step is refused.

    Args:
        fun: x, (n,) -> r(x), (m,), as an array, a tensor or a list; x is a tensor where x0 is one, or where torch
            differentiates.
        x0: where to begin: n numbers as an array, a tensor, or a list. It is moved into the bounds.
        jac: x -> J(x), (m, n); "2-point" or "3-point" for differences; None for torch's automatic differentiation,
            which needs a `fun` that works on tensors (plain arithmetic does).
        bounds: (lowest, highest), two numbers or two vectors, or a `scipy.optimize.Bounds`.
        ftol: relative decrease of the cost at which a run has converged; None for none.
        xtol: relative length of a step at which it has; None for none.
        gtol: largest entry of J'r, projected, at which it has; None for none.
        x_scale: how steps are measured: "identity", or "jac", in the largest columns of J so far.
        max_nfev: calls of `fun` at most, differences not counted; 100 n by default.
        verbose: 2 prints a line an iteration.
        args, kwargs: more arguments of `fun` and `jac`, after x.
        callback: called with each new point; StopIteration ends the run.
        options: of `LevenbergSettings`, such as `damping`, `geodesic`, `linear`. The options database is not asked.

    Returns:
        the last point with residuals, Jacobian, calls, reason and history.

    Raises:
        InputError: an option, bounds or a shape that is not legal, or a function without a Jacobian.
    """
    if not callable(fun):
        raise InputError("fun", border.described(fun), "a function x -> r(x)")
    if x_scale not in ("jac", "identity"):
        raise InputError("x_scale", repr(x_scale), "jac | identity")
    more, words = args if isinstance(args, tuple) else (args,), dict(kwargs or {})
    jac_too = (lambda x: jac(x, *more, **words)) if callable(jac) else jac
    with torch.inference_mode(False):  # torch does not differentiate the tensors that are made in it
        x = first_point(x0)
        scaling = "diagonal" if x_scale == "jac" else "identity"
        given = black_box(len(x)) | {"scaling": scaling, "ftol": ftol or 0.0, "xtol": xtol or 0.0}
        settings = _settings(given, options)
        limits = None if bounds is None else Bounds(*_ends(bounds, len(x)))
        x = x if limits is None else limits.nearest(x)
        function = UserResiduals(lambda x: fun(x, *more, **words), jac_too, x, isinstance(x0, Tensor))
        end = _End(function, Kind(x0), gtol or 0.0, max_nfev or 100 * len(x), callback)
        stop = StopSettings(max_it=10**9, gtol=0.0, monitor=verbose >= 2)
        method = LevenbergMarquardt(function, settings, stop, bounds=limits)
        result = method.minimize(x, observers=[end.observe], until=end)
    return _result(method, end, end.reason if end.reason != Reason.ITERATING else result.reason, result.history)


@dataclass
class _End:
    """When a run ends that the method itself would go on with."""

    function: UserResiduals
    kind: Kind
    gtol: float
    most: int
    callback: Callable[..., Any] | None
    reason: Reason = Reason.ITERATING

    def observe(self, method: LevenbergMarquardt, history: History) -> None:
        """Tell the user's callback of a new point."""
        if self.callback is not None and history[-1].iteration > 0:
            try:
                self.callback(self.kind.of(method.x))
            except StopIteration:
                self.reason = Reason.INTERRUPTED

    def __call__(self, method: LevenbergMarquardt) -> bool:
        if _optimality(method) <= self.gtol:
            self.reason = Reason.CONVERGED_OPTIMALITY
        elif self.reason == Reason.ITERATING and self.function.nfev >= self.most:
            self.reason = Reason.WORK_DONE
        return self.reason != Reason.ITERATING


def _optimality(method: LevenbergMarquardt) -> float:
    """The largest entry of J'r, projected."""
    g = 0.5 * method.g
    return float((g if method.bounds is None else method.bounds.stationarity(method.x, g)).abs().max())


def black_box(size: int) -> dict[str, Any]:
    """Settings for residuals of which nothing is known but that a call may be expensive.

    Args:
        size: n.
    """
    return {"rule": "radius", "geodesic": False} if size <= BY_RADIUS else {}


def _settings(given: dict[str, Any], options: Any) -> LevenbergSettings:
    if not (options is None or isinstance(options, Mapping)):
        raise InputError("options", border.described(options), "a dictionary")
    legal = [each.name for each in fields(LevenbergSettings)]
    if unknown := sorted(set(options or {}) - set(legal)):
        raise InputError("options", ", ".join(unknown), ", ".join(legal))
    settings = LevenbergSettings(**given | dict(options or {}))
    check(settings)
    return settings


def _ends(bounds: Any, size: int) -> tuple[Tensor, Tensor]:
    """The lowest and highest values, (n,) each, of a pair of numbers or vectors, as SciPy has it here."""
    if hasattr(bounds, "lb"):
        return box(bounds, size)
    legal = "a pair (lowest, highest) of numbers or vectors, or scipy.optimize.Bounds"
    try:
        low, high = (np.broadcast_to(np.asarray(end, dtype=float), size) for end in bounds)
    except (TypeError, ValueError) as error:
        raise InputError("bounds", border.described(bounds), legal) from error
    if not bool((low <= high).all()):
        raise InputError("bounds", "a lowest value above the highest", "lowest <= highest")
    return torch.from_numpy(low.copy()), torch.from_numpy(high.copy())


REMEDIES = {
    Reason.WORK_DONE: "raise max_nfev",
    Reason.DIVERGED_NAN: "the residuals or the Jacobian are not finite near the last good point, which is kept",
    Reason.DIVERGED_STAGNATION: "the residuals do not fall any more: check jac, or raise gtol",
    Reason.INTERRUPTED: "stopped by the callback",
}


def _result(method: LevenbergMarquardt, end: _End, reason: Reason, history: History) -> LeastSquaresResult:
    kind, at, words = end.kind, method.at, reason.name.replace("_", " ").lower()
    x = method.x
    mask = np.zeros(len(x), dtype=int)
    if method.bounds is not None:
        mask = ((x >= method.bounds.upper).int() - (x <= method.bounds.lower).int()).numpy().astype(int)
    J = at.J.matrix if at.J is not None else method.function.jacobian(x)
    return LeastSquaresResult(
        x=kind.of(x),
        cost=0.5 * at.f,
        fun=kind.of(at.r),
        jac=kind.of(J),
        grad=kind.of(0.5 * at.g),
        optimality=_optimality(method),
        active_mask=mask,
        nit=int(history[-1].iteration),
        nfev=end.function.nfev,
        njev=end.function.njev,
        success=reason > 0 and reason != Reason.WORK_DONE,
        status=reason,
        message=": ".join(part for part in (words, REMEDIES.get(reason, "")) if part),
        history=history,
    )


def _vector(found: Any) -> Tensor:
    """Residuals as a vector, (m,) double precision, of any kind of numbers."""
    if isinstance(found, (list, tuple)) and any(isinstance(each, Tensor) for each in found):
        found = torch.stack([torch.as_tensor(each) for each in found])
    array = border.real(found)
    if array is None or array.ndim > 1:
        raise InputError("residuals", border.described(found), "(m,) real numbers")
    return torch.from_numpy(np.array(array.reshape(-1), dtype=float))


def _no_jacobian(got: str) -> InputError:
    legal = 'jac=a function x -> J(x) | jac="2-point" | "3-point" | a fun written for torch tensors'
    return InputError("Jacobian, with jac=None", got, legal)
