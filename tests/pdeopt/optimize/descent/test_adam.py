"""Adam: PyTorch's iterates, and points without a value."""

import torch

from pdeopt.functions.smooth import SmoothFunction
from pdeopt.optimize.descent.adam import Adam


class Cliff(SmoothFunction):
    """|x|^2 where no entry is above 1, else NaN."""

    def _value_and_gradient(self, x):
        return float("nan") if x.max() > 1.0 else float(x @ x), 2.0 * x


def test_adam_is_pytorch_s():
    start = torch.linspace(-1.0, 0.9, 5, dtype=torch.float64)
    found = Adam(Cliff(5), lr=0.05, max_it=50).minimize(start)
    x = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.05)
    for _ in range(50):
        optimizer.zero_grad()
        (x @ x).backward()
        optimizer.step()
    assert torch.allclose(found.design, x.detach(), atol=1e-14)


def test_adam_takes_no_point_without_a_value_and_gives_the_best():
    start = torch.tensor([-0.05, -1.0], dtype=torch.float64)
    found = Adam(Cliff(2), lr=3.0, max_it=40).minimize(start)
    objective = found.history["objective"]
    assert float(found.design @ found.design) == min(objective) <= objective[0]
    assert all(value == value for value in objective) and min(found.history["radius"][1:]) < 3.0
