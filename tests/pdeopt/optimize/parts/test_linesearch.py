import math

import pytest

from pdeopt.optimize.parts.linesearch import SEARCHES, Backtracking, Ray, StrongWolfe
from tests.helpers.functions import Hole, Quadratic, Rosenbrock, start


def ray_of(function, x, scale=1.0):
    f, g = function.value_and_gradient(x)
    return Ray(function, x, f, g, -scale * g)


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0, 1e3])
@pytest.mark.parametrize("seed", range(5))
def test_the_decrease_is_sufficient(name, scale, seed):
    ray = ray_of(Rosenbrock(6), start(6, seed), scale)
    size = SEARCHES[name].along(ray)
    assert size is not None and ray(size) <= ray.start + 1e-4 * size * ray.slope_at_start


@pytest.mark.parametrize("scale", [1e-5, 1e-2, 1.0, 1e4])
@pytest.mark.parametrize("curvature", [0.9, 0.1])
@pytest.mark.parametrize("seed", range(5))
def test_the_slope_is_small_after_a_wolfe_search(scale, curvature, seed):
    ray = ray_of(Rosenbrock(6), start(6, seed), scale)
    size = StrongWolfe(curvature=curvature).along(ray)
    assert abs(ray.slope(size)) <= curvature * abs(ray.slope_at_start)


@pytest.mark.parametrize("cubic", [False, True])
def test_interpolation_is_exact_on_parabolas(cubic):
    ray = ray_of(Quadratic.random(4, 1.5), start(4), scale=3.0)
    size = Backtracking(armijo=0.4999, cubic=cubic).along(ray)
    assert 0.1 < size < 0.5 and abs(ray.slope(size)) < 1e-10 * abs(ray.slope_at_start)


def test_values_that_are_not_finite_shorten_the_step():
    for name in SEARCHES:
        ray = ray_of(Hole(2), start(2), scale=50.0)
        size = SEARCHES[name].along(ray)
        assert size is not None and math.isfinite(ray(size)) and ray(size) < ray.start


def test_there_is_no_step_up():
    f = Quadratic.random(3)
    value, g = f.value_and_gradient(start(3))
    for search in SEARCHES.values():
        assert search.along(Ray(f, start(3), value, g, g)) is None
