import math
from itertools import pairwise

import pytest
import torch

from pdeopt.core.errors import InputError
from pdeopt.core.monitor import History, Reason
from pdeopt.optimize.checkpoint import read_memory, write_memory
from pdeopt.optimize.descent.minimizer import StopSettings
from pdeopt.optimize.descent.quasinewton import LBFGS, SSBroyden
from pdeopt.optimize.parts.inversehessian import DenseInverse, LimitedMemory, broyden
from tests.helpers.functions import Hole, Quadratic, Rosenbrock, bfgs_update, start, two_loops
from tests.helpers.support import relative

METHODS = [(LBFGS, {}), (SSBroyden, {}), (SSBroyden, dict(update="ssbfgs")), (SSBroyden, dict(update="bfgs"))]


def pairs_of(function, number, seed=1):
    """Differences of points and of their gradients."""
    points = [start(function.size, seed + k) for k in range(number + 1)]
    gradients = [function.value_and_gradient(x)[1] for x in points]
    return [(b - a, h - g) for a, b, g, h in zip(points, points[1:], gradients, gradients[1:])]


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("memory", [1, 3, 20])
def test_the_compact_form_is_the_two_loop_recursion(memory, known):
    f = Quadratic.random(12)
    D = torch.diag(torch.linspace(1.0, 2.0, 12, dtype=torch.float64))
    initial = (lambda g: D @ g) if known else None
    H, pairs, g = LimitedMemory(f, memory, initial), pairs_of(f, 7), start(12, 99)
    for k, (s, y) in enumerate(pairs, 1):
        assert H.update(s, y)
        assert relative(H.times(g), two_loops(pairs[max(0, k - memory) : k], g, initial)) < 1e-12


@pytest.mark.parametrize("known", [False, True])
def test_dense_bfgs_is_the_textbook_formula(known):
    f = Quadratic.random(10)
    D = torch.diag(torch.linspace(1.0, 2.0, 10, dtype=torch.float64))
    H = DenseInverse(f, "bfgs", initial=(lambda g: D @ g) if known else None, wait=2)
    dense, g = D if known else torch.eye(10, dtype=torch.float64), start(10, 99)
    for k, (s, y) in enumerate(pairs_of(f, 9)):
        if k == 0 and not known:
            dense = dense * (s @ y) / (y @ y)
        H.update(s, y, curvature=1.0)
        dense = bfgs_update(dense, s, y)
        assert relative(H.times(g), dense @ g) < 1e-12


def ssbroyden_update(H, s, y, b_num, first):
    """As stated in the papers, with the direct matrix B = H^-1 at hand (for b)."""
    n, ys, Hy = len(s), float(y @ s), H @ y
    b, h = b_num / ys, float(y @ Hy) / ys
    a = b * h - 1.0
    rho = min(1.0, h * (1.0 - math.sqrt(abs(a) / (1.0 + a))))
    theta = max((rho - 1.0) / a, min(1.0 / rho, (1.0 - b) / b))
    sigma = 1.0 + theta * a
    tau1 = min(1.0, 1.0 / b)
    if first:
        tau = h / sigma
    elif theta > 0:
        tau = tau1 * min(abs(sigma) ** (1.0 / (1.0 - n)), 1.0 / theta)
    else:
        tau = min(tau1 * abs(sigma) ** (1.0 / (1.0 - n)), sigma)
    phi, v = (1.0 - theta) / (1.0 + a * theta), s / ys - Hy / (y @ Hy)
    inner = H - torch.outer(Hy, Hy) / (y @ Hy) + phi * (y @ Hy) * torch.outer(v, v)
    return inner / tau + torch.outer(s, s) / ys


def test_dense_ssbroyden_is_the_published_recursion():
    f, g = Quadratic.random(8), start(8, 99)
    H, dense = DenseInverse(f, wait=3), torch.eye(8, dtype=torch.float64)
    for k, (s, y) in enumerate(pairs_of(f, 12)):
        curvature = float(s @ torch.linalg.solve(dense, s))
        assert H.update(s, y, curvature)
        dense = ssbroyden_update(dense, s, y, curvature, k == 0)
        assert relative(H.times(g), dense @ g) < 1e-11
        assert relative(H.times(y), s) < 1e-10  # the secant equation


def test_products_along_a_run_are_those_of_the_matrix():
    """H g from the last one, H y and the update, against a product of its own."""
    minimizer, seen = SSBroyden(Rosenbrock(9), max_it=60, gtol=0.0), []

    def compare(m, history):
        fresh = DenseInverse(m.function)
        fresh.recall({k: v for k, v in m.inverse.memory().items() if not k.startswith("last")})
        seen.append(relative(m.inverse.times(m.g), fresh.times(m.g)))

    minimizer.minimize(start(9), observers=[compare])
    assert len(seen) > 40 and max(seen) < 1e-9


def test_ssbfgs_is_ssbroyden_without_theta():
    for b, h in [(0.3, 5.0), (1.0, 1.5), (4.0, 2.0)]:
        assert broyden(b, h, 10, "ssbfgs") == (1.0, min(1.0, 1.0 / b))


@pytest.mark.parametrize("method, words", METHODS)
@pytest.mark.parametrize("search", ["wolfe", "armijo", "cubic"])
def test_minima_are_found(method, words, search):
    f = Rosenbrock(20)
    result = method(f, line_search=search, gtol=1e-9, **words).minimize(start(20))
    assert result.reason == Reason.CONVERGED_OPTIMALITY, result.message
    assert relative(result.design, torch.ones(20, dtype=torch.float64)) < 1e-8
    assert result.history[-1].gradients == f.tally.gradients and result.history[-1].work == f.tally.work
    assert all(b <= a for a, b in pairwise(result.history["objective"]))


def test_a_known_hessian_takes_one_step():
    f = Quadratic.random(15)
    inverse = torch.linalg.inv(f.A)
    f.preconditioner = lambda: lambda g: inverse @ g
    for method in (LBFGS, SSBroyden):
        assert method(f, gtol=1e-9).minimize(start(15)).iterations == 1


@pytest.mark.parametrize("method, words", METHODS)
def test_a_restart_goes_on_with_the_same_iterates(method, words):
    saved = {}

    def save(minimizer, history):
        if history[-1].iteration == 9:
            saved.update(memory=minimizer.memory(), records=list(history.records))

    def new():
        return method(Rosenbrock(12), max_it=40, gtol=1e-10, **words)

    whole = new().minimize(start(12), observers=[save])
    rest = new().minimize(start(12), memory=saved["memory"], history=History(saved["records"]))
    assert rest.history["objective"] == whole.history["objective"]
    assert rest.history["gradients"] == whole.history["gradients"]
    assert torch.equal(rest.design, whole.design)


def test_memory_zero_is_steepest_descent():
    f, x = Quadratic.random(5, 3.0), start(5)
    minimizer = LBFGS(f, memory=0, max_it=2, line_search="armijo", first_step="unit")
    seen = []
    minimizer.minimize(x, observers=[lambda m, history: seen.append((m.x.clone(), m.g.clone(), m.radius))])
    for (x, g, _), (y, _, size) in pairwise(seen):
        assert relative(y, x - size * g) < 1e-14


@pytest.mark.parametrize("method, words", METHODS)
def test_what_is_not_finite_is_not_taken(method, words):
    x = torch.full((4,), 1.4, dtype=torch.float64)
    minimizer = method(Hole(4), gtol=1e-8, first_step="unit", **words)
    assert minimizer.minimize(x).converged
    beyond = method(Hole(4), **words).minimize(torch.full((4,), 9.0, dtype=torch.float64))
    assert beyond.reason == Reason.DIVERGED_NAN and "finite" in beyond.message


def test_limits_stop_a_run():
    f = Rosenbrock(10)
    assert LBFGS(f, max_it=3).minimize(start(10)).reason == Reason.DIVERGED_MAX_IT
    result = LBFGS(f, max_gradients=7).minimize(start(10))
    assert result.reason == Reason.WORK_DONE and 7 <= result.history[-1].gradients <= 12
    assert LBFGS(f, max_work=7.0).minimize(start(10)).reason == Reason.WORK_DONE
    assert LBFGS(f, target=1.0).minimize(start(10)).reason == Reason.CONVERGED_TARGET
    assert LBFGS(f).minimize(start(10), until=lambda m: m.f < 2.0).reason == Reason.CONVERGED_TARGET


def test_bad_input_is_named(options):
    f = Rosenbrock(10)
    with pytest.raises(InputError, match="memory"):
        LBFGS(f, memory=-1)
    with pytest.raises(InputError, match=r"\(10,\)"):
        LBFGS(f).minimize(start(9))
    with pytest.raises(InputError, match="finite"):
        LBFGS(f).minimize(start(10) * float("nan"))
    with pytest.raises(InputError, match="mempory"):
        LBFGS(f, mempory=3)
    options(lbfgs_line_search="newton")
    with pytest.raises(InputError, match="wolfe"):
        LBFGS(f)


def test_settings_come_from_options(options):
    options(lbfgs_memory="4", opt_max_it="6", ssbroyden_update="bfgs")
    assert LBFGS(Rosenbrock(3)).settings.memory == 4
    assert SSBroyden(Rosenbrock(3)).stop == StopSettings(max_it=6)
    assert SSBroyden(Rosenbrock(3)).settings.update == "bfgs"


def test_a_checkpoint_on_disk_goes_on_bitwise(tmp_path):
    file, fingerprint = str(tmp_path / "run.safetensors"), {"problem": "rosenbrock"}

    def save(minimizer, history):
        if history[-1].iteration == 20:
            write_memory(file, fingerprint, minimizer.memory(), history)

    whole = SSBroyden(Rosenbrock(12), max_it=40).minimize(start(12), observers=[save])
    memory, history = read_memory(file, fingerprint)
    rest = SSBroyden(Rosenbrock(12), max_it=40).minimize(start(12), memory=memory, history=history)
    assert torch.equal(rest.design, whole.design) and rest.history["work"] == whole.history["work"]
    with pytest.raises(InputError, match="heat"):
        read_memory(file, {"problem": "heat"})
    content = bytearray((tmp_path / "run.safetensors").read_bytes())
    content[-5] ^= 1
    (tmp_path / "run.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        read_memory(file, fingerprint)
