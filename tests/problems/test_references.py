"""Reference solutions fulfill their equations, and what is computed on a grid no longer depends on it."""

import math

import pytest
import torch

from nn_adapters.pinn.jets import JetBasis
from problems.shared import references
from problems.shared.equations import EQUATIONS
from problems.shared.references import _allen_cahn, _diffusion_transport
from tests.helpers.support import relative


def inner(name, n=200, seed=0):
    unit = torch.rand(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    low, high = torch.tensor(EQUATIONS[name].box, dtype=torch.float64).T
    return low + (high - low) * (0.05 + 0.9 * unit)


@pytest.mark.parametrize("name", ["burgers", "klein_gordon"])
def test_closed_forms_fulfil_the_equation_that_is_trained(name):
    case, x = EQUATIONS[name], inner(name)
    basis = JetBasis(case.names, case.derivatives)
    jets = basis.of_function(case.solution, x)
    d = {key: jets[row] for key, row in basis.rows.items()}
    size = max(float(row.abs().max()) for row in jets)
    assert float(case.residual(jets[0], d, x).abs().max()) < 1e-11 * size


@pytest.mark.parametrize("name", EQUATIONS)
def test_lift_and_factor_give_the_values_on_the_boundary(name):
    """Where the factor is zero the lift is the solution."""
    case = EQUATIONS[name]
    x = case.grid((21, 21))
    here = x[case.forms["plain"].factor(x).abs() < 1e-14]
    assert len(here) >= 20 + 2 * 20
    assert float((case.forms["plain"].lift(here) - case.solution(here)).abs().max()) < 1e-6


def test_the_lift_of_klein_gordon_is_not_the_solution():
    case, x = EQUATIONS["klein_gordon"], inner("klein_gordon")
    assert float((case.forms["plain"].lift(x) - case.solution(x)).abs().max()) > 0.3


def test_cole_hopf_is_exact_with_shifted_exponents():
    x = inner("burgers", 2000)
    assert (references.burgers(x) - references.burgers(x, nodes=140)).abs().max() < 1e-13
    shock = torch.tensor([[-1e-3, 0.5], [1e-3, 0.5]], dtype=torch.float64)
    left, right = references.burgers(shock).tolist()
    assert left == pytest.approx(-right, abs=1e-14) and 0.05 < left < 1.0


@pytest.mark.parametrize("make, name", [(_diffusion_transport, "diffusion_transport"), (_allen_cahn, "allen_cahn")])
def test_grid_solutions_have_converged(make, name):
    """Half the elements change little, and a quarter a few times as much, as quadratic elements do."""
    x, (fine,) = inner(name, 500), make.__wrapped__.__defaults__
    finest = EQUATIONS[name].solution(x)
    half, quarter = (float((make(fine // k)(x) - finest).norm() / finest.norm()) for k in (2, 4))
    assert half < 1e-5 and half < 0.25 * quarter


def test_grid_solutions_fulfil_their_equations():
    """By differences over a step that their elements resolve."""
    h = 0.02
    for name, slack in (("diffusion_transport", 2e-2), ("allen_cahn", 2e-2)):
        case = EQUATIONS[name]
        x = inner(name, 100) * torch.tensor([0.5 if name != "allen_cahn" else 0.9, 0.9], dtype=torch.float64)
        e = h * torch.eye(2, dtype=torch.float64)
        u, near = case.solution(x), [[case.solution(x + s * e[i]) for s in (-1, 1)] for i in range(2)]
        d = {}
        for letter, (before, after) in zip(case.names, near):
            d[letter], d[2 * letter] = (after - before) / (2 * h), (after - 2 * u + before) / h**2
        residual = case.residual(u, d, x)
        assert float(residual.abs().median()) < slack * max(float(v.abs().max()) for v in d.values()), name


def test_diffusion_transport_is_symmetric():
    x = inner("diffusion_transport")
    assert relative(references.diffusion_transport(x), references.diffusion_transport(x.flip(1))) < 1e-12


def test_allen_cahn_is_even_and_stays_between_its_phases():
    x = inner("allen_cahn")
    mirrored = x * torch.tensor([-1.0, 1.0])
    u = references.allen_cahn(x)
    assert torch.equal(u, references.allen_cahn(mirrored)) and u.abs().max() < 1.0 + 1e-9
    start = torch.stack([torch.linspace(-1, 1, 31, dtype=torch.float64), torch.zeros(31, dtype=torch.float64)], 1)
    expected = start[:, 0] ** 2 * torch.cos(math.pi * start[:, 0])
    assert (references.allen_cahn(start) - expected).abs().max() < 1e-6
