"""What users of `minimize` give: functions of arrays or tensors, a start, bounds, in all the forms that SciPy takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pdeopt.core.errors import InputError
from pdeopt.functions import border
from pdeopt.functions.smooth import SmoothFunction


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
        except RuntimeError:  # what is in `fun` has no second derivative in torch
            return False
        finally:
            self.nfev = self.njev = self.nhev = 0
        return True

    def _value(self, x: Tensor) -> float:
        self.nfev += 1
        found = self.fun(self._out(x))
        return border.number(self._both(found)[0] if self.jac is True else found, "value of fun")

    def _value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        if self.is_differentiated:
            value, leaf = self._graph(x)
            (gradient,) = torch.autograd.grad(value, leaf, allow_unused=True, materialize_grads=True)
            return border.number(value, "value of fun"), gradient.detach()
        self.nfev += 1
        self.njev += 1
        if self.jac is True:
            value, gradient = self._both(self.fun(self._out(x)))
        else:
            value, gradient = self.fun(self._out(x)), self.jac(self._out(x))
        return border.number(value, "value of fun"), border.vector(gradient, self.size, "gradient")

    def _hvp(self, x: Tensor, d: Tensor) -> Tensor:
        self.nhev += 1
        if self.hessp is not None:
            return border.vector(self.hessp(self._out(x), self._out(d)), self.size, "product of hessp")
        value, leaf = self._graph(x)
        (gradient,) = torch.autograd.grad(value, leaf, create_graph=True, allow_unused=True, materialize_grads=True)
        if not gradient.requires_grad:  # f is linear
            return torch.zeros_like(x)
        (product,) = torch.autograd.grad(gradient, leaf, d, allow_unused=True, materialize_grads=True)
        return product.detach()

    def _graph(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """f(x) with its graph, and the x that it hangs on."""
        self.nfev += 1
        self.njev += 1
        with torch.enable_grad():
            leaf = x.detach().clone().requires_grad_()
            value = self.fun(leaf)
            value = value.sum() if isinstance(value, Tensor) and value.numel() == 1 else value
        if not (isinstance(value, Tensor) and value.requires_grad):
            raise _no_gradient(f"a function that returns {type(value).__name__} without a graph")
        if value.numel() != 1:
            raise InputError("value of fun", f"shape {tuple(value.shape)}", "a number")
        return value, leaf

    def _out(self, x: Tensor) -> Any:
        """A copy for the user, who may keep it or write to it."""
        return x.detach().clone() if self.as_tensor else x.detach().numpy().copy()

    def _both(self, found: Any) -> tuple[Any, Any]:
        return border.pair(found, "fun with jac=True")


def _no_gradient(got: str) -> InputError:
    legal = "jac=a function x -> f'(x) | jac=True with a fun that returns f(x), f'(x) | a fun written for torch tensors"
    return InputError("gradient, with jac=None", got, legal)


class Kind:
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


def first_point(x0: Any) -> Tensor:
    """x0 as a vector, (n,) double precision, a copy.

    Raises:
        InputError: no vector of finite real numbers.
    """
    array = border.real(x0)
    if array is None or array.ndim > 1 or array.size == 0 or array.dtype.kind == "b":
        raise InputError("x0", border.described(x0), "a vector of real numbers, (n,)")
    return border.start(array.reshape(-1), array.size)


def box(bounds: Any, size: int) -> tuple[Tensor, Tensor]:
    """The lowest and highest values, (n,) each."""
    legal = f"a pair (lowest, highest) for each of {size} unknowns, or scipy.optimize.Bounds"
    try:
        if hasattr(bounds, "lb") and hasattr(bounds, "ub"):
            ends = np.stack([np.broadcast_to(np.asarray(end, dtype=float), size) for end in (bounds.lb, bounds.ub)])
        else:
            pairs = [(-np.inf if low is None else low, np.inf if high is None else high) for low, high in bounds]
            ends = np.array(pairs, dtype=float).reshape(-1, 2).T
    except (TypeError, ValueError) as error:
        raise InputError("bounds", border.described(bounds), legal) from error
    if ends.shape[1] != size:
        raise InputError("bounds", f"{ends.shape[1]} of them", legal)
    lower, upper = torch.from_numpy(ends.copy())
    return lower, upper


def with_arguments(args: Any, fun: Any, jac: Any, hessp: Any, hess: Any) -> tuple[Any, Any, Any]:
    """fun, jac and hessp with their further arguments; hessp by `hess` where that is given."""
    if not callable(fun):
        raise InputError("fun", border.described(fun), "a function x -> f(x)")
    for what, given in (("hess", hess), ("hessp", hessp)):
        if not (given is None or callable(given)):
            raise InputError(what, border.described(given), "a function | None")
    more = args if isinstance(args, tuple) else (args,)
    if hessp is None and hess is not None:
        return with_arguments(args, fun, jac, lambda x, p, *rest: hess(x, *rest) @ p, None)
    if not more:
        return fun, jac, hessp
    jac_too = (lambda x: jac(x, *more)) if callable(jac) else jac
    hessp_too = None if hessp is None else lambda x, p: hessp(x, p, *more)
    return lambda x: fun(x, *more), jac_too, hessp_too
