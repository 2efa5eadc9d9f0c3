"""MG/OPT and RMTR: theorems on convex energies, oracles, safeguards, restarts."""

import math
from itertools import pairwise

import pytest
import torch
from petsc4py import PETSc

from pdeopt.core.arrays import assign, copy
from pdeopt.core.errors import InputError
from pdeopt.core.monitor import Reason
from pdeopt.functions.hierarchy import Hierarchy
from pdeopt.functions.smooth import Costs, FirstOrderConsistent
from pdeopt.optimize.descent.multilevel import MGOPT
from pdeopt.optimize.descent.quasinewton import LBFGS
from pdeopt.optimize.descent.rmtr import RMTR, TrustSmoother
from pdeopt.optimize.descent.taotype import TaoFunction
from tests.helpers.energies import Energy, interpolation, poisson
from tests.helpers.functions import start


def trace(minimizer, x, **words):
    """Iterates of a run, and its result."""
    points = []
    result = minimizer.minimize(x, observers=[lambda m, h: points.append((m.x.clone(), m.f, m.g.clone()))], **words)
    return points, result


def test_mgopt_on_one_level_is_its_smoother():
    found, _ = trace(MGOPT(Energy(31, 10.0), pre=1, post=0, max_it=20), start(31))
    expected, _ = trace(LBFGS(Energy(31, 10.0), max_it=20), start(31))
    assert all(torch.equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(found, expected, strict=True))


def test_rmtr_on_one_level_is_a_trust_region_method():
    """A textbook loop with a dense Hessian, solved by its eigenvalues, takes the same steps."""
    function, x, radius = Energy(7, 10.0), start(7), 0.5
    found, _ = trace(RMTR(function, model="hvp", cg_rtol=1e-14, radius=0.5, pre=1, post=0, max_it=6), x)
    oracle = Energy(7, 10.0)
    for point, _, _ in found[1:]:
        f, g = oracle._value_and_gradient(x)
        H = torch.stack([oracle._hvp(x, e) for e in torch.eye(7, dtype=torch.float64)])
        newton = torch.linalg.solve(H, -g)
        if float(newton.norm()) < radius:  # Steihaug's steps are exact inside the ball
            decrease = -float(g @ newton + 0.5 * newton @ H @ newton)
            assert (f - oracle._value(x + newton)) / decrease > 1e-4
            assert torch.allclose(point, x + newton, rtol=1e-8, atol=1e-10)
        moved = float((point - x).norm())
        assert moved <= radius * (1 + 1e-12)
        if moved > 0:
            predicted = -float(g @ (point - x) + 0.5 * (point - x) @ H @ (point - x))
            ratio = (f - oracle._value(point)) / predicted
            radius = 2 * radius if ratio > 0.75 and moved >= 0.8 * radius else (0.5 * moved if ratio < 0.1 else radius)
        x = point


@pytest.mark.parametrize(
    "make",
    [
        lambda f: MGOPT(f, pre=2, post=2, coarse=30, gtol=1e-9, max_it=40),
        lambda f: MGOPT(f, pre=2, post=2, coarse=30, cycle="F", gtol=1e-9, max_it=40),
        lambda f: RMTR(f, pre=2, post=2, coarse=30, memory=5, gtol=1e-9, max_it=40),
        lambda f: RMTR(f, pre=2, post=2, coarse=10, model="hvp", cg_max_it=10, cycle="F", gtol=1e-9, max_it=40),
    ],
    ids=["mgopt V", "mgopt F", "rmtr V", "rmtr F hvp"],
)
def test_cycles_on_a_quadratic_do_not_depend_on_the_mesh(make):
    """Down to 1e-6 of the first error in the energy norm: 1e-12 of the first distance from the minimum."""
    counts = []
    for n, levels in ((31, 3), (63, 4), (127, 5), (255, 6)):
        hierarchy, zero = poisson(n, levels), torch.zeros(n, dtype=torch.float64)
        least = hierarchy._value(hierarchy.functions[0].solution())
        enough = least + max(1e-12 * (hierarchy._value(zero) - least), 1e-16)
        result = make(hierarchy).minimize(zero, until=lambda m, enough=enough: m.f < enough)
        assert result.converged, result.message
        counts.append(len(result.history) - 1)
    assert max(counts[1:]) <= min(counts[1:]) + 2 and max(counts) <= 12, counts


@pytest.mark.parametrize("kind", [MGOPT, RMTR])
@pytest.mark.parametrize("words", [dict(), dict(cycle="F"), dict(start="nested"), dict(pre=0, post=1)])
def test_a_nonlinear_energy_decreases_monotonically_to_its_minimizer(kind, words):
    hierarchy = poisson(31, 3, w=50.0)
    points, result = trace(kind(hierarchy, coarse=10, gtol=1e-8, **words), start(31))
    values = [f for _, f, _ in points]
    assert result.converged and all(b <= a + 1e-14 * abs(a) for a, b in pairwise(values))
    x = LBFGS(Energy(31, 50.0), gtol=1e-10).minimize(start(31)).design
    assert torch.allclose(result.design, x, atol=1e-6)
    last = result.history[-1]
    assert last.work == pytest.approx(hierarchy.tally.work) and last.gradients == hierarchy.tally.gradients


def test_nested_iteration_begins_on_the_coarsest_level():
    hierarchy = poisson(63, 3)
    zero = torch.zeros(63, dtype=torch.float64)
    points, result = trace(MGOPT(hierarchy, start="nested", nested=100, coarse=30, max_it=1), zero)
    least = hierarchy._value(hierarchy.functions[0].solution())
    assert points[1][1] - least < 1e-2 * (points[0][1] - least)
    assert result.history[-1].note == "2 corrections, 0 rejected"


class Hole(Energy):
    """NaN everywhere but where it is asked first, on coarse levels."""

    def _value_and_gradient(self, x):
        value, gradient = super()._value_and_gradient(x)
        self.first = getattr(self, "first", x.clone())
        spoilt = self.size < 31 and not torch.equal(x, self.first)
        return (math.nan if spoilt else value), gradient * (math.nan if spoilt else 1.0)


@pytest.mark.parametrize("kind", [MGOPT, RMTR])
@pytest.mark.parametrize("begin", ["fine", "nested"])
def test_nan_on_coarse_levels_is_rejected(kind, begin):
    points, result = trace(kind(poisson(31, 2, 1.0, Hole), gtol=1e-5, start=begin), start(31))
    values = [f for _, f, _ in points]
    assert result.converged and all(math.isfinite(f) for f in values) and values[-1] < values[0]


class Wrong(Energy):
    """A coarse function that has nothing to do with the fine one, beside its gradient where it begins."""

    def _value_and_gradient(self, x):
        value, gradient = super()._value_and_gradient(x)
        return (value, gradient) if self.size >= 31 else (-value, -gradient)


@pytest.mark.parametrize("kind, words", [(MGOPT, {}), (RMTR, {"model": "hvp"})])
def test_a_coarse_function_that_misleads_costs_work_alone(kind, words):
    points, result = trace(kind(poisson(31, 2, 1.0, Wrong), gtol=1e-5, kappa=0.5, coarse=5, **words), start(31))
    values = [f for _, f, _ in points]
    assert result.converged and all(b <= a + 1e-14 * abs(a) for a, b in pairwise(values))


def test_a_coarse_level_stays_within_the_reach_of_its_correction():
    fine, coarse = Energy(15), Energy(7)
    smoother = TrustSmoother(coarse, radius=10.0)
    x = start(7)
    smoother.start(x)
    g = interpolation(15).restrict(fine.value_and_gradient(start(15))[1])
    smoother.attach(FirstOrderConsistent(coarse, x, g, smoother.g))
    smoother.g = g
    smoother.place(x, 0.3)
    for _ in range(20):
        smoother.step()
        assert float((smoother.x - x).norm()) <= 0.3 * (1 + 1e-12)
    assert smoother.left() < 0.01


@pytest.mark.parametrize(
    "make",
    [
        lambda f, **w: MGOPT(f, coarse=5, **w),
        lambda f, **w: MGOPT(f, smoother="ssbroyden", start="nested", **w),
        lambda f, **w: RMTR(f, coarse=5, **w),
        lambda f, **w: RMTR(f, cycle="F", model="hvp", start="nested", **w),
    ],
)
def test_a_restart_goes_on_with_the_same_iterates(make):
    whole, result = trace(make(poisson(31, 3, 20.0), max_it=6), start(31))
    saved = []

    def save(minimizer, history):
        if len(history) == 4:
            saved.append(minimizer.memory())

    first = make(poisson(31, 3, 20.0), max_it=3).minimize(start(31), observers=[save])
    rest, again = trace(make(poisson(31, 3, 20.0), max_it=6), start(31), memory=saved[0], history=first.history)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[3:], rest, strict=True))
    assert again.history["work"] == result.history["work"]


def test_without_gradient_on_the_coarse_level_none_of_it_is_evaluated():
    hierarchy = poisson(31, 2)
    minimizer = MGOPT(hierarchy, kappa=1e9, max_it=3)
    minimizer.minimize(start(31))
    assert minimizer.accepted == minimizer.rejected == 0 and hierarchy.tally.work == hierarchy.tally.gradients


def test_settings_that_are_not_legal_are_named():
    with pytest.raises(InputError, match=r"V \| F"):
        MGOPT(Energy(3), cycle="W")
    with pytest.raises(InputError, match=r"first \| metric \| lsr1 \| hvp"):
        RMTR(Energy(3), model="bfgs")
    with pytest.raises(InputError, match="coarse"):
        RMTR(Energy(3), coarse=0)
    with pytest.raises(InputError, match=r"\(31,\) real numbers"):
        RMTR(poisson(31, 2)).minimize(start(15))


def test_no_decrease_left_is_a_reason():
    solution = Energy(7).solution()
    result = RMTR(Energy(7), gtol=0.0, max_it=500).minimize(solution)
    assert result.reason in (Reason.DIVERGED_STAGNATION, Reason.DIVERGED_MAX_IT, Reason.CONVERGED_OPTIMALITY)
    assert result.history[-1].objective <= result.history[0].objective + 1e-15


class Context:
    """Brings coarser levels to TAO's objective."""

    def smooth_function(self, tao):
        coarse = Energy(15, 10.0, Costs().times(0.5))
        return Hierarchy([TaoFunction(tao), coarse], [interpolation(31)])


@pytest.mark.parametrize("name", ["MGOPT", "RMTR"])
def test_tao_takes_its_steps_on_the_levels_of_a_context(name):
    energy, x = Energy(31, 10.0), PETSc.Vec().createSeq(31, comm=PETSc.COMM_SELF)

    def objective(tao, y, g):
        value, gradient = energy.value_and_gradient(copy(y))
        assign(g, gradient)
        return value

    tao = PETSc.TAO().create(PETSc.COMM_SELF)
    tao.setType("python")
    tao.setPythonType(f"pdeopt.optimize.{name}")
    tao.setAppCtx(Context())
    tao.setObjectiveGradient(objective, x.duplicate())
    tao.setTolerances(gatol=1e-8, grtol=0.0, gttol=0.0)
    tao.setSolution(x)
    tao.setFromOptions()
    tao.solve()
    assert tao.getConvergedReason() > 0 and energy.norm(energy._value_and_gradient(copy(x))[1]) <= 1e-8
    assert tao.getPythonContext().accepted > 0
    tao.destroy()
