"""Who may import whom: pdeopt is a stack of levels."""

import ast

import pytest

from tests.helpers.support import ROOT

#: A module imports modules of lower levels; within a level only those that stand before it.
LEVELS = [
    ["errors", "arrays", "autodiff", "options", "monitor"],
    [
        "timegrid",
        "sparse",
        "windows",
        "stepsolve",
        "innerproduct",
        "constraint",
        "objective",
        "controlmap",
        "verify",
        "decomposition",
        "smooth",
        "team",
        "subsampling",
    ],
    ["propagate", "mgrit", "linear_mgrit", "propagator", "transfer"],
    ["problem", "reduced", "layout", "metric", "assembly", "kkt", "coupled", "blocks", "checkpoint"],
    [
        "linesearch",
        "trustregion",
        "inversehessian",
        "trustsubproblem",
        "lsr1",
        "trustmodel",
        "minibatch",
        "hierarchy",
        "reducedfunction",
        "precond",
        "precond.*",
        "kktsolver",
    ],
    ["optimize", "optimize.*"],
]
#: Folders whose modules may import each other.
ROOMS = ("precond", "optimize")
FORBIDDEN = ("nn_adapters", "problems", "tests", "torch.nn")

FILES = sorted((ROOT / "pdeopt").rglob("*.py"))


def name_of(path):
    return ".".join(path.relative_to(ROOT / "pdeopt").with_suffix("").parts).removesuffix(".__init__")


def rank(module):
    """(level, place); raises where the table does not know the module."""
    room = module.split(".")[0]
    for level, names in enumerate(LEVELS):
        for place, name in enumerate(names):
            if name in (module, f"{room}.*"):
                return level, place
    raise AssertionError(f"pdeopt.{module} has no level: add it to the table and to docs/architecture.md")


def imports(path):
    """(module, runtime) of every import; those under `if TYPE_CHECKING` are not of the running program."""
    tree = ast.parse(path.read_text())
    typing = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node not in typing) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            yield node.module, node not in typing
            yield from ((f"{node.module}.{alias.name}", node not in typing) for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_modules_import_lower_levels_only(path):
    module = name_of(path)
    if module == "__init__":
        return
    own, known = rank(module), {name_of(file) for file in FILES}
    for imported, runtime in imports(path):
        other = imported.removeprefix("pdeopt.")
        if not imported.startswith("pdeopt.") or other not in known or not runtime:
            continue
        together = own[0] == rank(other)[0] and module.split(".")[0] == other.split(".")[0] in ROOMS
        assert together or rank(other) < own, f"pdeopt.{module} imports pdeopt.{other}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_pdeopt_knows_nothing_above_itself(path):
    for imported, _ in imports(path):
        assert not any(imported == name or imported.startswith(name + ".") for name in FORBIDDEN), imported


@pytest.mark.parametrize("folder", ["pdeopt", "nn_adapters", "problems", "tests"])
def test_no_file_is_long(folder):
    long = {str(path): n for path in (ROOT / folder).rglob("*.py") if (n := len(path.read_text().splitlines())) > 400}
    assert not long


def test_the_table_has_no_ghosts():
    known = {name_of(file) for file in FILES}
    for name in (name for names in LEVELS for name in names if not name.endswith("*")):
        assert name in known
