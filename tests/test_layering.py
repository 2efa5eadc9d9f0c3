"""Who may import whom: packages are stacks of rooms; a file stands on lower rooms and on earlier files of its own."""

import pytest

from tests.helpers.imports import circle, graph, imported, sources
from tests.helpers.support import ROOT

#: The rooms of each package, lowest first. A new room also goes into docs/architecture.md.
ROOMS = {
    "pdeopt": [
        "pdeopt.core",
        "pdeopt.space.layouts",
        "pdeopt.steps.matrices",
        "pdeopt.steps.exchange",
        "pdeopt.steps",
        "pdeopt.functions",
        "pdeopt.squares",
        "pdeopt.control",
        "pdeopt.space",
        "pdeopt.kkt",
        "pdeopt.precond",
        "pdeopt.lowrank",
        "pdeopt.optimize.parts",
        "pdeopt.optimize.fullspace",
        "pdeopt.optimize.descent",
        "pdeopt.optimize.squares",
        "pdeopt.optimize.splitting",
        "pdeopt.optimize.solutions",
        "pdeopt.optimize",
    ],
    "nn_adapters": [
        "nn_adapters.data",
        "nn_adapters.layers.parts",
        "nn_adapters.layers",
        "nn_adapters.parallel",
        "nn_adapters.curvature",
        "nn_adapters.losses",
        "nn_adapters.control",
        "nn_adapters.pinn",
        "nn_adapters.training",
        "nn_adapters.splitting",
        "nn_adapters.compression",
    ],
    "problems": ["problems.shared", "problems", "problems.benchmarks"],
}

#: What the files of a package must not import.
FORBIDDEN = {
    "pdeopt": ("nn_adapters", "problems", "tests", "torch.nn"),
    "nn_adapters": ("problems", "tests"),
    "problems": ("tests",),
}

FILES = {package: sources(package) for package in ROOMS}
MOST_ROOMS, MOST_MODULES = 10, 14


def room_of(module):
    return module.rpartition(".")[0]


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_import_lower_rooms_only(package):
    place = {room: k for k, room in enumerate(ROOMS[package])}
    unknown = {room_of(module) for module in FILES[package]} - set(place)
    assert not unknown, f"rooms without a place in the table: {unknown}"
    upward = [
        (module, other)
        for module, others in graph(FILES[package]).items()
        for other in others
        if place[room_of(other)] > place[room_of(module)]
    ]
    assert not upward


@pytest.mark.parametrize("package", ROOMS)
def test_no_files_import_in_a_circle(package):
    assert not circle(graph(FILES[package]))


def test_circles_are_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]
    assert not circle({"a": {"b", "c"}, "b": {"c"}, "c": set()})


@pytest.mark.parametrize("package", ROOMS)
def test_packages_know_nothing_above_themselves(package):
    for module, path in FILES[package].items():
        for name in imported(path):
            wrong = any(name == above or name.startswith(above + ".") for above in FORBIDDEN[package])
            assert not wrong, f"{module} imports {name}"


@pytest.mark.parametrize("package", ["pdeopt", "nn_adapters"])
def test_the_library_imports_from_rooms_and_users_from_doors(package):
    doors = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / package).rglob("__init__.py")}
    names = {each.rsplit(".", 1)[0] for each in FILES[package]} | doors
    for module, path in FILES[package].items():
        taken = set(imported(path)) & names
        files = {room_of(name) for name in imported(path) if name in FILES[package] or name in FILES["pdeopt"]}
        assert not taken - files, f"{module} imports from the door {taken - files}"


@pytest.mark.parametrize("package", ["pdeopt", "nn_adapters"])
def test_a_visitor_sees_the_building(package):
    top = sorted(path.name for path in (ROOT / package).iterdir() if path.name != "__pycache__")
    rooms = [name for name in top if (ROOT / package / name).is_dir()]
    assert set(top) - set(rooms) <= {"__init__.py", "__init__.pyi", "py.typed"}
    assert len(rooms) <= MOST_ROOMS
    for room in ROOMS[package]:
        inside = [module for module in FILES[package] if room_of(module) == room]
        assert 0 < len(inside) <= MOST_MODULES, f"{room} has {len(inside)} modules"
