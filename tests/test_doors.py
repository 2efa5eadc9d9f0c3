"""The doors: every public name is there, loaded when it is asked for, and says what it is."""

import ast
import configparser
import importlib
import inspect
import subprocess
import sys

import pytest
from setuptools import find_packages

from tests.helpers.imports import sources
from tests.helpers.support import ROOT, environment

DOORS = [
    ".".join(path.parent.relative_to(ROOT).parts)
    for package in ("pdeopt", "nn_adapters")
    for path in sorted((ROOT / package).rglob("__init__.pyi"))
]
USERS = ("pdeopt", "nn_adapters")

#: What the house plan promises, section 2: a user's program needs no more than these.
PROMISED = {
    "pdeopt": """TimeDependentConstraint StepJacobian Objective Tracking ControlCost TerminalLoss TimeGrid ControlMap
        ControlProblem StepMatrix solve minimize SQPSolver TaoSolver LBFGS SSBroyden SPQN APTS MGOPT RMTR Result Reason
        PdeoptError InputError SolveFailure SmoothFunction Hierarchy Decomposition taylor_rates assert_consistent""",
    "nn_adapters": """LayerParallel GRUParallel LayerStack LayerConstraint dense conv initialize NetworkLoss
        depth_hierarchy PINN Term Network lsgd Training load_dataset""",
}


def public(door):
    module = importlib.import_module(door)
    return {name: getattr(module, name) for name in module.__all__}


@pytest.mark.parametrize("door", DOORS)
def test_every_public_name_is_there_and_has_a_docstring(door):
    module, names = importlib.import_module(door), public(door)
    assert names and sorted(names) == sorted(dir(module)) == sorted(module.__all__)
    objects = {name: found for name, found in names.items() if inspect.isclass(found) or inspect.isfunction(found)}
    assert not [name for name, found in objects.items() if not vars(found).get("__doc__", found.__doc__)]
    with pytest.raises(AttributeError, match="it has"):
        module.no_such_name  # noqa: B018


@pytest.mark.parametrize("package", USERS)
def test_what_is_public_has_a_docstring(package):
    silent = [
        f"{module}.{node.name}"
        for module, path in sources(package).items()
        for node in ast.parse(path.read_text()).body
        if isinstance(node, (ast.ClassDef, ast.FunctionDef))
        if not node.name.startswith("_") and ast.get_docstring(node) is None
    ]
    assert not silent


@pytest.mark.parametrize("door", USERS)
def test_users_find_what_the_plan_promises(door):
    assert not set(PROMISED[door].split()) - set(dir(importlib.import_module(door)))


@pytest.mark.parametrize("door", USERS)
def test_what_takes_arguments_says_which(door):
    """Classes and functions of the users' doors describe their arguments, themselves or where they inherit them."""
    silent = []
    for name, found in public(door).items():
        if inspect.isclass(found):
            own = vars(found).get("__init__")
            takes = own is not None and len(inspect.signature(own).parameters) > 1 and "Args:" not in _texts(found)
            is_plain = issubclass(found, (tuple, BaseException)) or hasattr(found, "__dataclass_fields__")
            silent += [name] if takes and not is_plain else []
        elif inspect.isfunction(found) and inspect.signature(found).parameters:
            silent += [name] if "Args:" not in (found.__doc__ or "") else []
    assert not silent


def _texts(cls):
    return " ".join(each.__doc__ or "" for each in cls.__mro__ if each is not object)


def test_doors_load_nothing_before_a_name_is_asked_for():
    code = "import sys, pdeopt, nn_adapters; assert not {'torch', 'petsc4py.PETSc'} & set(sys.modules), sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_rooms_need_no_import_of_their_own():
    code = "import pdeopt, nn_adapters; pdeopt.steps.TimeGrid; pdeopt.optimize.parts.steihaug; nn_adapters.data.Dataset"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("door", DOORS)
def test_no_public_name_is_hidden_by_a_module(door):
    """Once a module is imported, Python finds it before the door's `__getattr__` is asked."""
    folder = ROOT / door.replace(".", "/")
    assert not {path.stem for path in folder.iterdir()} & set(importlib.import_module(door).__all__)


def test_the_wheel_holds_the_library_and_its_stubs():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    packages = find_packages(str(ROOT), include=config["options.packages.find"]["include"].split())
    assert {name.split(".")[0] for name in packages} == {"pdeopt", "nn_adapters"} and set(DOORS) <= set(packages)
    for package, patterns in config["options.package_data"].items():
        folder = ROOT / package
        held = {path for each in patterns.replace(",", " ").split() for path in folder.glob(each)}
        assert held == {*folder.rglob("*.pyi"), *folder.rglob("py.typed")}
