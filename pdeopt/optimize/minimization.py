"""min f(x) by SciPy's conventions: arrays or tensors in, the same kind out::

    result = po.minimize(lambda x: (x[0] + 2 * x[1] - 7) ** 2 + (2 * x[0] + x[1] - 5) ** 2, [0.0, 0.0])
    result.x, result.fun, result.success            # array([1., 3.]), 0.0, True, up to the tolerance

For functions with structure (samples, coarser levels, parts, unknowns spread over ranks) write a `SmoothFunction` and
call an optimizer of `pdeopt.optimize`: here every function is a black box.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pdeopt.core.errors import InputError
from pdeopt.core.monitor import History, Reason
from pdeopt.core.settings import Settings, check
from pdeopt.functions.smooth import SmoothFunction
from pdeopt.optimize.bounded import BoundedLBFGS
from pdeopt.optimize.descent.apts import APTS
from pdeopt.optimize.descent.minimizer import Minimizer, StopSettings
from pdeopt.optimize.descent.quasinewton import LBFGS, SSBroyden
from pdeopt.optimize.descent.schwarz import SPQN
from pdeopt.optimize.descent.trust import TrustRegionMinimizer

#: The methods by their names.
METHODS: dict[str, type[Minimizer]] = {
    "lbfgs": LBFGS,
    "ssbroyden": SSBroyden,
    "spqn": SPQN,
    "tr": TrustRegionMinimizer,
    "apts": APTS,
}
#: Those that keep to bounds.
BOUNDED = ("lbfgs",)
#: Those whose model of second order may come of Hessian products.
SECOND_ORDER = ("tr", "apts")
#: SciPy's names of options.
SCIPY_OPTIONS = {"maxiter": "max_it", "maxfun": "max_gradients", "disp": "monitor"}
#: SciPy's tolerance of the gradient; in the Euclidean norm, the stricter one.
GTOL = 1e-5


class MinimizeResult(dict[str, Any]):
    """What `minimize` found; `result.x` and `result["x"]` are the same.

    Attributes:
        x: the last point, (n,), of the kind and type of x0.
        fun: f there.
        jac: f' there, (n,), as x.
        nit: iterations.
        nfev, njev, nhev: values, gradients and Hessian products that were asked for.
        success: whether the tolerance was met.
        status: the `Reason` why it stopped; see there.
        message: the same in words.
        history: a `DescentRecord` an iteration; `history["objective"]` is a column.
    """

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"{name!r}: the result has {', '.join(self)}")
        return self[name]

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self]

    def __repr__(self) -> str:
        shown = {name: value for name, value in self.items() if name != "history"}
        width = max(map(len, shown), default=0)
        return "\n".join(f"{name:>{width}}: {value}" for name, value in shown.items())


def minimize(
    fun: Callable[..., Any],
    x0: Any,
    jac: Callable[..., Any] | bool | None = None,
    hessp: Callable[..., Any] | None = None,
    method: str = "lbfgs",
    bounds: Any = None,
    callback: Callable[..., Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> MinimizeResult:
    """min f(x) over x in R^n, or in a box, as `scipy.optimize.minimize` is called.

    All numbers are of double precision inside, whatever x0 has; `fun`, `jac` and `hessp` are called so, too.

    Args:
        fun: x, (n,) -> f(x), a number; x is a tensor where x0 is one, or where `fun` is differentiated by torch.
        x0: where to begin: n numbers as an array, a tensor, or a list. It is not changed.
        jac: x -> f'(x), (n,); True where `fun` returns the pair of both; None for torch's automatic differentiation,
            which needs a `fun` that works on tensors (plain arithmetic does).
        hessp: x, p -> f''(x) p, (n,), for "tr" and "apts"; by default torch's products where torch differentiates `fun`
            twice, else secant pairs.
        method: lbfgs, limited-memory BFGS; ssbroyden, the dense self-scaled Broyden class, for up to some 10^4
            unknowns; spqn, Schwarz-preconditioned L-BFGS, for couplings that are mostly local; tr, a trust region;
            apts, a trust region preconditioned by parts.
        bounds: (lowest, highest) for each unknown, None for no bound, or a `scipy.optimize.Bounds`; for lbfgs, which is
            then that of TAO.
        callback: called with each new point as `callback(x)`, or with a `MinimizeResult` as
            `callback(intermediate_result)` where that is the parameter's name; StopIteration ends the run.
        options: `maxiter`, `maxfun`, `disp`; `gtol`, tolerance of the Euclidean norm of f', or of the projected
            gradient with bounds, 1e-5 by default; all of `StopSettings`, and of the method's settings, such as
            `LBFGSSettings`. The options database is not asked.

    Returns:
        the last point with value, gradient, calls, reason and history.

    Raises:
        InputError: a method, an option, bounds or a shape that is not legal, or a function without a gradient.

    Example:
        `po.minimize(lambda x: ((x - 1) ** 2).sum(), torch.zeros(3), method="tr").x` is a tensor of ones.
    """
    make = METHODS.get(method.lower() if isinstance(method, str) else method)
    if make is None:
        raise InputError("method", repr(method), " | ".join(METHODS))
    name = make.Settings.prefix.rstrip("_")
    if bounds is not None and name not in BOUNDED:
        raise InputError(f"bounds with method {name}", "a method without bounds", " | ".join(BOUNDED))
    if hessp is not None and name not in SECOND_ORDER:
        warnings.warn(f"method {name} takes no Hessian products: hessp is not used", RuntimeWarning, stacklevel=2)
    start = _start(x0)
    function = UserFunction(fun, jac, hessp, start, as_tensor=isinstance(x0, Tensor))
    words = _defaults(name, function, start)
    own, stop = _settings(make.Settings, words, options or {}, bounded=bounds is not None)
    watch = _Watch(callback, function, _Kind(x0))
    optimizer: Any = (
        make(function, own, stop)
        if bounds is None
        else BoundedLBFGS(function, *_box(bounds, len(start)), own.memory, stop)
    )
    result = optimizer.minimize(start, observers=[watch], until=lambda _: watch.stopped)
    return _result(watch, result.design, optimizer.f, optimizer.g, result.reason, result.history)


# -- what the user gave ------------------------------------------------------------------------------------


class UserFunction(SmoothFunction):
    """A black box of arrays or tensors, called in double precision and counted call by call.

    Args:
        fun, jac, hessp: as for `minimize`.
        x: a point at which it can be asked what they are.
        as_tensor: whether they are called with tensors.

    Attributes:
        is_differentiated: whether torch gives the gradient.
        nfev, njev, nhev: calls.
    """

    def __init__(self, fun: Any, jac: Any, hessp: Any, x: Tensor, as_tensor: bool) -> None:
        super().__init__(len(x))
        if not (jac is None or isinstance(jac, bool) or callable(jac)):
            raise InputError("jac", repr(jac), "a function x -> f'(x) | True, where fun returns both | None, for torch")
        self.fun, self.hessp = fun, hessp
        self.jac: Any = jac or None
        self.is_differentiated = self.jac is None
        self.as_tensor = as_tensor or self.is_differentiated
        self.nfev = self.njev = self.nhev = 0
        if self.is_differentiated and not as_tensor:
            self._try_tensors(x)

    def _try_tensors(self, x: Tensor) -> None:
        """Whether a function that was given with an array works on tensors is found out by one call."""
        try:
            self._graph(x)
        except InputError:
            raise
        except Exception as found:  # whatever a function for arrays does with a tensor
            raise _no_gradient(f"a function that fails with tensors ({type(found).__name__}: {found})") from found
        self.nfev = self.njev = 0

    def has_products(self, x: Tensor) -> bool:
        """Whether Hessian products can be had, as far as one at x tells."""
        if self.hessp is not None:
            return True
        if not self.is_differentiated:
            return False
        try:
            self._hvp(x, torch.ones_like(x))
        except (RuntimeError, NotImplementedError):  # what is in `fun` has no second derivative in torch
            return False
        finally:
            self.nfev = self.njev = self.nhev = 0
        return True

    def _value(self, x: Tensor) -> float:
        self.nfev += 1
        found = self.fun(self._out(x))
        return _number(self._both(found)[0] if self.jac is True else found)

    def _value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        if self.is_differentiated:
            value, leaf = self._graph(x)
            (gradient,) = torch.autograd.grad(value, leaf, allow_unused=True, materialize_grads=True)
            return _number(value), gradient.detach()
        self.nfev += 1
        self.njev += 1
        if self.jac is True:
            value, gradient = self._both(self.fun(self._out(x)))
        else:
            value, gradient = self.fun(self._out(x)), self.jac(self._out(x))
        return _number(value), _vector(gradient, self.size, "gradient")

    def _hvp(self, x: Tensor, d: Tensor) -> Tensor:
        self.nhev += 1
        if self.hessp is not None:
            return _vector(self.hessp(self._out(x), self._out(d)), self.size, "product of hessp")
        value, leaf = self._graph(x)
        (gradient,) = torch.autograd.grad(value, leaf, create_graph=True, allow_unused=True, materialize_grads=True)
        if not gradient.requires_grad:  # f is linear
            return torch.zeros_like(x)
        (product,) = torch.autograd.grad(gradient, leaf, d, allow_unused=True, materialize_grads=True)
        return product.detach()

    def _graph(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """f(x) with its graph, and the x that it hangs on."""
        leaf = x.detach().clone().requires_grad_()
        self.nfev += 1
        self.njev += 1
        with torch.enable_grad():
            value = self.fun(leaf)
        if not (isinstance(value, Tensor) and value.requires_grad):
            raise _no_gradient(f"a function that returns {type(value).__name__} without a graph")
        if value.numel() != 1:
            raise InputError("value of fun", f"shape {tuple(value.shape)}", "a number")
        return value.sum(), leaf

    def _out(self, x: Tensor) -> Any:
        """A copy for the user, who may keep it or write to it."""
        return x.detach().clone() if self.as_tensor else x.detach().numpy().copy()

    def _both(self, found: Any) -> tuple[Any, Any]:
        if not (isinstance(found, (tuple, list)) and len(found) == 2):
            raise InputError("fun with jac=True", f"a {type(found).__name__}", "the pair f(x), f'(x)")
        return found[0], found[1]


def _no_gradient(got: str) -> InputError:
    legal = "jac=a function x -> f'(x) | jac=True with a fun that returns f(x), f'(x) | a fun written for torch tensors"
    return InputError("gradient, with jac=None", got, legal)


def _number(value: Any) -> float:
    array = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
    if array.size != 1 or array.dtype.kind not in "fiub":
        raise InputError("value of fun", f"shape {array.shape}, type {array.dtype}", "a real number")
    return float(array.reshape(()))


def _vector(value: Any, size: int, what: str) -> Tensor:
    """(size,) double precision, the caller's to keep."""
    array = np.array(value.detach().cpu() if isinstance(value, Tensor) else value, dtype=float)
    if array.shape != (size,) and not array.shape == () == (size - 1) * (1,):
        raise InputError(what, f"shape {array.shape}", f"({size},), as x")
    return torch.from_numpy(array.reshape(size))


class _Kind:
    """The kind and type of x0, for what goes out."""

    def __init__(self, x0: Any) -> None:
        self.tensor = x0 if isinstance(x0, Tensor) else None
        self.dtype = x0.dtype if isinstance(x0, np.ndarray) and x0.dtype.kind == "f" else np.dtype(float)

    def of(self, x: Tensor) -> Any:
        """A copy of x in them."""
        if self.tensor is None:
            return x.numpy().astype(self.dtype)
        dtype = self.tensor.dtype if self.tensor.is_floating_point() else torch.float64
        return x.detach().clone().to(self.tensor.device, dtype)


def _start(x0: Any) -> Tensor:
    array = np.asarray(x0.detach().cpu() if isinstance(x0, Tensor) else x0)
    if array.ndim > 1 or array.size == 0 or array.dtype.kind not in "fiu":
        raise InputError("x0", f"shape {array.shape}, type {array.dtype}", "a vector of real numbers, (n,)")
    return torch.from_numpy(np.atleast_1d(array).astype(float))


def _box(bounds: Any, size: int) -> tuple[Tensor, Tensor]:
    """The lowest and highest values, (n,) each."""
    if hasattr(bounds, "lb") and hasattr(bounds, "ub"):
        pairs = np.stack([np.broadcast_to(np.asarray(end, dtype=float), size) for end in (bounds.lb, bounds.ub)])
    else:
        if len(bounds) != size or any(len(pair) != 2 for pair in bounds):
            raise InputError(
                "bounds", f"{len(bounds)} of them", f"a pair (lowest, highest) for each of {size} unknowns"
            )
        ends = ((-np.inf if low is None else low, np.inf if high is None else high) for low, high in bounds)
        pairs = np.array(list(ends), dtype=float).T
    lower, upper = torch.from_numpy(pairs.copy())
    return lower, upper


# -- options -----------------------------------------------------------------------------------------------


def _defaults(name: str, function: UserFunction, x: Tensor) -> dict[str, Any]:
    """Settings of a method that black boxes of any size can have."""
    words: dict[str, Any] = {"gtol": GTOL, "max_it": max(1000, 200 * len(x))}
    if name == "spqn":
        words["parts"] = min(8, len(x))
    if name in SECOND_ORDER and function.has_products(x):
        words["model"] = "hvp"
    return words


def _settings(
    group: type[Settings], words: dict[str, Any], options: Mapping[str, Any], bounded: bool
) -> tuple[Any, StopSettings]:
    """The settings of the method and of the end of the run."""
    names = [[each.name for each in fields(cls)] for cls in (StopSettings, group)]
    if bounded:
        names[1] = ["memory"]
    legal = [*SCIPY_OPTIONS, *names[0], *names[1]]
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
    function: UserFunction
    kind: _Kind
    stopped: bool = False

    def __call__(self, optimizer: Any, history: History) -> None:
        if self.callback is None or history[-1].iteration == 0:
            return
        try:
            if "intermediate_result" in inspect.signature(self.callback).parameters:
                self.callback(intermediate_result=MinimizeResult(x=self.kind.of(optimizer.x), fun=optimizer.f))
            else:
                self.callback(self.kind.of(optimizer.x))
        except StopIteration:
            self.stopped = True


_REMEDIES = {
    Reason.DIVERGED_MAX_IT: "raise options['maxiter'], or start closer to a minimum",
    Reason.WORK_DONE: "raise options['maxfun'] or options['max_work']",
    Reason.DIVERGED_NAN: "the value or gradient is not finite near the last good point, which is kept",
    Reason.DIVERGED_LINE_SEARCH: "no lower value along the last direction: check jac, or raise options['gtol']",
    Reason.DIVERGED_STAGNATION: "steps have become too short: check jac, or raise options['gtol']",
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
        nhev=function.nhev,
        success=reason > 0 and reason != Reason.WORK_DONE and not stopped,
        status=reason,
        message=": ".join(part for part in (words, _REMEDIES.get(reason, "")) if part),
        history=history,
    )
