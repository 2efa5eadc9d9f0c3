"""The problems that are weak forms: found parameters, counts that the mesh does not change, informed directions."""

from tests.helpers import forms  # noqa: F401 (where DOLFINx is absent it skips this module)

import numpy as np  # isort: skip
import pytest  # isort: skip
import torch  # isort: skip

import pdeopt as po  # isort: skip
from pdeopt.control.reduced import reduced_hessian  # isort: skip
from problems.inverse_diffusion import InverseDiffusion, InverseSettings, main  # isort: skip
from problems.navier_stokes import Cavity, Cylinder, FlowSettings  # isort: skip
from problems.navier_stokes import main as flow_main  # isort: skip
from problems.shared.channel import CENTER, HEIGHT, LENGTH, RADIUS, channel_mesh  # isort: skip


@pytest.fixture(scope="module")
def inverse():
    case = InverseDiffusion(InverseSettings(n=8, nt=6, rtol=1e-3))
    return case, case.solve()


def test_inverse_diffusion_finds_the_maximum_in_few_iterations(inverse):
    case, result = inverse
    assert result.reason > 0 and result.iterations <= 15
    m, u_0 = case.errors(result)
    assert m < 0.7 and u_0 < 0.7  # what the prior knows is 1


def test_inverse_diffusion_is_consistent(inverse):
    po.assert_consistent(inverse[0].problem)


def test_informed_directions_diagonalize_the_whole_hessian(inverse):
    """It is misfit and prior: v'(H + R) v = 1 + lam for directions of length 1 in the prior."""
    case, result = inverse
    posterior = case.posterior(result, 10)
    values, v = posterior.eigenvalues, posterior.directions
    assert (np.diff(values) <= 0).all() and values[0] > 1e3
    lin = case.problem.at(case.problem.join(result.state, result.design))
    products = [reduced_hessian(case.problem, lin, None, torch.from_numpy(d.copy())).numpy() for d in v.T]
    assert np.allclose(v.T @ np.stack(products, axis=1), np.diag(1 + values), atol=1e-6 * values[0])


def test_inverse_diffusion_as_a_program(capfd, tmp_path):
    picture, file = tmp_path / "plate.png", tmp_path / "plate.npz"
    files = ["-plot", str(picture), "-output", str(file)]
    objective = main(["-n", "8", "-nt", "4", "-rank", "5", "-rtol", "1e-2", *files])
    assert picture.stat().st_size > 10_000
    with np.load(file) as found:
        assert found["objective"] == objective and found["state"].shape == (4, 81)
        assert found["triangles"].shape == (128, 3) and abs(found["m"] - found["true_m"]).max() < 2.0
    with pytest.raises(po.InputError, match=r"-n: got 12"):
        main(["-n", "12"])


@pytest.fixture(scope="module")
def cavity():
    return Cavity(FlowSettings(n=4, nt=4))


def test_derivatives_of_the_flow_are_consistent(cavity):
    po.assert_consistent(cavity.problem)


def test_newton_steers_the_flow_and_it_has_no_divergence(cavity):
    """The weak divergence of each state is among the rows of F."""
    result = cavity.solve()
    assert result.reason > 0
    uncontrolled = cavity.problem.solve_state(cavity.problem.create_design())
    free = cavity.problem.at(cavity.problem.join(uncontrolled, cavity.problem.create_design()))
    assert result.objective < 0.6 * free.value
    lin = cavity.problem.at(cavity.problem.join(result.state, result.design))
    assert lin.residual.norm() < 1e-9


@pytest.mark.slow
def test_iterations_do_not_grow_with_the_steps():
    few, many = (Cavity(FlowSettings(n=4, nt=nt)).solve().iterations for nt in (8, 32))
    assert abs(many - few) <= 1


def test_the_control_of_the_flow_is_that_of_the_bottom(cavity):
    assert cavity.constraint.control_dim == 5
    assert cavity.constraint.state_dim == 2 * 81 + 25 - 2 * (9 * 2 + 7) - 7 - 1  # walls, lid, bottom, pressure


def test_the_flow_as_a_program(capfd, tmp_path):
    picture, file = tmp_path / "flow.png", tmp_path / "flow.npz"
    series, files = tmp_path / "flow.pvd", ["-plot", str(picture), "-output", str(file)]
    objective = flow_main(["-n", "4", "-nt", "2", "-tol", "1e-3", *files, "-series", str(series)])
    assert all(name in series.read_text() for name in ("velocity", "pressure", "control"))
    assert picture.stat().st_size > 10_000
    with np.load(file) as found:
        lid = np.isclose(found["y"], 1)
        assert found["objective"] == objective and found["velocity"].shape == (2, 25, 2)
        assert found["velocity"][1, lid, 0] == pytest.approx(16 * (found["x"] * (1 - found["x"]))[lid] ** 2)


# -- behind a cylinder --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cylinder():
    return Cylinder(FlowSettings(geometry="cylinder", n=4, nt=2, T=0.5, reynolds=20.0))


def test_the_mesh_around_the_cylinder_fills_the_channel():
    points, triangles = channel_mesh(8)
    a, b, c = points[triangles].transpose(1, 0, 2)
    areas = 0.5 * ((b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0])
    x = np.unique(points[np.isclose(np.hypot(*(points - CENTER).T), RADIUS)], axis=0)
    angle = np.sort(np.arctan2(*(x - CENTER).T))
    polygon = 0.5 * RADIUS**2 * np.sin(np.diff(np.r_[angle, angle[0] + 2 * np.pi])).sum()
    assert (areas > 0).all() and areas.sum() == pytest.approx(LENGTH * HEIGHT - polygon, rel=1e-12)
    assert len(x) == 32


def test_the_drag_at_rest_nears_that_of_schaefer_and_turek_and_derivatives_are_consistent(cylinder):
    assert cylinder.at_rest == pytest.approx(5.57953523384, rel=0.02)
    assert cylinder.constraint.control_dim == 16
    po.assert_consistent(cylinder.problem)


def test_the_integral_of_drag_is_of_second_order_in_time():
    """Halving the steps divides the differences by four; the skin is accelerated smoothly."""
    found = []
    for nt in (8, 16, 32):
        problem = Cylinder(FlowSettings(geometry="cylinder", n=2, nt=nt, reynolds=20.0)).problem
        design, middle = problem.create_design(), (np.arange(nt) + 0.5) / nt
        design.setArray(np.repeat(0.3 * np.sin(np.pi * middle) ** 2, problem.m))
        found.append(problem.at(problem.join(problem.solve_state(design), design)).value)
    one, two = np.diff(found)
    assert np.log2(one / two) == pytest.approx(2, abs=0.2)


@pytest.mark.slow
def test_a_moving_skin_lowers_the_drag(cylinder):
    result = cylinder.solve()
    assert result.converged and cylinder.mean_drag(result) < 0.95 * cylinder.at_rest
    free = cylinder.problem.create_design()
    state = cylinder.problem.solve_state(free)
    assert result.objective < cylinder.problem.at(cylinder.problem.join(state, free)).value
