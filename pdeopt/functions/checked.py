"""What a user writes of a smooth function, and what comes in: taken in any kind of numbers or refused, in one place."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from pdeopt.core.errors import InputError
from pdeopt.functions import border


class NoHessianProducts(InputError):
    """A function that defines no Hessian products was asked for one; a wrong one is an `InputError` of another kind."""


class CheckedFunction(ABC):
    """f: R^n -> R by the methods with an underscore, which a subclass writes, and as others evaluate it.

    Attributes:
        size: n, unknowns on this rank.
    """

    size: int

    @abstractmethod
    def _value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        """f and f' at x, (size,) double precision; f may be infinite or NaN. The gradient is the caller's to keep."""

    def _value(self, x: Tensor) -> float:
        """f at x alone."""
        return border.pair(self._value_and_gradient(x), f"_value_and_gradient of {type(self).__name__}")[0]  # type: ignore[no-any-return]

    def _hvp(self, x: Tensor, d: Tensor) -> Tensor:
        """f''(x) d; raises `InputError` where a subclass does not define it."""
        raise NoHessianProducts(f"Hessian products of {type(self).__name__}", "none", "a function that defines `_hvp`")

    def evaluate_value(self, x: Tensor) -> float:
        """f at x: checked, and not counted; for functions made of this one."""
        return border.number(self._value(border.vector(x, self.size, "x")), f"value of {type(self).__name__}")

    def evaluate(self, x: Tensor) -> tuple[float, Tensor]:
        """f and f' at x, the same way; the gradient is the caller's to keep."""
        name = type(self).__name__
        found = self._value_and_gradient(border.vector(x, self.size, "x"))
        value, gradient = border.pair(found, f"_value_and_gradient of {name}")
        gradient = border.vector(gradient, self.size, f"gradient of {name}", own=True)
        return border.number(value, f"value of {name}"), gradient

    def evaluate_hvp(self, x: Tensor, d: Tensor) -> Tensor:
        """f''(x) d, the same way."""
        product = self._hvp(border.vector(x, self.size, "x"), border.vector(d, self.size, "direction"))
        return border.vector(product, self.size, f"Hessian product of {type(self).__name__}", own=True)
