"""The house rules: sizes of files, functions and classes; spelling; one name for one concept."""

import ast
import re
from collections import Counter

import pytest

from tests.helpers.imports import imported, sources
from tests.helpers.support import ROOT

MAX_FILE, MAX_FUNCTION, MAX_METHODS, MAX_LARGE_CLASSES, MAX_FMT_SKIP = 400, 60, 15, 6, 20

LIBRARY = {**sources("pdeopt"), **sources("nn_adapters")}
PACKAGES = {**LIBRARY, **sources("problems")}
TESTS = sources("tests")
TREES = {name: ast.parse(path.read_text()) for name, path in PACKAGES.items()}

#: British stems; an American reader trips over them in a name, an option or a message.
BRITISH = re.compile(
    r"optimis|minimis|maximis|initialis|linearis|normalis|regularis|discretis|factoris|parametris|parameteris|"
    r"vectoris|serialis|generalis|organis|recognis|summaris|penalis|realis(?!t)|stabilis|equalis|symmetris|characteris|"
    r"visualis|customis|utilis|synchronis|analys(?=ed|e$|er|ing)|colour|neighbour|behaviour|favour|honour|labour|"
    r"centre(?!c)|\bmetre|fibre|modell(?=ed|ing)|labell|travell|cancell(?=ed|ing)|grey|artefact|acknowledgement|"
    r"programme(?!d|r)|catalogue|dialogue|licence|defence",
    re.IGNORECASE,
)


def public_names():
    """Where and what: classes, functions, methods, arguments and settings that a user may write."""
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                yield module, node.name
            if isinstance(node, ast.FunctionDef):
                arguments = node.args
                for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
                    yield module, each.arg
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                yield module, node.target.id
            if isinstance(node, ast.Assign):
                yield from ((module, each.id) for each in node.targets if isinstance(each, ast.Name))


def texts():
    """Strings of the packages that are no docstrings: options, help, messages, labels."""
    for module, tree in TREES.items():
        docstrings = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                yield module, node.value


def lines_without_docstring(node):
    first, lines = node.body[0], node.end_lineno - node.lineno + 1
    if ast.get_docstring(node, clean=False) is not None:
        lines -= first.end_lineno - first.lineno + 1
    return lines


def test_no_file_is_long():
    files = PACKAGES | TESTS | sources("docs")
    long = {name: n for name, path in files.items() if (n := len(path.read_text().splitlines())) > MAX_FILE}
    assert not long


def test_functions_fit_a_screen():
    trees = {**TREES, **{name: ast.parse(path.read_text()) for name, path in TESTS.items()}}
    long = [
        (module, node.name)
        for module, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and lines_without_docstring(node) > MAX_FUNCTION
    ]
    assert not long


def test_classes_are_one_noun():
    large = {
        f"{module}.{node.name}": count
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and (count := sum(isinstance(each, ast.FunctionDef) for each in node.body)) > MAX_METHODS
    }
    assert len(large) <= MAX_LARGE_CLASSES, large


def test_spelling_is_american():
    assert BRITISH.search("Minimiser") and not BRITISH.search("minimizer")
    assert not [(module, name) for module, name in public_names() if BRITISH.search(name)]
    assert not [(module, text[:80]) for module, text in texts() if BRITISH.search(text)]


def test_the_formatter_serves_the_reader():
    files = {*PACKAGES.values(), *TESTS.values()}
    skipped = sum(path.read_text().count("# fmt" + ": skip") for path in files)
    assert skipped <= MAX_FMT_SKIP


def test_one_concept_has_one_name():
    shared = {name: tree for name, tree in TREES.items() if name in LIBRARY or name.startswith("problems.shared.")}
    names = Counter(
        node.name
        for tree in shared.values()
        for node in tree.body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert not [name for name, count in names.items() if count > 1]


@pytest.mark.parametrize("module", TESTS)
def test_helpers_are_no_tests(module):
    wrong = [name for name in imported(TESTS[module]) if name.startswith("tests.") and ".test_" in name]
    assert not wrong, f"{module} imports {wrong}"


def test_every_folder_is_looked_at():
    assert len(LIBRARY) > 80 and len(TESTS) > 40 and (ROOT / "tests" / "helpers").is_dir()
