"""Weak forms against the same equations in PyTorch and scikit-fem: the same optimum; derivatives, borders, ranks."""

import numpy as np
import pytest
import torch

import pdeopt as po
from problems.burgers import BurgersCase, BurgersSettings
from problems.heat import HeatCase, HeatSettings
from problems.klein_gordon import KleinGordonCase, KleinGordonSettings
from tests.helpers.forms import Functions, bump, burgers, heat, interval, klein_gordon, tracking
from tests.helpers.support import python

import ufl  # isort: skip (it comes with DOLFINx)
from dolfinx import fem  # isort: skip
from ufl import dx, grad, inner  # isort: skip


@pytest.fixture(scope="module")
def burgers_form():
    return burgers(32, theta=0.5)


@pytest.fixture(scope="module")
def heat_form():
    return heat(12, 4)


def keep_initial(constraint):
    return constraint.initial_state(torch.empty(0)).expand(2, -1)[0]


def fitted(sensors=(0.25, 0.5, 0.75), elements=12):
    """A problem whose coefficient and initial state are sought: u_t = (exp(m) u_x)_x + u^2 + z."""
    on = Functions(interval(elements))
    m, u0 = fem.Function(on.Z), fem.Function(on.V)
    flow = ufl.exp(m) * inner(grad(on.u), grad(on.v)) - (m * on.z + on.u**2) * on.v
    F = (on.u - on.u_old) * on.v * dx + on.dt * flow * dx
    mass = 0.5 * (m**2 + u0**2 + inner(grad(m), grad(m))) * dx
    constraint = on.constraint(F, p=[m, u0], initial=u0, param_mass=mass)
    nearest = [int(np.abs(on.points(constraint)[:, 0] - x).argmin()) for x in sensors]
    misfit = po.Tracking(np.ones(len(sensors)), observe=nearest) + po.ControlCost(1.0, constraint.control_mass)
    prior = po.TerminalLoss(lambda u, p: 0.5 * (p * constraint_mass(p)).sum())
    constraint_mass = po.StepMatrix.constant(constraint.param_mass)
    return po.ControlProblem(constraint, misfit + prior, po.TimeGrid.uniform(4, 0.3)), on


class TestOptimum:
    def test_of_heat_is_that_of_scikit_fem(self, heat_form):
        constraint, on = heat_form
        problem = tracking(constraint, bump(on.points(constraint)), 1e-3, 8)
        other = HeatCase(HeatSettings(nx=12, ny=4, nt=8)).problem
        assert (problem.n, problem.m) == (other.n, other.m)
        assert po.solve(problem).objective == pytest.approx(0.00105448677191, rel=1e-9)  # DESIGN, and of `other`
        assert po.solve(other).objective == pytest.approx(po.solve(problem).objective, rel=1e-11)

    @pytest.mark.parametrize("method", [{"method": "newton"}, {"method": "sqp"}, {"method": "tao", "tao_type": "nls"}])
    def test_of_burgers_is_that_of_torch(self, burgers_form, method):
        constraint, _ = burgers_form
        problem = tracking(constraint, keep_initial(constraint), 0.05, 16)
        other = BurgersCase(BurgersSettings(nx=32, nt=16, theta=0.5)).problem
        assert po.solve(problem, **method).objective == pytest.approx(po.solve(other).objective, rel=1e-8)

    def test_without_time_is_that_of_the_matrices(self):
        """-u'' + u + u^2 = z: no u_old, no dt, and natural weights."""
        on = Functions(interval(12))
        stiff, square = inner(grad(on.u), grad(on.v)), on.u**2
        F = (stiff + on.u * on.v + square * on.v - on.z * on.v) * dx
        weak = po.FormConstraint(F, on.u, None, on.z, None)
        K, M = (weak.hessian(0.5 * form * dx, on.u) for form in (inner(grad(on.u), grad(on.u)), on.u**2))
        target = np.cos(3 * on.points(weak)[:, 0])
        objective = po.Tracking(target, M) + po.ControlCost(1e-3, M)
        found = po.ControlProblem(weak, objective, po.SingleNode())
        assert max(po.assert_consistent(found).values()) <= 1e-6
        functional = po.FormObjective(weak, control=0.5e-3 * on.z**2 * dx) + po.Tracking(target, M)
        results = [po.solve(each) for each in (found, po.ControlProblem(weak, functional, po.SingleNode()))]
        assert results[0].objective == pytest.approx(results[1].objective, rel=1e-12)
        u, z, _ = found.unpack(results[0])
        linear = torch.from_numpy((K + M) @ u[0].numpy() - M @ np.asarray(z).ravel())
        nonlinear = weak.residual(u, u, torch.as_tensor(z).view(1, -1), found.grid.steps)[0] - linear
        assert nonlinear.sum() == pytest.approx(float(u[0] @ torch.from_numpy(M @ u[0].numpy())), rel=1e-8)  # int u^2
        with pytest.raises(po.InputError, match="SingleNode"):
            po.ControlProblem(weak, objective, po.TimeGrid.uniform(1, 1.0))
        with pytest.raises(po.InputError, match="u_old, but no dt"):
            po.FormConstraint(F, on.u, on.u_old, on.z, None)

    def test_of_klein_gordon_is_that_of_torch(self):
        """A mixed space, boundary values and coefficients that move with time."""
        constraint, on = klein_gordon(16)
        (u, _), (space, places) = ufl.split(on.u), on.V.sub(0).collapse()
        unknown = {dof: k for k, dof in enumerate(constraint.state_dofs)}
        x, free = space.tabulate_dof_coordinates()[:, 0], [k for k, dof in enumerate(places) if dof in unknown]
        tracked, x = [unknown[places[k]] for k in free], torch.from_numpy(x[free])

        def target(t):
            return x * torch.cos(t[:, None]) + torch.sin(torch.pi * x) * (t[:, None] / 12) ** 2

        mass = constraint.hessian(0.5 * u**2 * dx, on.u)[tracked][:, tracked]
        problem = tracking(constraint, target, 1e-2, 16, T=12.0, mass=mass, observe=tracked)
        po.assert_consistent(problem)
        other = KleinGordonCase(KleinGordonSettings(nx=16, nt=16)).problem
        assert po.solve(problem).objective == pytest.approx(po.solve(other).objective, rel=1e-9)

    def test_with_bounds_is_that_of_torch(self, burgers_form, options):
        """Active sets and interior points see the same steps."""
        constraint, _ = burgers_form
        problem = tracking(constraint, keep_initial(constraint), 0.05, 8)
        other = BurgersCase(BurgersSettings(nx=32, nt=8, theta=0.5)).problem
        for bounds in (dict(lower=-0.2, upper=0.2), dict(state_upper=1.05)):
            found, expected = (po.solve(each, **bounds) for each in (problem, other))
            assert found.reason > 0
            assert found.objective == pytest.approx(expected.objective, rel=1e-6)

    def test_by_wathen_and_the_reduced_hessian_is_the_same(self, heat_form, options):
        constraint, on = heat_form
        problem = tracking(constraint, bump(on.points(constraint)), 1e-3, 8)
        for precond in ("wathen", "reduced"):
            options(sqp_kkt_precond=precond)
            assert po.solve(problem, method="newton").objective == pytest.approx(0.00105448677191, rel=1e-8)


class TestDerivatives:
    def test_are_consistent(self, burgers_form):
        constraint, _ = burgers_form
        po.assert_consistent(tracking(constraint, keep_initial(constraint), 0.05, 5))

    def test_of_parameters_are_consistent(self):
        """A field of coefficients and the initial state, both unknown, beside a control."""
        problem, _ = fitted()
        po.assert_consistent(problem)

    def test_of_autograd_are_those_of_the_jacobian(self, burgers_form):
        constraint, _ = burgers_form
        torch.manual_seed(0)
        u, d, w = (torch.randn(3, constraint.state_dim, dtype=torch.float64) for _ in range(3))
        z, steps = torch.randn(3, constraint.control_dim, dtype=torch.float64), po.TimeGrid.uniform(3, 1.0).steps
        jacobian = constraint.linearize(u, u, z, steps)
        _, pushed = torch.func.jvp(lambda x: constraint.residual(u, x, z, steps), (u,), (d,))
        x = u.clone().requires_grad_()
        (pulled,) = torch.autograd.grad(constraint.residual(u, x, z, steps), x, w)
        assert torch.allclose(pushed, jacobian.jvp(d_new=d), rtol=0, atol=1e-14)
        assert torch.allclose(pulled, jacobian.vjp(w)[1], rtol=0, atol=1e-14)

    @pytest.mark.slow
    def test_a_parameter_is_fitted(self):
        """Gauss-Newton on coefficient and initial state reaches a point where the gradient vanishes."""
        problem, _ = fitted()
        result = po.solve(problem, method="tao", tao_type="nls", gauss_newton=True)
        assert result.reason > 0
        lin = problem.at(problem.join(result.state, result.design))
        gradient = problem.layout.split(lin.lagrangian_gradient(result.multiplier))[1]
        assert gradient.norm() < 1e-6


class TestObjective:
    """Functionals in UFL."""

    def test_quadratic_ones_are_tracking_and_control_cost(self, heat_form):
        constraint, on = heat_form
        x = ufl.SpatialCoordinate(on.mesh)
        d = fem.Function(on.V)
        d.interpolate(lambda x: x[0] * x[1])
        form = po.FormObjective(constraint, 0.5 * (on.u - d) ** 2 * dx, 5e-4 * on.z**2 * dx, on.u * x[0] * dx)
        known = po.Tracking(constraint.coefficients(d, on.u), constraint.state_mass)
        known += po.ControlCost(1e-3, constraint.control_mass)
        grid = po.TimeGrid.uniform(5, 1.0)
        assert form.terms[0][1].is_quadratic and form.is_convex
        torch.manual_seed(0)
        u = torch.randn(5, constraint.state_dim, dtype=torch.float64)
        z = torch.randn(5, constraint.control_dim, dtype=torch.float64)
        known_hessian, hessian = (each.hvp(u, z, grid.steps, u, z, grid.steps.p) for each in (known, form))
        assert torch.allclose(hessian[0], known_hessian[0], atol=1e-14) and torch.allclose(hessian[1], known_hessian[1])
        problem = po.ControlProblem(constraint, form, grid)
        po.assert_consistent(problem)
        assert po.solve(problem).reason > 0

    def test_others_are_consistent_and_have_a_minimum(self, burgers_form):
        constraint, on = burgers_form
        form = po.FormObjective(constraint, (on.u - 0.3) ** 4 * dx, 0.05 * (on.z**2 + on.z**4) * dx)
        problem = po.ControlProblem(constraint, form, po.TimeGrid.uniform(5, 1.0))
        po.assert_consistent(problem)
        assert po.solve(problem).reason > 0

    def test_of_other_functions_are_refused(self, burgers_form):
        constraint, on = burgers_form
        with pytest.raises(po.InputError, match=r"state of FormObjective: got a functional of z"):
            po.FormObjective(constraint, on.u * on.z * dx)
        with pytest.raises(po.InputError, match=r"control of FormObjective.*without test functions"):
            po.FormObjective(constraint, control=on.z * on.v * dx)


class TestSteps:
    def test_linear_matrices_are_assembled_once(self, heat_form):
        constraint, _ = heat_form
        grid = po.TimeGrid.uniform(6, 1.0)
        u = torch.zeros(6, constraint.state_dim, dtype=torch.float64)
        z = torch.zeros(6, constraint.control_dim, dtype=torch.float64)
        first = constraint.linearize(u, u, z, grid.steps)
        assert all(block.is_constant for block in first.blocks.values())
        assert constraint.linearize(u + 1, u, z, grid.steps).blocks["A"] is first.blocks["A"]
        assert constraint.pattern.W.nnz == 0

    def test_lengths_may_differ(self, heat_form):
        """Rows of steps of different lengths are those of steps taken alone."""
        constraint, _ = heat_form
        grid = po.TimeGrid([0.0, 0.1, 0.4, 0.5])
        torch.manual_seed(0)
        u = torch.randn(3, constraint.state_dim, dtype=torch.float64)
        z = torch.randn(3, constraint.control_dim, dtype=torch.float64)
        rows = [
            constraint.residual(u[k : k + 1], 2 * u[k : k + 1], z[k : k + 1], grid.steps[k : k + 1]) for k in range(3)
        ]
        assert torch.allclose(constraint.residual(u, 2 * u, z, grid.steps), torch.cat(rows), rtol=1e-13, atol=1e-14)

    def test_a_control_on_the_boundary_has_its_coefficients_alone(self):
        on = Functions(interval(8))
        flux = on.dt * on.z * on.v * ufl.ds
        F = (on.u - on.u_old) * on.v * dx + on.dt * inner(grad(on.u), grad(on.v)) * dx - flux
        constraint = on.constraint(F, bcs=[])
        assert constraint.state_dim == 9 and list(constraint.control_dofs) == [0, 8]
        mass = constraint.hessian(0.5 * on.z**2 * ufl.ds, on.z)
        assert np.allclose(mass.toarray(), np.eye(2))
        assert np.array_equal(constraint.values([[3.0, 4.0]], "control"), [[3, *[0] * 7, 4]])

    def test_fixed_values_count(self):
        """u = 2 at both ends is a solution at rest; `values` puts the ends back."""
        on = Functions(interval(4))
        F = (on.u - on.u_old) * on.v * dx + on.dt * (inner(grad(on.u), grad(on.v)) - on.z * on.v) * dx
        constraint = on.constraint(F, bcs=[on.boundary(2.0)], initial=2.0)
        u0 = constraint.initial_state(torch.empty(0))[None]
        z = torch.zeros(1, constraint.control_dim, dtype=torch.float64)
        assert constraint.residual(u0, u0, z, po.TimeGrid.uniform(1, 1.0).steps).abs().max() < 1e-14
        assert np.array_equal(constraint.values(u0), np.full((1, 5), 2.0))


class TestBorder:
    """Input that would give a wrong answer is refused, and the message says what is legal."""

    @pytest.fixture(scope="class")
    def on(self):
        return Functions(interval(4))

    def heat(self, on, **changed):
        u, z, dt = (changed.get(name, getattr(on, name)) for name in ("u", "z", "dt"))
        z = 0.0 if z is None else z
        return (u - on.u_old) * on.v * dx + dt * (inner(grad(u), grad(on.v)) - z * on.v) * dx

    def test_conditions_on_another_space(self, on):
        other = Functions(on.mesh, ("Lagrange", 2))
        with pytest.raises(po.InputError, match=r"bcs\[0\].*another function space.*of u_new"):
            on.constraint(self.heat(on), bcs=[other.boundary()])
        with pytest.raises(po.InputError, match=r"bcs\[0\].*float"):
            on.constraint(self.heat(on), bcs=[0.0])

    @pytest.mark.parametrize(
        "change, message",
        [
            (dict(dt=0.1), "does not depend on dt.*the time grid sets its value"),
            (dict(z=None), "does not depend on z"),
            (dict(u=2.0), "does not depend on u_new"),
        ],
    )
    def test_a_form_without_one_of_its_arguments(self, on, change, message):
        F = self.heat(on, **change) if "u" not in change else (on.dt * on.z - on.u_old) * on.v * dx
        with pytest.raises(po.InputError, match=message):
            on.constraint(F)

    def test_a_parameter_that_nothing_depends_on(self, on):
        m, stray = fem.Function(on.Z), fem.Function(on.Z)
        F = self.heat(on) + on.dt * m * on.u * on.v * dx
        with pytest.raises(po.InputError, match=r"p\[1\].*F does not depend on"):
            on.constraint(F, p=[m, stray])

    def test_no_form(self, on):
        with pytest.raises(po.InputError, match=r"F.*legal: a ufl.Form"):
            on.constraint(on.u)
        trial = ufl.TrialFunction(on.V)
        with pytest.raises(po.InputError, match=r"2 arguments.*not a TrialFunction"):
            on.constraint(trial * on.v * dx)
        with pytest.raises(po.InputError, match=r"dt: got float; legal: a dolfinx.fem.Constant"):
            po.FormConstraint(self.heat(on), on.u, on.u_old, on.z, 0.1)
        with pytest.raises(po.InputError, match=r"u_old.*u_new itself"):
            po.FormConstraint(self.heat(on), on.u, on.u, on.z, on.dt)

    def test_functions_of_another_mesh(self, on):
        other = Functions(interval(4))
        with pytest.raises(po.InputError, match="mesh of z: got another mesh"):
            po.FormConstraint(self.heat(on), on.u, on.u_old, other.z, on.dt)

    def test_a_functional_that_is_not_quadratic(self, on):
        constraint = on.constraint(self.heat(on))
        with pytest.raises(po.InputError, match=r"not constant.*quadratic"):
            constraint.hessian(on.u**3 * dx, on.u)


@pytest.mark.mpi
def test_a_mesh_over_ranks_and_one_a_rank_give_the_same():
    found = python("-m", "tests.helpers.parallel_forms", ranks=2)
    assert found.returncode == 0, found.stdout + found.stderr
