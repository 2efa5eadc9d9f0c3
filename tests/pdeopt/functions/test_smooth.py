"""What users write of a smooth function: kinds of numbers, default parts, differences, units."""

import numpy as np
import pytest
import torch

import pdeopt as po
from pdeopt.functions import SampledFunction, Tally, in_units, share, unit_of
from pdeopt.functions.decomposition import DEFAULT_PARTS, Decomposition
from pdeopt.functions.hierarchy import Hierarchy, Transfer
from tests.helpers.functions import Quadratic, Rosenbrock, start, zeros


class As(Rosenbrock):
    """Rosenbrock's function that returns what `kind` makes of its gradient."""

    def __init__(self, size, kind):
        super().__init__(size)
        self.kind = kind

    def _value_and_gradient(self, x):
        value, gradient = super()._value_and_gradient(x)
        return value, self.kind(gradient)


TAKEN = {
    "array": lambda g: g.numpy(),
    "single precision": lambda g: g.float(),
    "bytes of another order": lambda g: g.numpy().astype(">f8"),
    "stride": lambda g: g.flip(0).numpy()[::-1],
    "list": lambda g: g.tolist(),
    "list of tensors": list,
    "graph": lambda g: g.clone().requires_grad_(),
}


@pytest.mark.parametrize("kind", TAKEN.values(), ids=TAKEN)
def test_gradients_of_any_kind_are_taken(kind):
    f, x = As(6, kind), start(6)
    value, gradient = f.value_and_gradient(x.numpy())
    expected = Rosenbrock(6).value_and_gradient(x)
    assert value == expected[0] and gradient.dtype == torch.float64 and not gradient.requires_grad
    assert torch.allclose(gradient, expected[1], rtol=1e-6)
    parts = f.decompose(2)
    local = f.local(parts, 1, x)  # by evaluations of the whole
    assert torch.allclose(local.value_and_gradient(torch.zeros(3).double())[1], gradient[3:])


REFUSED = {
    "short": lambda g: g[:3],
    "column": lambda g: g[:, None],
    "complex": lambda g: g.to(torch.complex128),
    "nothing": lambda g: None,
    "text": lambda g: "abc",
    "number": lambda g: 3.0,
    "masked": lambda g: np.ma.masked_greater(g.numpy(), 0.0),
}


@pytest.mark.parametrize("kind", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("method", (po.LBFGS, po.SPQN, po.TrustRegionMinimizer))
def test_what_is_no_gradient_is_named(method, kind):
    with pytest.raises(po.InputError, match=r"gradient of As.*\(6,\) real numbers"):
        method(As(6, kind)).minimize(start(6))


def test_a_value_that_is_no_number_is_named():
    class Complex(Rosenbrock):
        def _value_and_gradient(self, x):
            return super()._value_and_gradient(x)[0] + 0j, x

    class Alone(Rosenbrock):
        def _value_and_gradient(self, x):
            return super()._value_and_gradient(x)[0]

    with pytest.raises(po.InputError, match="value of Complex"):
        Complex(3).value_and_gradient(start(3))
    for call in ("value", "value_and_gradient"):
        with pytest.raises(po.InputError, match="the pair"):
            getattr(Alone(3), call)(start(3))


def test_a_gradient_that_is_written_to_again_does_no_harm():
    buffer = torch.empty(6, dtype=torch.float64)
    found = po.LBFGS(As(6, buffer.copy_)).minimize(start(6))
    expected = po.LBFGS(Rosenbrock(6)).minimize(start(6))
    assert torch.equal(found.design, expected.design)


def test_verify_finds_one_wrong_entry():
    for f in (Rosenbrock(6), Quadratic.random(6)):
        for x in (start(6), zeros(f), torch.ones(6).double(), 1e8 * start(6)):
            assert max(f.verify(x).values()) < 1e-5
    wrong = As(6, lambda g: g * torch.tensor([1.0, 1.0, 1.001, 1.0, 1.0, 1.0]))
    with pytest.raises(po.DerivativeError, match="gradient of As"):
        wrong.verify(start(6))
    f = Quadratic.random(6)
    f._hvp = lambda x, d: 1.01 * (f.A @ d)
    with pytest.raises(po.DerivativeError, match="hessian"):
        f.verify(start(6))


def test_the_default_number_of_parts_is_what_can_be_made():
    assert len(Rosenbrock(3).decompose()) == 3 and len(Rosenbrock(30).decompose()) == DEFAULT_PARTS
    assert len(Decomposition.blocks([4, 4])) == 2
    with pytest.raises(po.InputError, match="1 to 3, the number of unknowns"):
        Rosenbrock(3).decompose(4)
    assert po.SPQN(Rosenbrock(3)).minimize(torch.zeros(3)).converged
    with pytest.raises(po.InputError, match="1 to 3"):
        po.SPQN(Rosenbrock(3), parts=4)


class Squares(SampledFunction):
    """The mean of squares of rows."""

    def __init__(self, A, tally=None):
        super().__init__(A.shape[1], len(A), tally=tally)
        self.A = A

    def _value_and_gradient(self, x):
        r = self.A @ x - 1.0
        return float(r @ r) / len(r), 2.0 / len(r) * (self.A.T @ r)

    def subset(self, indices):
        return Squares(self.A[indices], self.tally)


def test_a_unit_is_a_power_of_two_that_keeps_all_bits():
    assert unit_of(1e3, 1e-30) == unit_of(0.0, 1e9) == unit_of(float("nan"), 1.0) == 1.0
    assert 5e199 < unit_of(1e-3, 1e200) <= 1e200 and unit_of(0.0, 0.0) == 1.0
    coarse, x, unit = Quadratic.random(3), start(6), 2.0**-40
    hierarchy = Hierarchy([Rosenbrock(6), coarse], [Transfer.aggregates(torch.arange(6) // 2)])
    for f in (Rosenbrock(6), Quadratic.random(6), hierarchy, Squares(torch.eye(6).double())):
        g = in_units(f, unit)
        assert g.value(x) * unit == f.value(x)
        assert torch.equal(g.value_and_gradient(x)[1] * unit, f.value_and_gradient(x)[1])
        assert g.tally is f.tally and len(g.decompose(2)) == 2
        part = g.local(g.decompose(2), 0, x)
        assert part.value(torch.zeros(3).double()) * unit == pytest.approx(f.value(x))
    assert isinstance(in_units(hierarchy, unit), Hierarchy)
    some = in_units(Squares(torch.eye(6).double()), unit).subset(torch.arange(2))
    assert some.value(zeros(some)) * unit == 1.0


def test_norms_do_not_overflow():
    f = Rosenbrock(3)
    for scale in (1e-300, 1e-200, 1.0, 1e200, 1e300):
        assert f.norm(torch.tensor([3.0, 0.0, -4.0]).double() * scale) == pytest.approx(5.0 * scale)
    assert f.norm(torch.zeros(3).double()) == 0.0 and f.norm(torch.full((3,), float("inf")).double()) == float("inf")
    assert np.isnan(f.norm(torch.full((3,), float("nan")).double()))


def test_calls_of_tasks_are_settled_in_their_order():
    tally = Tally(work=1e9)

    def work(task):
        tally.work += 0.1 * task
        return task

    assert share(None, 4, work, tally) == [0, 1, 2, 3]
    expected = 1e9
    for task in range(4):
        expected += 0.1 * task
    assert tally.work == expected


def test_hessian_products_of_another_shape_are_not_passed_over():
    """A function without them is compared by its gradient alone; wrong ones are an error."""

    class Square(po.SmoothFunction):
        def _value_and_gradient(self, x):
            return float(x @ x), 2 * x

    class Short(Square):
        def _hvp(self, x, d):
            return 2 * d[:-1]

    x = torch.ones(3, dtype=torch.float64)
    assert set(Square(3).verify(x)) == {"gradient"}
    with pytest.raises(po.InputError, match="Hessian product of Short"):
        Short(3).verify(x)
