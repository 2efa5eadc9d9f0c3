"""min f(x) by SciPy's conventions: arrays or tensors in, the same kind out::

    result = po.minimize(lambda x: (x[0] + 2 * x[1] - 7) ** 2 + (2 * x[0] + x[1] - 5) ** 2, [0.0, 0.0])
    result.x, result.fun, result.success            # array([1., 3.]), 0.0, True, up to the tolerance

For functions with structure (samples, coarser levels, parts, unknowns spread over ranks) write a `SmoothFunction` and
call an optimizer of `pdeopt.optimize`: here every function is a black box.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pdeopt.core.autodiff import in_turn
from pdeopt.core.errors import InputError
from pdeopt.core.monitor import History, Reason
from pdeopt.core.settings import Settings, check
from pdeopt.functions import border
from pdeopt.optimize.blackbox import Kind, UserFunction, box, first_point, with_arguments
from pdeopt.optimize.bounded import BoundedLBFGS
from pdeopt.optimize.descent.apts import APTS
from pdeopt.optimize.descent.minimizer import Minimizer, StopSettings
from pdeopt.optimize.descent.quasinewton import LBFGS, SSBroyden
from pdeopt.optimize.descent.schwarz import SPQN
from pdeopt.optimize.descent.trust import TrustRegionMinimizer
from pdeopt.optimize.leastsquares import UserResiduals, black_box
from pdeopt.optimize.results import MinimizeResult
from pdeopt.optimize.squares.levenberg import LevenbergMarquardt

#: The methods by their names.
METHODS: dict[str, type[Minimizer]] = {
    "lbfgs": LBFGS,
    "ssbroyden": SSBroyden,
    "spqn": SPQN,
    "tr": TrustRegionMinimizer,
    "apts": APTS,
    "lm": LevenbergMarquardt,
}
#: Those that keep to bounds.
BOUNDED = ("lbfgs",)
#: Those whose model of second order may come of Hessian products.
SECOND_ORDER = ("tr", "apts")
#: SciPy's names of options.
SCIPY_OPTIONS = {"maxiter": "max_it", "maxfun": "max_gradients", "maxcor": "memory", "disp": "monitor"}
#: Those that may be given as 1e4, or infinite.
WHOLE, NO_LIMIT = ("maxiter", "maxfun", "maxcor"), 2**31
#: SciPy's names of methods.
ALIASES = {"l-bfgs-b": "lbfgs"}


@in_turn
def minimize(
    fun: Callable[..., Any],
    x0: Any,
    args: Any = (),
    method: str | None = None,
    jac: Callable[..., Any] | bool | None = None,
    hess: Callable[..., Any] | None = None,
    hessp: Callable[..., Any] | None = None,
    bounds: Any = None,
    constraints: Any = (),
    tol: float | None = None,
    callback: Callable[..., Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> MinimizeResult:
    """min f(x) over x in R^n, or in a box, as `scipy.optimize.minimize` is called.

    All numbers are of double precision inside, whatever x0 has; `fun`, `jac`, `hess` and `hessp` are called so, too.
    Errors that they raise come through. The unit of f does not matter: 1e-200 f is minimized as f is.

    Args:
        fun: x, (n,) -> f(x), a number; x is a tensor where x0 is one, or where `fun` is differentiated by torch.
        x0: where to begin: n numbers as an array, a tensor, or a list. It is not changed.
        args: more arguments of `fun`, `jac`, `hess` and `hessp`, after x; one alone need not be a tuple.
        method: lbfgs, limited-memory BFGS, the default; ssbroyden, the dense self-scaled Broyden class, for up to some
            10^4 unknowns; spqn, Schwarz-preconditioned L-BFGS, for couplings that are mostly local; tr, a trust region;
            apts, a trust region preconditioned by parts; lm, Levenberg-Marquardt, for which `fun` returns the residuals
            r(x), (m,), and f is |r|^2; see `least_squares` for its `jac`.
        jac: x -> f'(x), (n,); True where `fun` returns the pair of both; None for torch's automatic differentiation,
            which needs a `fun` that works on tensors (plain arithmetic does).
        hess: x -> f''(x), (n, n), for "tr" and "apts".
        hessp: x, p -> f''(x) p, (n,), for the same; by default torch's products where torch differentiates `fun`
            twice, else secant pairs.
        bounds: (lowest, highest) for each unknown, None for no bound, or a `scipy.optimize.Bounds`; for lbfgs, which is
            then that of TAO.
        constraints: none can be taken.
        tol: the same as options["gtol"].
        callback: called with each new point as `callback(x)`, or with a `MinimizeResult` as
            `callback(intermediate_result)` where that is the parameter's name; StopIteration ends the run.
        options: `maxiter`, `maxfun`, `maxcor`, `disp`; `gtol`, tolerance of the Euclidean norm of f', or of the
            projected gradient with bounds, or `rtol`, the same relative to the first; by default rtol 1e-8. All of
            `StopSettings`, and of the method's settings, such as `LBFGSSettings`. The options database is not asked.

    Returns:
        the last point with value, gradient, calls, reason and history.

    Raises:
        InputError: a method, an option, bounds or a shape that is not legal, or a function without a gradient.

    Example:
        `po.minimize(lambda x: ((x - 1) ** 2).sum(), torch.zeros(3), method="tr").x` is a tensor of ones.
    """
    make = _method(method)
    name = make.Settings.prefix.rstrip("_")
    if bounds is not None and name not in BOUNDED:
        raise InputError(f"bounds with method {name}", "a method without bounds", " | ".join(BOUNDED))
    if not (constraints is None or (isinstance(constraints, (tuple, list)) and not constraints)):
        raise InputError("constraints", border.described(constraints), "none; bounds, or a penalty in fun")
    if not (callback is None or callable(callback)):
        raise InputError("callback", border.described(callback), "a function | None")
    for what, given in (("hess", hess), ("hessp", hessp)):
        if given is not None and name not in SECOND_ORDER:
            warnings.warn(
                f"method {name} takes no second derivatives: {what} is not used", RuntimeWarning, stacklevel=2
            )
    with torch.inference_mode(False):  # torch does not differentiate the tensors that are made in it
        start = first_point(x0)
        users = with_arguments(args, fun, jac, hessp, hess)
        is_tensor = isinstance(x0, Tensor)
        function: Any = (
            UserResiduals(*users[:2], start, is_tensor) if name == "lm" else UserFunction(*users, start, is_tensor)
        )
        words = _defaults(name, function, start)
        own, stop = _settings(make.Settings, words, _options(options, tol), bounded=bounds is not None)
        watch = _Watch(callback, function, Kind(x0))
        optimizer: Any = (
            make(function, own, stop)
            if bounds is None
            else BoundedLBFGS(function, *box(bounds, len(start)), own.memory, stop)
        )
        result = optimizer.minimize(start, observers=[watch], until=lambda _: watch.stopped)
        f, g = optimizer.f * optimizer.unit, optimizer.g * optimizer.unit
        return _result(watch, result.design, f, g, result.reason, result.history)


def _method(method: Any) -> type[Minimizer]:
    word = "lbfgs" if method is None else method.lower() if isinstance(method, str) else method
    if not isinstance(word, str) or (word := ALIASES.get(word, word)) not in METHODS:
        raise InputError("method", repr(method), " | ".join(METHODS))
    return METHODS[word]


# -- options -----------------------------------------------------------------------------------------------


def _defaults(name: str, function: Any, x: Tensor) -> dict[str, Any]:
    """Settings of a method that black boxes of any size can have."""
    words: dict[str, Any] = {"max_it": max(1000, 200 * len(x))} | (black_box(len(x)) if name == "lm" else {})
    if name in SECOND_ORDER and function.has_products(x):
        words["model"] = "hvp"
    return words


def _options(options: Any, tol: Any) -> dict[str, Any]:
    """Options as Python's numbers; those that are None are not given."""
    if not (options is None or isinstance(options, Mapping)):
        raise InputError("options", border.described(options), "a dictionary")
    given = {} if tol is None else {"gtol": tol}
    given = given | {name: value for name, value in (options or {}).items() if value is not None}
    for name, value in given.items():
        if isinstance(value, (np.generic, np.ndarray, Tensor)) and np.size(value) == 1:
            given[name] = value = value.item()
        if name == "disp":
            given[name] = bool(value)
        elif name in WHOLE and isinstance(value, float) and (value.is_integer() or value == math.inf):
            given[name] = NO_LIMIT if value == math.inf else int(value)
    if given.get("maxfun") == 0:  # the start is evaluated in any case; for us 0 is no limit
        given["maxfun"] = 1
    return given


def _settings(
    group: type[Settings], words: dict[str, Any], options: Mapping[str, Any], bounded: bool
) -> tuple[Any, StopSettings]:
    """The settings of the method and of the end of the run."""
    names = [[each.name for each in fields(cls)] for cls in (StopSettings, group)]
    if bounded:
        names[1] = ["memory"]
    scipys = [name for name, own in SCIPY_OPTIONS.items() if own in names[0] + names[1]]
    legal = [*scipys, *names[0], *names[1]]
    if unknown := sorted(set(options) - set(legal)):
        raise InputError("options", ", ".join(unknown), ", ".join(legal))
    given = words | {SCIPY_OPTIONS.get(name, name): value for name, value in options.items()}
    stop = StopSettings(**{name: given[name] for name in names[0] if name in given})
    own = group(**{name: given[name] for name in names[1] if name in given})
    check(stop)
    check(own)
    return own, stop


# -- while it runs, and after ------------------------------------------------------------------------------


@dataclass
class _Watch:
    """Tells the user's callback of each new point."""

    callback: Callable[..., Any] | None
    function: Any
    kind: Kind
    stopped: bool = False

    def __call__(self, optimizer: Any, history: History) -> None:
        if self.callback is None or history[-1].iteration == 0:
            return
        try:
            if self._takes_result():
                f = optimizer.f * optimizer.unit
                self.callback(intermediate_result=MinimizeResult(x=self.kind.of(optimizer.x), fun=f))
            else:
                self.callback(self.kind.of(optimizer.x))
        except StopIteration:
            self.stopped = True

    def _takes_result(self) -> bool:
        try:
            return "intermediate_result" in inspect.signature(self.callback).parameters  # type: ignore[arg-type]
        except (TypeError, ValueError):  # a function of C without a signature
            return False


CHECK = "f does not fall any more: check the derivatives, jac by scipy.optimize.check_grad, or raise options['gtol']"
_REMEDIES = {
    Reason.DIVERGED_MAX_IT: "raise options['maxiter'], or start closer to a minimum",
    Reason.WORK_DONE: "raise options['maxfun'] or options['max_work']",
    Reason.DIVERGED_NAN: "the value or gradient is not finite near the last good point, which is kept",
    Reason.DIVERGED_LINE_SEARCH: CHECK,
    Reason.DIVERGED_STAGNATION: CHECK,
}


def _result(watch: _Watch, x: Tensor, f: float, g: Tensor, reason: Reason, history: History) -> MinimizeResult:
    stopped = watch.stopped and not reason < 0
    words = "stopped by the callback" if stopped else reason.name.replace("_", " ").lower()
    function = watch.function
    return MinimizeResult(
        x=watch.kind.of(x),
        fun=f,
        jac=watch.kind.of(g),
        nit=int(history[-1].iteration),
        nfev=function.nfev,
        njev=function.njev,
        nhev=getattr(function, "nhev", 0),
        success=reason > 0 and reason != Reason.WORK_DONE and not stopped,
        status=reason,
        message=": ".join(part for part in (words, _REMEDIES.get(reason, "")) if part),
        history=history,
    )
