"""MLVR: SVRG, SARAH and sub-sampled Newton as settings, consistency of the levels, restarts."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from pdeopt.core.errors import InputError
from pdeopt.functions.smooth import FirstOrderConsistent
from pdeopt.optimize.descent import mlvr
from pdeopt.optimize.descent.mlvr import MLVR
from problems.logistic import SARAH, SSN, SVRG
from tests.helpers.functions import Quadratic, hessian, zeros
from tests.helpers.logistic import logistic_loss, newton_optimum


def path(solver, start, **words):
    """All points of a run, and the result."""
    found = []
    result = solver.minimize(start, observers=[lambda s, _: found.append(s.x.clone())], **words)
    return torch.stack(found), result


def gradient(f, indices, x):
    return f.subset(indices).value_and_gradient(x)[1]


def svrg(f, x, size, inner, batch, outer, generator):
    """R. Johnson, T. Zhang (NeurIPS 2013), last inner point as the next snapshot."""
    points = [x]
    for _ in range(outer):
        snapshot, mean = x, f.value_and_gradient(x)[1]
        x = x - size * mean
        for _ in range(inner - 1):
            i = torch.randint(f.samples, (batch,), generator=generator)
            x = x - size * (gradient(f, i, x) - gradient(f, i, snapshot) + mean)
        points.append(x)
    return torch.stack(points)


def sarah(f, x, size, inner, batch, outer, generator):
    """L. M. Nguyen, J. Liu, K. Scheinberg, M. Takac (ICML 2017), last inner point as the next outer one."""
    points = [x]
    for _ in range(outer):
        v = f.value_and_gradient(x)[1]
        before, x = x, x - size * v
        for _ in range(inner - 1):
            i = torch.randint(f.samples, (batch,), generator=generator)
            v = gradient(f, i, x) - gradient(f, i, before) + v
            before, x = x, x - size * v
        points.append(x)
    return torch.stack(points)


def random_numbers(N):
    """The generator of seed 0 after the numbers that MLVR draws for nested samples."""
    generator = torch.Generator().manual_seed(0)
    torch.rand(N, generator=generator, dtype=torch.float64)
    return generator


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("settings, oracle", [(SVRG, svrg), (SARAH, sarah)])
def test_svrg_and_sarah_step_by_step(settings, oracle, batch):
    f = logistic_loss(N=50, regularization=0.02)
    words = settings | dict(batch=batch, steps=25, step_size=0.05, max_it=8)
    found, result = path(MLVR(f, **words), zeros(f))
    expected = oracle(f, zeros(f), 0.05, 25, batch, 8, random_numbers(50))
    assert result.history["radius"][1:] == [1.0] * 8  # no line search stepped in
    assert float((found - expected).abs().max()) < 1e-12
    work = 9 + 8 * 24 * 2 * batch / 50
    assert result.history[-1].work == pytest.approx(work)


def test_sub_sampled_newton_step_by_step():
    f, k = logistic_loss(N=60, regularization=0.2), 40
    words = SSN | dict(batch=k, cg_rtol=1e-14, cg_max_it=30, gtol=1e-11)
    found, result = path(MLVR(f, **words), zeros(f))
    generator, x, expected = random_numbers(60), zeros(f), [zeros(f)]
    for _ in found[1:]:
        sample = torch.rand(60, generator=generator, dtype=torch.float64).argsort()[:k]
        x = x - torch.linalg.solve(hessian(f.subset(sample), x), f.value_and_gradient(x)[1])
        expected.append(x)
    assert result.converged and set(result.history["radius"][1:]) == {1.0} and len(found) > 5
    assert float((found - torch.stack(expected)).abs().max()) < 1e-12


@pytest.mark.parametrize("levels", [2, 3, 4])
def test_levels_of_all_samples_are_newtons_method(levels):
    f = logistic_loss(N=40, regularization=0.05)
    words = dict(levels=levels, coarsening=1.0, cycles=1, memory=0, nested=0, cg_rtol=1e-14, cg_max_it=30, max_it=4)
    found, _ = path(MLVR(f, **words), zeros(f))
    for x, after in pairwise(found):
        assert torch.allclose(after, x - torch.linalg.solve(hessian(f, x), f.value_and_gradient(x)[1]), atol=1e-12)


@pytest.mark.parametrize("coarse", ["gradient", "newton", "lbfgs"])
def test_coarse_functions_have_the_gradient_of_the_finer_one(coarse, monkeypatch):
    errors = []

    class Checked(FirstOrderConsistent):
        def __init__(self, model, d0, g, model_gradient=None):
            super().__init__(model, d0, g, model_gradient)
            scale = max(g.norm(), self.shift.norm())  # of what is added up
            errors.append(float((self._value_and_gradient(d0)[1] - g).norm() / scale))

    monkeypatch.setattr(mlvr, "FirstOrderConsistent", Checked)
    f = logistic_loss(N=400)
    MLVR(f, coarse=coarse, steps=3, max_it=5, gtol=1e-6).minimize(zeros(f))
    assert len(errors) >= 10 and max(errors) < 1e-12


@pytest.mark.parametrize(
    "words",
    [
        dict(),
        dict(levels=2),
        dict(levels=4, coarsening=0.4),
        dict(memory=0, coarsening=0.5),
        dict(coarse="lbfgs", steps=4),
        dict(coarse="newton", steps=3),
        dict(coarse="gradient", steps=10, max_it=3000),
        dict(sampling="uniform"),
        dict(redraw="cycle"),
        dict(nested=0),
        dict(cycles=3),
    ],
)
def test_runs_go_down_to_the_optimum(words):
    f = logistic_loss(N=300, n=8, seed=2)
    result = MLVR(f, gtol=1e-9, **words).minimize(zeros(f))
    values = result.history["objective"]
    assert result.converged, result.message
    assert all(b <= a + 1e-14 for a, b in pairwise(values))
    assert torch.allclose(result.design, newton_optimum(f), atol=1e-6)


def test_three_levels_take_less_work_than_sub_sampled_newton():
    f = logistic_loss(N=2000, n=20, seed=1)
    gtol = 1e-8 * f.norm(f.value_and_gradient(zeros(f))[1])
    work = MLVR(f, gtol=gtol).minimize(zeros(f)).history[-1].work
    rivals = [MLVR(f, gtol=gtol, **SSN, coarsening=share).minimize(zeros(f)).history[-1].work for share in (0.05, 0.2)]
    assert work < 0.8 * min(rivals)


@pytest.mark.parametrize("settings", [SVRG, SARAH])
def test_steps_that_are_too_long_are_undone_and_halved(settings):
    f = logistic_loss(N=50)
    result = MLVR(f, **(settings | dict(steps=20)), step_size=100.0, max_it=12).minimize(zeros(f))
    values = result.history["objective"]
    assert np.isfinite(values).all() and all(a >= b for a, b in pairwise(values))
    assert "steepest descent" in result.history["note"] and values[-1] < values[0]


@pytest.mark.parametrize(
    "words",
    [
        dict(),
        dict(redraw="cycle", coarsening=0.3),
        dict(coarse="lbfgs", steps=3),
        SVRG | dict(steps=20, step_size=0.05),
        SARAH | dict(steps=20),
    ],
)
def test_a_restart_gives_the_same_iterates(words):
    def solver(**more):
        return MLVR(logistic_loss(N=100), gtol=0.0, **(words | more))

    start = zeros(logistic_loss())
    whole, _ = path(solver(max_it=7), start)
    first = solver(max_it=3)
    half = first.minimize(start)
    rest, result = path(solver(max_it=7, seed=5), start, memory=first.memory(), history=half.history)
    assert torch.equal(rest, whole[3:]) and result.iterations == 7


def test_bad_input_is_named():
    f = logistic_loss()
    for words, match in (
        (dict(levels=1), "levels"),
        (dict(steps=-1), "steps"),
        (dict(memory=-1), "memory"),
        (dict(redraw="step"), "redraw"),
        (dict(batch=41), "samples of the levels"),
        (dict(coarse="none"), "coarse"),
    ):
        with pytest.raises(InputError, match=match):
            MLVR(f, **words)
    with pytest.raises(InputError, match="SampledFunction"):
        MLVR(Quadratic.random(3))
    assert MLVR().settings.levels == 3
