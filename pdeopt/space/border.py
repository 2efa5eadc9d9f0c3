"""What a user gives to a `FormConstraint`, checked, and functionals and values turned into matrices and rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp

from pdeopt.core.arrays import Array
from pdeopt.core.errors import InputError
from pdeopt.space.derivatives import FormDerivatives
from pdeopt.space.fenicsx import packages
from pdeopt.space.stepforms import StepForm
from pdeopt.space.steppoint import Field, StepPoint
from pdeopt.steps.sparse import StepMatrix


def require_arguments(F: Any, u_new: Any, u_old: Any, z: Any, dt: Any, t: Any, p: Sequence[Any]) -> None:
    """Raise `InputError` for what is no form, function or constant, or does not belong together."""
    fem, ufl = packages().fem, packages().ufl
    functions = {"u_new": u_new, "u_old": u_old, "z": z, **{f"p[{k}]": each for k, each in enumerate(p)}}
    if (u_old is None) != (dt is None):
        legal = "both, or None for both where the equation has no time"
        raise InputError("u_old, dt", f"{'no u_old, but dt' if u_old is None else 'u_old, but no dt'}", legal)
    may_lack = ("z", "t") if dt is not None else ("z", "t", "u_old", "dt")
    for name, each in functions.items():
        if not isinstance(each, fem.Function) and not (name in may_lack and each is None):
            raise InputError(name, type(each).__name__, "a dolfinx.fem.Function")
    for name, each in {"dt": dt, "t": t}.items():
        if not isinstance(each, fem.Constant) and not (name in may_lack and each is None):
            raise InputError(name, type(each).__name__, "a dolfinx.fem.Constant that F depends on")
    size = u_new.function_space.mesh.comm.size
    if size > 1 and p:
        legal = "none, or a mesh made with MPI.COMM_SELF and space_ranks 1"
        raise InputError("p", f"parameters on a mesh of {size} ranks", legal)
    for name, each in functions.items():
        if each is not None and each.function_space.mesh.topology is not u_new.function_space.mesh.topology:
            raise InputError(f"mesh of {name}", "another mesh than that of u_new", "functions of one mesh")
    if u_old is not None and u_old.function_space != u_new.function_space:
        raise InputError("u_old", "a function of another space than that of u_new", "a function of the same space")
    if u_old is u_new:
        raise InputError("u_old", "the function u_new itself", "two functions of one space")
    if not isinstance(F, ufl.Form):
        raise InputError("F", type(F).__name__, "a ufl.Form: integrals of the residual times a test function")
    arguments = F.arguments()
    if len(arguments) != 1:
        legal = "a form linear in one test function: F(u_new, ...; v), with u_new a Function, not a TrialFunction"
        raise InputError("F", f"a form with {len(arguments)} arguments", legal)
    if arguments[0].ufl_function_space() != u_new.function_space:
        legal = "ufl.TestFunction of the space of u_new"
        raise InputError("F", "a test function of another space than that of u_new", legal)


def require_dependence(forms: FormDerivatives, z: Any, dt: Any, initial: Any) -> None:
    """Raise `InputError` for arguments that F does not depend on: slips that would change the problem."""
    at = forms.point
    split = "of mixed functions the parts by ufl.split, which F is differentiated by"
    if forms.A.is_zero:
        raise InputError("F", "a form that does not depend on u_new", f"a residual with u_new; {split}")
    if z is not None and not at.controls.size:
        raise InputError("F", "a form that does not depend on z", f"a residual with z, or z=None; {split}")
    if dt is not None and "dt" not in forms.residual.depends:
        legal = "a residual with the Constant dt: the time grid sets its value, and not a number in the form"
        raise InputError("F", "a form that does not depend on dt", legal)
    for k, field in enumerate(at.p):
        if field.function is not initial and not forms.depends_on(field):
            raise InputError(f"p[{k}]", "a function that F does not depend on", "a coefficient of F, or `initial`")


def field_of(point: StepPoint, function: Any) -> Field:
    """The field of one of the functions of a step. Raises `InputError` for another."""
    for field in (point.new, point.z, *point.p):
        if field is not None and field.function is function:
            return field
    raise InputError("of", type(function).__name__, "u_new, z or one of p, the function itself")


def interpolated(values: Any, space: Any) -> Array:
    """All coefficients of what a user gives: a number, x -> values, or a `Function` of the space."""
    fem = packages().fem
    if isinstance(values, fem.Function):
        if values.function_space != space:
            raise InputError("values", "a Function of another space", "one of the same space")
        return np.array(values.x.array)
    out = fem.Function(space)
    if isinstance(values, (int, float)):
        out.x.array[:] = float(values)
    elif callable(values):
        out.interpolate(values)
    else:
        array = np.asarray(values, dtype=float)
        if array.shape != out.x.array.shape:
            legal = f"a number, a function of x, a Function, or coefficients of shape {out.x.array.shape}"
            raise InputError("values", f"{type(values).__name__} of shape {array.shape}", legal)
        out.x.array[:] = array
    return np.array(out.x.array)


def require_functional(form: Any, what: str) -> None:
    """Raise `InputError` for what is no form without test functions."""
    if not isinstance(form, packages().ufl.Form) or form.arguments():
        raise InputError(what, type(form).__name__, "a ufl.Form without test functions, as 0.5 * u**2 * ufl.dx")


def hessian(point: StepPoint, functional: Any, functions: Sequence[Any]) -> sp.csr_matrix | StepMatrix:
    """The second derivative of a functional over the unknowns of functions, at what they hold.

    On a mesh that ranks share, of one function, the owned rows with their ghosts.
    """
    require_functional(functional, "functional")
    ufl = packages().ufl
    fields = [field_of(point, f) for f in functions]
    slopes = [ufl.derivative(functional, field.function) for field in fields]
    blocks = [
        [_matrix(StepForm(ufl.derivative(slope, b.function), point, a, b)) for b in fields]
        for slope, a in zip(slopes, fields)
    ]
    if point.is_shared:
        return blocks[0][0]
    return sp.csr_matrix(sp.bmat([[block.as_csr() for block in row] for row in blocks]))


def _matrix(form: StepForm) -> StepMatrix:
    if form.depends - {"dt", "t"}:
        raise InputError("functional", "one whose second derivative is not constant", "a quadratic functional")
    return StepMatrix(form.sparsity, form.values()[None])


def inner_product(point: StepPoint, functions: Sequence[Any], given: Any) -> Any:
    """A matrix as given, or that of a functional; default the L2 products of the functions."""
    ufl = packages().ufl
    if not functions or not (given is None or isinstance(given, ufl.Form)):
        return given
    if given is None:
        given = sum(0.5 * ufl.inner(f, f) * ufl.dx for f in functions)
    return hessian(point, given, functions)
