"""Values of PETSc's own options, in a program of a user's."""

import pytest

from pdeopt.control.reduced import ReducedObjective
from pdeopt.core.errors import InputError
from pdeopt.core.petsc_values import TYPES, check_petsc_values, types_of
from pdeopt.optimize.fullspace.sqp import SQPSolver
from pdeopt.optimize.tao import TaoSolver
from tests.helpers import examples


@pytest.mark.parametrize("ending", TYPES)
def test_types_are_those_of_this_petsc(ending):
    of_every_petsc = {"gmres", "lu", "blmvm", "armijo", "newtonls", "nd"}
    assert len(of_every_petsc & set(types_of(ending))) >= 1


@pytest.mark.parametrize(
    "name, value",
    [
        ("pc_factor_mat_solver_type", "petsc"),
        ("my_own_ksp_type", "fgmres"),
        ("mg_levels_2_pc_type", "sor"),
        ("ksp_rtol", "1e-5"),
        ("ksp_rtol", "PETSC_DEFAULT"),
        ("tao_max_it", "7"),
        ("tao_max_funcs", "unlimited"),
        ("sqp_kkt_pc_fieldsplit_type", "SCHUR"),
        ("pc_python_type", "pdeopt.precond.WathenPC"),
        ("sqp_kkt_mat_type", "auto"),  # a setting of pdeopt's
    ],
)
def test_legal_values_pass(name, value, options):
    options(**{name: value})
    check_petsc_values()


@pytest.mark.parametrize(
    "name, value, legal",
    [
        ("my_own_ksp_type", "foo", "fgmres"),
        ("mg_levels_2_pc_type", "Foo", "sor"),
        ("ksp_rtol", "abc", "number"),
        ("ksp_rtol", "1_0", "number"),
        ("ksp_max_it", "2.5", "integer"),
        ("ksp_max_it", "9" * 12, "integer"),
        ("tao_max_it", "-4", ">= 0"),
        ("sqp_kkt_pc_fieldsplit_type", "foo", "schur"),
        ("my_pc_type", "python", "my_pc_python_type|pdeopt.precond.WathenPC"),
        ("pc_factor_mat_solver_type", "foo", "petsc"),
        ("ksp_gmres_restart", "1000000000", "100000"),
        ("pc_python_type", "WathenPC", "pdeopt.precond.WathenPC"),
    ],
)
def test_other_values_are_refused_with_the_legal_ones(name, value, legal, options):
    options(**{name: value})
    with pytest.raises(InputError, match=f"-{name}.*{legal}"):
        check_petsc_values()


def test_solvers_look_at_them(options):
    problem = examples.dense()
    options(other_ksp_type="foo")
    for make in (lambda: SQPSolver(problem), lambda: TaoSolver(ReducedObjective(problem))):
        with pytest.raises(InputError, match="-other_ksp_type"):
            make()
