"""Small sums of squares."""

import torch

from pdeopt.squares.residual import ResidualFunction


class Curve(ResidualFunction):
    """a exp(b t) - y at m times, of which few rows can be asked for."""

    def __init__(self, m=30, y=None, **words):
        super().__init__(2, m, **words)
        self.t = torch.linspace(0.0, 1.0, m, dtype=torch.float64)
        self.y = torch.cos(3.0 * self.t) if y is None else y

    def _residual(self, x, rows=None):
        t, y = (self.t, self.y) if rows is None else (self.t[rows], self.y[rows])
        return x[0] * torch.exp(x[1] * t) - y


class Rows(ResidualFunction):
    """Any function of torch operations."""

    def __init__(self, fun, size, rows):
        super().__init__(size, rows)
        self.fun = fun

    def _residual(self, x, rows=None):
        r = self.fun(x)
        return r if rows is None else r[rows]
