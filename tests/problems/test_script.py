"""What a user of a problem script sees: files, help, exit codes and messages."""

import json
import re

import numpy as np
import pytest
from petsc4py import PETSc
from scipy.io import loadmat

from pdeopt.core.errors import InputError
from problems import burgers
from tests.helpers.support import python, relative

SMALL = ("-nx", "8", "-nt", "8")
KEYS = {
    "problem",
    "solver",
    "reason",
    "objective",
    "control_norm",
    "state_norm",
    "optimality",
    "feasibility",
    "iterations",
    "krylov_iterations",
    "wall_time_s",
    "peak_memory_mb",
    "ranks",
    "versions",
}


def main(*words):
    return burgers.main([*SMALL, *map(str, words)])


def summary(folder, *words):
    main(*words, "-summary", folder / "summary.json")
    return json.loads((folder / "summary.json").read_text())


# -- what is written -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("-solver", "newton"),
        ("-solver", "active_set"),
        ("-solver", "tao"),
        pytest.param(("-solver", "admm", "-admm_rtol", 1e-9), marks=pytest.mark.slow),
    ],
)
def test_the_summary_says_what_was_solved_and_how(tmp_path, words):
    found = summary(tmp_path, *words)
    assert set(found) >= KEYS
    assert found["problem"] == {
        "name": "burgers",
        "nx": 8,
        "nt": 8,
        "nu": 0.01,
        "alpha": 0.05,
        "theta": 1.0,
        "flux": 0.5,
        "T": 1.0,
        "control": "interval",
    }
    assert found["reason"] > 0 and found["ranks"] == 1
    assert found["optimality"] <= 1e-8 and found["feasibility"] <= 1e-8
    assert {"pdeopt", "petsc", "numpy", "scipy", "torch", "mpi", "python"} <= set(found["versions"])
    assert found["wall_time_s"] > 0 and found["peak_memory_mb"] > 0


@pytest.mark.parametrize("solver", ["sqp", "newton", "active_set", "tao"])
def test_krylov_iterations_have_an_entry_for_each_outer_iteration(tmp_path, solver):
    found = summary(tmp_path, "-solver", solver)
    assert len(found["krylov_iterations"]) == found["iterations"]


def test_norms_are_those_of_the_solution(tmp_path):
    found = summary(tmp_path, "-output", tmp_path / "s.npz")
    solution, dt = np.load(tmp_path / "s.npz"), 1 / 8
    Q = burgers.mass_matrix(8).toarray()
    for name, rows in (("control_norm", solution["control"]), ("state_norm", solution["state"][1:])):
        assert found[name] == pytest.approx(np.sqrt(dt * np.einsum("ki,ij,kj", rows, Q, rows)), rel=1e-12)


def test_the_number_returned_is_the_objective(tmp_path):
    assert main("-summary", tmp_path / "s.json") == json.loads((tmp_path / "s.json").read_text())["objective"]


@pytest.mark.parametrize("control", ["interval", "nodal"])
def test_all_formats_hold_the_same_solution(tmp_path, control):
    h5py = pytest.importorskip("h5py")
    for ending in ("npz", "mat", "h5"):
        main("-control", control, "-output", tmp_path / f"s.{ending}")
    npz = np.load(tmp_path / "s.npz")
    mat = loadmat(tmp_path / "s.mat", squeeze_me=True)
    nodes = 9 if control == "interval" else 10
    shapes = {
        "x": (nodes,),
        "t": (9,),
        "target": (9, nodes),
        "state": (9, nodes),
        "control": (8 + (control == "nodal"), nodes),
        "multiplier": (8, nodes),
        "objective": (),
    }
    assert {name: npz[name].shape for name in npz} == shapes
    with h5py.File(tmp_path / "s.h5") as h5:
        for name in shapes:
            assert relative(np.asarray(h5[name]), npz[name]) <= 1e-14
            assert relative(mat[name], npz[name]) <= 1e-14
    assert np.array_equal(npz["state"][0], (npz["x"] <= 0.5) * (npz["x"] > 0))
    assert not npz["state"][:, [0, -1]].any() and not npz["multiplier"][:, [0, -1]].any()


@pytest.mark.parametrize(
    "ending, magic",
    [
        ("png", b"\x89PNG"),
        pytest.param("pdf", b"%PDF", marks=pytest.mark.slow),
        pytest.param("svg", b"<?xml", marks=pytest.mark.slow),
    ],
)
def test_pictures_are_pictures(tmp_path, ending, magic):
    pytest.importorskip("matplotlib")
    main("-plot", tmp_path / f"p.{ending}")
    assert (tmp_path / f"p.{ending}").read_bytes().startswith(magic)


@pytest.mark.parametrize("solver", ["active_set", "tao"])
def test_bounds_are_kept(tmp_path, solver):
    main("-solver", solver, "-lower", "-0.5", "-upper", 1.0, "-output", tmp_path / "s.npz")
    z = np.load(tmp_path / "s.npz")["control"]
    assert z.min() >= -0.5 - 1e-14 and z.max() <= 1.0 + 1e-14 and (z.max() == 1.0 or z.min() == -0.5)


def test_a_run_without_convergence_writes_its_files_and_says_why(tmp_path, capfd):
    found = summary(tmp_path, "-sqp_max_it", 1)
    assert found["reason"] < 0 and found["iterations"] == 1
    assert "-sqp_max_it" in capfd.readouterr().out


# -- options -------------------------------------------------------------------------------------------------


def test_an_options_file_is_as_good_as_the_command_line(tmp_path):
    (tmp_path / "a.opts").write_text("# a comment\n-alpha 1e-2  # cheap\n-solver newton\n-sqp_monitor\n")
    expected = main("-alpha", "1e-2", "-solver", "newton")
    assert main("-options_file", tmp_path / "a.opts") == expected
    done = python("-m", "problems.burgers", *SMALL, "-options_file", tmp_path / "a.opts")
    assert done.returncode == 0 and f"{expected:.10g}"[:10] in done.stdout, done.stderr


def test_options_end_with_the_run():
    before = PETSc.Options().getAll()
    main("-alpha", 1e-2, "-sqp_kkt_ksp_type", "preonly")
    with pytest.raises(InputError):
        main("-alpha", -1)
    after = PETSc.Options().getAll()
    assert {k: v for k, v in after.items() if not k.startswith("sqp_kkt_mat_mumps")} == {
        k: v for k, v in before.items() if not k.startswith("sqp_kkt_mat_mumps")
    }


def test_log_view_is_petscs():
    done = python("-m", "problems.burgers", *SMALL, "-log_view")
    assert done.returncode == 0 and "MatMult" in done.stdout


@pytest.mark.parametrize(
    "word", ["-help", pytest.param("--help", marks=pytest.mark.slow), pytest.param("-h", marks=pytest.mark.slow)]
)
def test_help_shows_the_scripts_options_first_and_then_petscs(word):
    done = python("-m", "problems.burgers", word)
    assert done.returncode == 0, done.stderr
    own, petsc = done.stdout.index("-nx <"), re.search(r"-sqp_kkt_ksp_type|ksp_type", done.stdout).start()
    assert own < done.stdout.index("-sqp_max_it <") < petsc
    assert "tao_type" in done.stdout and "(interval | nodal)" in done.stdout


# -- bad input -----------------------------------------------------------------------------------------------

BAD = {
    "nx 1": (("-nx", 1), "-nx", ">= 2"),
    "nt 1": (("-nt", 1), "-nt", ">= 2"),
    "nx 2.5": (("-nx", 2.5), "-nx", "integer"),
    "nx word": (("-nx", "many"), "-nx", "integer"),
    "alpha 0": (("-alpha", 0), "-alpha", "> 0"),
    "alpha negative": (("-alpha", "-0.1"), "-alpha", "> 0"),
    "alpha nan": (("-alpha", "nan"), "-alpha", "finite"),
    "theta small": (("-theta", 0.49), "-theta", ">= 0.5"),
    "theta large": (("-theta", 1.01), "-theta", "<= 1"),
    "nu 0": (("-nu", 0), "-nu", "> 0"),
    "T 0": (("-T", 0), "-T", "> 0"),
    "flux inf": (("-flux", "inf"), "-flux", "finite"),
    "control": (("-control", "splines"), "-control", "interval | nodal"),
    "solver": (
        ("-solver", "lbfgs"),
        "-solver",
        "sqp | newton | feasible | active_set | interior | moreau_yosida | tao | admm",
    ),
    "sqp_type": (("-sqp_max_it", -1), "-sqp_max_it", ">= 0"),
    "misspelt": (("-aplha", 0.1), "-aplha", "-alpha"),
    "misspelt later": (("-sqp_max_itt", 3), "-sqp_max_itt", "-sqp_max_it"),
    "misspelt of PETSc": (("-sqp_kkt_ksp_typ", "gmres"), "-sqp_kkt_ksp_typ", "-sqp_kkt_ksp_type"),
    "bounds without a solver for them": (
        ("-solver", "newton", "-lower", 0),
        "-lower",
        "auto | -solver active_set | -solver interior | -solver moreau_yosida | -solver tao",
    ),
    "bounds on Newton": (("-solver", "active_set", "-sqp_type", "newton", "-lower", 0), "bounds", "active_set"),
    "crossed bounds of active sets": (("-solver", "active_set", "-lower", 1, "-upper", 0), "bound", "lower <= upper"),
    "crossed bounds": (("-solver", "tao", "-lower", 1, "-upper", 0), "bound", "lower <= upper"),
    "bounds without a bounded solver": (("-solver", "tao", "-tao_type", "lmvm", "-lower", 0), "lmvm", "blmvm"),
    "output ending": (("-output", "{}/s.csv"), "-output", ".npz | .mat | .h5"),
    "plot ending": (("-plot", "{}/s.gif"), "-plot", ".png | .pdf | .svg"),
    "summary ending": (("-summary", "{}/s.txt"), "-summary", ".json"),
    "output without a folder": (("-output", "{}/no/s.npz"), "-output", "folder"),
    "checkpoint without a folder": (("-checkpoint", "{}/no/c"), "-checkpoint", "folder"),
    "output is a folder": (("-output", "{}"), "-output", "ends in"),
    "checkpoint is a folder": (("-checkpoint", "{}"), "-checkpoint", "file"),
    "restart from nothing": (("-restart", "{}/none"), "-restart", "-checkpoint"),
    "no options file": (("-options_file", "{}/none.opts"), "-options_file", "file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_with_what_is_legal_and_nothing_is_written(tmp_path, case):
    words, name, legal = BAD[case]
    words = [str(word).format(tmp_path) for word in words]
    files = ("-output", tmp_path / "o.npz", "-summary", tmp_path / "s.json", "-plot", tmp_path / "p.png")
    given = {files[k]: files[k + 1] for k in (0, 2, 4) if files[k] not in words}
    with pytest.raises(InputError) as error:
        main(*(word for pair in given.items() for word in pair), *words)
    assert name in str(error.value) and legal in str(error.value), str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", ["nx 1", "misspelt", "output ending", "restart from nothing", "no options file"])
def test_bad_input_exits_with_code_2_and_one_line(tmp_path, case):
    words, name, legal = BAD[case]
    done = python("-m", "problems.burgers", *SMALL, *(str(word).format(tmp_path) for word in words))
    assert done.returncode == 2, done.stderr
    assert name in done.stderr and legal in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_restart_from_another_problem_names_the_difference(tmp_path):
    main("-checkpoint", tmp_path / "c", "-sqp_max_it", 1)
    for words, name in ((("-alpha", 0.1), "alpha"), (("-nt", 9), "nt"), (("-solver", "newton"), "solver")):
        with pytest.raises(InputError, match=name):
            main("-restart", tmp_path / "c", *words)


@pytest.mark.parametrize("damage", ["truncated", pytest.param("flipped", marks=pytest.mark.slow), "empty"])
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    file = tmp_path / "c"
    main("-checkpoint", file, "-sqp_max_it", 1)
    content = file.read_bytes()
    k = len(content) - 100
    file.write_bytes(
        {"truncated": content[:k], "empty": b"", "flipped": content[:k] + bytes([content[k] ^ 1]) + content[k + 1 :]}[
            damage
        ]
    )
    with pytest.raises(InputError, match="damaged"):
        main("-restart", file, "-output", tmp_path / "o.npz")
    assert not (tmp_path / "o.npz").exists()
