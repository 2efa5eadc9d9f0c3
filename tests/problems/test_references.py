"""Reference solutions fulfill their equations, and what is computed on a grid no longer depends on it."""

import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.io
import torch

from nn_adapters.pinn.jets import JetBasis
from problems.shared import references, spectral
from problems.shared.equations import EQUATIONS
from problems.shared.references import _allen_cahn, _diffusion_transport
from tests.helpers.support import ROOT, relative

DATA = ROOT.parent / "shared" / "data" / "pinns"


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


@pytest.mark.parametrize("name", ["burgers", "klein_gordon", "diffusion_transport", "allen_cahn"])
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


# -- periodic equations by Fourier modes, the L by its singular functions ------------------------------------------


def at_start(name, n=40):
    low, high = EQUATIONS[name].box[0]
    return torch.stack([torch.linspace(low, high, n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)], 1)


@pytest.mark.parametrize(
    "name, slack", [("kdv", 1e-12), ("kuramoto_sivashinsky", 1e-12), ("cahn_hilliard", 1e-12), ("schroedinger", 5e-4)]
)
def test_lifts_and_modes_have_the_initial_values(name, slack):
    """That of Schroedinger's equation lacks the highest modes of a kink of size 0.05."""
    case, x = EQUATIONS[name], at_start(name)
    form = list(case.forms.values())[-1]
    start = {
        "kdv": torch.cos(math.pi * x[:, 0]),
        "kuramoto_sivashinsky": -torch.sin(math.pi * x[:, 0]),
        "cahn_hilliard": -torch.cos(2.0 * math.pi * x[:, 0]),
        "schroedinger": 2.0 / torch.cosh(x[:, 0]),
    }[name]
    lift, found = form.lift(x).reshape(len(x), -1)[:, 0], case.solution(x).reshape(-1, len(x))[0]
    assert float(form.factor(x).abs().max()) == 0.0
    assert float((lift - start).abs().max()) < slack and float((found - start).abs().max()) < slack


def test_exponential_steps_are_of_fourth_order():
    """u' = -20 u + u^2 / 10, whose solution is a logistic curve."""
    exact = 1.0 / (0.005 + 0.995 * math.exp(20.0 * 0.2))
    errors = []
    for steps in (16, 32, 64):
        found = spectral.exponential_steps(
            np.array([-20.0 + 0j]), lambda v: 0.1 * v**2, np.array([1.0 + 0j]), 0.2 / steps, steps, steps
        )
        errors.append(abs(found[-1][0] - exact))
    assert errors[2] < 1e-8 and all(10.0 < a / b < 20.0 for a, b in pairwise(errors))


def test_masses_and_momenta_are_kept():
    """Of both equations; energy of the modes, by Parseval."""
    for make, waves in ((spectral._korteweg_de_vries, 512), (spectral._schroedinger, 512)):
        square = np.square(np.abs(make().slow)).sum(1) / waves
        assert np.ptp(square) < 1e-8 * square[0]


def test_the_solution_on_the_l_fulfils_its_equation_and_is_zero_on_the_boundary():
    """What it has on the boundary bounds its error inside, as the difference is harmonic."""
    z = references.lshape_boundary(333)
    edge = torch.from_numpy(np.stack([z.real, z.imag], 1))
    assert float(references.poisson_lshape(edge).abs().max()) < 1e-12
    case = EQUATIONS["poisson_lshape"]
    x = case.points("uniform", 300, 1)
    x = x[(x.abs() < 0.99).all(1) & (x.norm(dim=1) > 0.05)]
    steps = 1e-3 * torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    laplace = (sum(case.solution(x + step) for step in steps) - 4.0 * case.solution(x)) / 1e-6
    assert float((laplace + 1.0).abs().max()) < 2e-3
    (form,) = case.forms.values()
    assert float(form.factor(edge).abs().max()) < 1e-10
    ratio = case.solution(x) / form.factor(x)
    assert float(ratio.min()) > 0.2 and float(ratio.max()) < 3.0  # u / factor is a nice function


@pytest.mark.parametrize(
    "name, file, slack",
    [("kdv", "KdV.mat", 1e-9), ("kuramoto_sivashinsky", "KS.mat", 1e-9), ("schroedinger", "NLS.mat", 3e-5)],
)
def test_modes_agree_with_published_solutions(name, file, slack):
    """Those of the Schroedinger equation have half as many modes for the kink."""
    path = DATA / file
    if not path.exists():
        pytest.skip(f"no file {path}")
    stored = scipy.io.loadmat(path)
    x, t, u = stored["x"].ravel(), stored["tt"].ravel()[::20], stored["uu"][:, ::20].ravel()
    places = torch.from_numpy(np.stack([np.repeat(x, len(t)), np.tile(t, len(x))], 1))
    found = EQUATIONS[name].solution(places).numpy()
    found = found[0] + 1j * found[1] if len(found) == 2 else found
    assert np.linalg.norm(found - u) < slack * np.linalg.norm(u)
