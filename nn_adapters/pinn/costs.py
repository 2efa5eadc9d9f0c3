"""What calls of a PINN cost: a model of their time, fitted once, so that counts of work do not depend on the machine.

The unit is a multiplication of a product with W, a point and a row of its jets. Measured on 4 to 8 layers of 20 to 64.
"""

from __future__ import annotations

from nn_adapters.pinn.network import Network
from pdeopt.functions.smooth import Costs

#: Time of a multiplication: of W with a jet, or of its adjoint with a cotangent; and of a gradient by W.
PRODUCT_TIME, WEIGHT_TIME = 1.0, 1.8

#: Time of an entry that is activated, and of the residual with its gradient.
ENTRY_TIME, RESIDUAL_TIME = 30.0, 400.0

#: Of an entry of the Jacobian, beyond the gradient; of a multiplication in large dense products and factorizations.
ROW_TIME, DENSE_TIME = 60.0, 0.4

#: A Hessian product in gradients.
HESSIAN_IN_GRADIENTS = 14.0


class CallTimes:
    """Times of values and gradients, from the jets before some layer.

    Args:
        network: whose layers; the closing one is number `network.depth`.
        columns: points times rows of their jets, over all terms.
        points: of all terms.
    """

    def __init__(self, network: Network, columns: int, points: int = 0) -> None:
        self.shapes, self.columns, self.entries = network.shapes, columns, points * network.size

    @property
    def whole(self) -> float:
        """Of the gradient by all layers."""
        return self.gradient(0, len(self.shapes) - 1)

    def forward(self, first: int, end: int) -> float:
        """Of the layers from `first` to before `end`."""
        return self.columns * sum(PRODUCT_TIME * o * i + ENTRY_TIME * o for o, i in self.shapes[first:end])

    def value(self, first: int) -> float:
        """Of the value from the jets before layer `first`."""
        return self.forward(first, len(self.shapes)) + 0.5 * self.columns * RESIDUAL_TIME

    def gradient(self, first: int, last: int) -> float:
        """Of the value and the gradient by the layers `first` to `last`."""
        backward = self.forward(first, len(self.shapes)) + 0.5 * self.columns * RESIDUAL_TIME
        weights = self.columns * WEIGHT_TIME * sum(o * i for o, i in self.shapes[first : last + 1])
        spared = self.columns * PRODUCT_TIME * self.shapes[first][0] * self.shapes[first][1]  # no cotangent below
        return self.value(first) + backward - spared + weights

    def costs(self, first: int, last: int) -> Costs:
        """In gradients by all layers."""
        value, gradient = self.value(first) / self.whole, self.gradient(first, last) / self.whole
        jacobian = gradient + self.entries * ROW_TIME / self.whole
        return Costs(value, gradient, HESSIAN_IN_GRADIENTS * gradient, jacobian, gradient, DENSE_TIME / self.whole)
