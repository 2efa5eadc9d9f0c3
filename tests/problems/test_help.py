"""-help is true: what it lists is read under the choice that it names, and what the documentation names is listed."""

import re
from importlib import import_module

import pytest

import nn_adapters as nna
from problems.shared import command_line
from problems.shared.equations import Equation
from tests.helpers.scripts import FORMS, PROGRAMS, SMALL, fake_dataset, options_of
from tests.helpers.support import ROOT

#: Options of PETSc, by how they begin.
PETSC = ("tao_", "log_", "options_", "mat_mumps_", "sqp_kkt_ksp_", "sqp_kkt_pc_", "wathen_ksp_", "wathen_pc_")


def test_every_script_is_here():
    files = {path.stem for path in (ROOT / "problems").glob("*.py")} - {"__init__"}
    assert files == set(SMALL) | PROGRAMS | FORMS


# -- what is listed is read ----------------------------------------------------------------------------------


def word(value):
    return str(value).lower() if isinstance(value, bool) else str(value)


def given_under(path, options):
    """All options that are listed for the choices of a path, with their defaults, and the choices themselves."""
    given = {}
    for section in options:
        if path in section.when:
            given |= {f"-{name}": word(value) for name, value in section.options.items() if value not in (None, "")}
    return given | {f"-{name}": value for name, value in path}


def small(script, path):
    """Options that make a run small, where the choices of a path let it read them."""
    chosen, words = dict(path), SMALL[script]
    given = dict(zip(words[::2], words[1::2]))
    if "optimizer" in chosen:
        given.pop("-rmtr_nested", None)
    if chosen.get("solver") == "admm":  # which reads no -sqp_
        given["-admm_max_it"] = given.pop("-sqp_max_it")
    if chosen.get("solver") == "sqp":
        given |= {"-samples": "6", "-max_cpu_seconds": "1e-6"}
    if {"interior", "moreau_yosida"} & set(chosen.values()):  # which needs inequalities
        given["-upper"] = "100"
    if chosen.get("tao_type") == "python":  # which needs a name
        given["-tao_python_type"] = chosen.get("tao_python_type", "pdeopt.optimize.LBFGS")
    return given


def paths_of(options):
    return list(dict.fromkeys(way for section in options for way in ((), *section.when)))


#: Coarse steps do not carry waves: multigrid takes minutes.
SLOW = [("klein_gordon", (("wathen_propagator", "multigrid"),))]
CASES = [(script, path) for script in SMALL for path in paths_of(options_of(script)) if (script, path) not in SLOW]


@pytest.mark.parametrize("script, path", CASES)
def test_what_help_lists_is_accepted_with_the_choice_that_reads_it(script, path, monkeypatch):
    monkeypatch.setattr(nna, "load_dataset", fake_dataset)
    monkeypatch.setattr(Equation, "relative_error", lambda *arguments: 1.0)  # references take seconds
    given = given_under(path, options_of(script)) | small(script, path)
    words = [word for pair in given.items() for word in pair]
    import_module(f"problems.{script}").main(words)  # raises InputError for an option that nothing reads


@pytest.mark.parametrize("script", SMALL)
def test_help_lists_all_sections_and_leaves_with_code_0(script, capfd, monkeypatch):
    monkeypatch.setattr(command_line, "_petsc_help", lambda: None)  # see test_script.py
    with pytest.raises(SystemExit) as left:
        import_module(f"problems.{script}").main(["-help"])
    out = capfd.readouterr().out
    assert left.value.code == 0
    own = out[: out.index("\nPETSc:")]
    listed = set(re.findall(r"^  -(\w+)", own, flags=re.M))
    assert listed == {name for section in options_of(script) for name in section.options}


# -- what is documented is listed ----------------------------------------------------------------------------

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

#: Options that are documented beside those of the scripts: of mpiexec, benchmarks, `po.solve`, a recipe, and messages.
ELSEWHERE = {"m", "n", "json", "only", "quick", "repeat", "h", "help", "solve_method", "solve_view", "bb_values"}
ELSEWHERE |= {"use_gpu_aware_mpi"}


def is_known(name, options):
    """Whether an option is listed, one of PETSc, or one of a nested solver of PETSc or preconditioner of pdeopt."""
    prefixes = ("", "kkt_", "sqp_kkt_", "sqp_", "sub_", "sqp_kkt_sub_", "mg_levels_")
    petsc = re.fullmatch(r"(\w+_)?(ksp|pc|tao|mat|log|options|mg|fieldsplit|vec|malloc)_\w+", name)
    if name.endswith("_"):  # a prefix
        return any(each.startswith(name) for each in options)
    bare = [name.removeprefix(prefix) for prefix in prefixes if name.startswith(prefix)]
    return bool(petsc) or any(each in options for each in bare) or any(f"sqp_kkt_{each}" in options for each in bare)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_what_the_documentation_names_is_listed(document):
    everything = {name for script in SMALL for section in options_of(script) for name in section.options} | ELSEWHERE
    text, missing = document.read_text(), []
    for script, rest in re.findall(r"-m problems\.(\w+)([^\n`]*)", text):
        if script in SMALL:
            own = {name for section in options_of(script) for name in section.options} | ELSEWHERE
            names = re.findall(r"(?<=\s)-([a-z]\w*)", rest.split("#")[0])
            missing += [f"{script}: -{name}" for name in names if not is_known(name, own)]
    for span in re.findall(r"`(-[a-zA-Z][^`\n]*)`", text):
        names = re.findall(r"(?:^|\s)-([a-z]\w*)(?=[\s,]|$)", span)
        missing += [f"-{name}" for name in names if not is_known(name, everything)]
    assert not missing, missing
