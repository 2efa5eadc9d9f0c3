"""Points of meshes, and factors of polygons."""

import math

import numpy as np
import pytest
import torch

from nn_adapters.pinn.domains import MeshDomain, PolygonFactor
from nn_adapters.pinn.jets import JetBasis
from nn_adapters.pinn.loss import PINN
from nn_adapters.pinn.network import Network
from nn_adapters.pinn.points import within
from nn_adapters.pinn.terms import Term
from pdeopt.core.errors import InputError
from pdeopt.optimize.squares import LevenbergMarquardt

skfem = pytest.importorskip("skfem")

L = [(0.0, 0.0), (2.0, 0.0), (2.0, 1.0), (1.0, 1.0), (1.0, 2.0), (0.0, 2.0)]


@pytest.mark.parametrize("kind", ["MeshLine", "MeshTri", "MeshQuad", "MeshTet"])
def test_points_of_a_mesh_are_uniform_and_normals_point_out(kind):
    """Means of x and x^2 over a unit box, by points, and those of the divergence theorem over its boundary."""
    mesh = getattr(skfem, kind)().refined(1)
    domain = MeshDomain(mesh)
    x = domain(4000, seed=1)
    assert x.min() >= 0.0 and x.max() <= 1.0 and torch.equal(x, domain(4000, seed=1))
    assert (x.mean(0) - 0.5).abs().max() < 0.03 and (x.square().mean(0) - 1 / 3).abs().max() < 0.03
    edge, normal = domain.boundary(500, seed=2)
    on = torch.minimum(edge.abs(), (edge - 1.0).abs()).amin(1)
    assert on.max() < 1e-12 and (normal.norm(dim=1) - 1.0).abs().max() < 1e-12
    assert (((edge - 0.5) * normal).sum(1) - 0.5).abs().max() < 1e-12  # as far out as the sides are


def test_cells_are_drawn_by_their_size():
    mesh = skfem.MeshTri.init_tensor(np.array([0.0, 0.9, 1.0]), np.array([0.0, 1.0]))
    assert float((MeshDomain(mesh)(3000)[:, 0] > 0.9).double().mean()) == pytest.approx(0.1, abs=0.02)


def test_a_polygon_is_zero_on_its_edges_with_slope_one():
    phi = PolygonFactor(L)
    s = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    corners = phi.corners
    for first, last in zip(corners, corners.roll(-1, 0)):
        edge = last - first
        normal = torch.stack([-edge[1], edge[0]]) / edge.norm()
        x = first + s[:, None] * edge
        assert phi(x).abs().max() < 1e-14
        assert (phi(x + 1e-6 * normal) / 1e-6 - 1.0).abs().max() < 1e-4
    x = within(phi.inside)(300, [(0.0, 2.0), (0.0, 2.0)])
    assert not bool(((x > 1.0).all(1)).any()) and phi(x).min() > 0.0
    assert not bool(phi.inside(torch.tensor([[1.5, 1.5], [-0.1, 0.5], [2.1, 0.5]], dtype=torch.float64)).any())
    assert JetBasis("xy", ("xx", "yy")).of_function(phi, x).isfinite().all()


def test_a_network_on_a_mesh_has_the_values_of_its_boundary():
    """u_xx + u_yy = -2 (x + y) on a triangle, half of a square; boundary values by terms, or by the factor."""
    mesh = skfem.MeshTri().refined(2)
    half = mesh.restrict(np.flatnonzero(mesh.p[:, mesh.t].mean(1).sum(0) < 1.0))
    domain = MeshDomain(half)
    x, edge = domain(300, seed=3), domain.boundary(80, seed=4)[0]

    def exact(x):
        return x.prod(1) * (1.0 - x.sum(1))

    def equation(u, d, x):
        return d["xx"] + d["yy"] + 2.0 * x.sum(1)

    inner = Term(x, equation, ("xx", "yy"))
    soft = PINN(Network(2, (10, 10)), [inner, Term(edge, lambda u, d, x: u, weight=10.0)], "xy")
    triangle = PolygonFactor([(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
    hard = PINN(Network(2, (10, 10)), [inner], "xy", factor=triangle)
    for pinn, limit in ((soft, 2e-2), (hard, 5e-2)):
        theta = LevenbergMarquardt(pinn, max_it=25).minimize(pinn.initial(0)).design
        u = exact(x)
        assert float((pinn.predict(theta, x) - u).norm() / u.norm()) < limit


def test_domains_that_are_none():
    with pytest.raises(InputError, match="MeshTri2"):
        MeshDomain(skfem.MeshTri2())
    with pytest.raises(InputError, match="points"):
        MeshDomain(skfem.MeshTri())(0)
    with pytest.raises(InputError, match="three or more"):
        PolygonFactor([(0.0, 0.0), (1.0, 0.0)])
    with pytest.raises(InputError, match="length"):
        PolygonFactor([(0.0, 0.0), (1.0, 0.0), (1.0, 0.0)])
    assert math.isclose(float(PolygonFactor(L)(torch.tensor([[0.5, 0.0]], dtype=torch.float64))), 0.0, abs_tol=1e-15)
