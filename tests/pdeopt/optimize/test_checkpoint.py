import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from mpi4py import MPI

from pdeopt.control.verify import randomize
from pdeopt.core.errors import InputError
from pdeopt.core.interrupt import Interrupted, interruptible
from pdeopt.core.monitor import History, Record
from pdeopt.core.storage import replace_file
from pdeopt.optimize import LBFGS, SSBroyden
from pdeopt.optimize.checkpoint import Checkpoint, CheckpointFile, read_checkpoint, write_checkpoint
from pdeopt.optimize.fullspace import SQPSolver
from problems.burgers import BurgersCase, BurgersSettings
from tests.helpers import examples
from tests.helpers.functions import Rosenbrock
from tests.helpers.support import ENVIRONMENT, ROOT, python, relative

FINGERPRINT = {"problem": "dense", "nx": 5, "alpha": 0.1, "solver": "sqp"}


def written(problem, path, seed=0):
    x, lam = randomize(problem.create_primal(), seed), randomize(problem.create_multiplier(), seed + 1)
    records = [Record(0, 1 / 3, 1e-3, float("inf"), float("nan"), 4), Record(1, 0.1, 0.0, 1e-300, 2.0, 7, "note")]
    checkpoint = Checkpoint(x, lam, {"radius": 1 / 7}, History(records))
    write_checkpoint(str(path), problem, FINGERPRINT, checkpoint)
    return checkpoint


@pytest.mark.parametrize("name", ["dense", "dense nodal", "layer"])
def test_what_is_written_is_what_is_read(tmp_path, name):
    problem = examples.EXAMPLES[name]()
    saved = written(problem, tmp_path / "c")
    read = read_checkpoint(str(tmp_path / "c"), problem, FINGERPRINT)
    assert read.x.equal(saved.x) and read.lam.equal(saved.lam) and read.memory == saved.memory
    assert str(read.history.as_rows()) == str(saved.history.as_rows())  # as text: nan is not nan


def test_nothing_but_the_checkpoint_is_left_in_the_folder(tmp_path):
    problem = examples.dense()
    for seed in range(3):
        written(problem, tmp_path / "c", seed)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_the_file_holds_no_pickle(tmp_path):
    """safetensors: a length, a header in JSON, and numbers."""
    written(examples.dense(), tmp_path / "c")
    content = (tmp_path / "c").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    sizes = {"F64": 8, "I64": 8, "U8": 1}
    tensors = [v for k, v in header.items() if k != "__metadata__"]
    numbers = sum(np.prod(v["shape"], dtype=int) * sizes[v["dtype"]] for v in tensors)
    assert len(content) == 8 + length + numbers
    assert json.loads(header["__metadata__"]["header"])["fingerprint"] == FINGERPRINT


@pytest.mark.parametrize("name", FINGERPRINT)
def test_a_checkpoint_of_another_problem_is_refused(tmp_path, name):
    problem = examples.dense()
    written(problem, tmp_path / "c")
    with pytest.raises(InputError, match=name):
        read_checkpoint(str(tmp_path / "c"), problem, FINGERPRINT | {name: "another"})


def test_a_checkpoint_of_another_size_is_refused(tmp_path):
    written(examples.dense(), tmp_path / "c")
    with pytest.raises(InputError, match="numbers"):
        read_checkpoint(str(tmp_path / "c"), examples.dense(num_steps=6), FINGERPRINT)


def damaged(content):
    """Files that are no checkpoint: cut off, and with a bit flipped anywhere."""
    draw = random.Random(0)
    for size in (0, 1, 7, 8, 9, len(content) // 2, len(content) - 1):
        yield content[:size]
    yield content + b"\0"
    for place in [0, 7, 8, 9, len(content) - 1, *draw.sample(range(len(content)), 60)]:
        yield content[:place] + bytes([content[place] ^ (1 << draw.randrange(8))]) + content[place + 1 :]
    yield pickle.dumps({"state": 1})


def test_damage_anywhere_is_noticed(tmp_path):
    problem = examples.dense()
    saved = written(problem, tmp_path / "c")
    for content in damaged((tmp_path / "c").read_bytes()):
        (tmp_path / "d").write_bytes(content)
        try:
            read = read_checkpoint(str(tmp_path / "d"), problem, FINGERPRINT)
        except InputError as error:
            assert "-restart" in str(error)
        else:  # a change of no meaning, such as in the spaces of the header
            assert read.x.equal(saved.x) and read.lam.equal(saved.lam) and read.memory == saved.memory


def test_no_file_at_all_is_an_input_error(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(InputError, match="-restart"):
            read_checkpoint(str(path), examples.dense(), FINGERPRINT)


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    replace_file(str(tmp_path / "c"), b"old")

    def fail(*arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError):
        replace_file(str(tmp_path / "c"), b"new")
    assert (tmp_path / "c").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


WRITER = """
import sys
from pdeopt.core.storage import replace_file
n = 0
while True:
    replace_file(sys.argv[1], bytes([n % 256]) * 300_000)
    n += 1
"""


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_a_kill_at_any_instant_leaves_one_complete_file(tmp_path, seed):
    path = tmp_path / "c"
    child = subprocess.Popen([sys.executable, "-c", WRITER, path], cwd=ROOT, env=os.environ | ENVIRONMENT)
    try:
        while not path.exists():
            assert child.poll() is None
            time.sleep(0.01)
        time.sleep(0.2 * random.Random(seed).random())
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    content = path.read_bytes()
    assert len(content) == 300_000 and len(set(content)) == 1


# -- the same iterates, to the last bit --------------------------------------------------------------------


@pytest.mark.parametrize("precond", ["auto", "direct", "wathen"])
@pytest.mark.parametrize("kind", ["composite", "newton", "active_set"])
def test_a_restart_has_the_iterates_of_the_whole_run_to_the_last_bit(tmp_path, options, kind, precond):
    options(sqp_kkt_precond=precond)
    bounds = dict(lower=-0.2, upper=0.2) if kind == "active_set" else {}
    words, saved, points = dict(type=kind, max_it=6, **bounds), [], []

    def save(method, run):
        if run[-1].iteration == 2:
            checkpoint = Checkpoint(method.x, method.lam, method.memory(), run)
            write_checkpoint(str(tmp_path / "c"), problem, FINGERPRINT, checkpoint)
            saved.append(len(run))
        points.append((method.x.copy(), method.lam.copy()))

    problem = burgers_problem()
    whole = SQPSolver(problem, **words).solve(observers=[save])
    assert saved, "the run was too short"
    expected, problem = points[2:], burgers_problem()
    points.clear()
    read = read_checkpoint(str(tmp_path / "c"), problem, FINGERPRINT)
    rest = SQPSolver(problem, **words).solve(
        read.x,
        read.lam,
        observers=[lambda method, run: points.append((method.x.copy(), method.lam.copy()))],
        memory=read.memory,
        history=read.history,
    )
    assert len(points) == len(expected)
    assert all(x.equal(y) and lam.equal(mu) for (x, lam), (y, mu) in zip(points, expected))
    assert rest.history.as_rows() == whole.history.as_rows()


def burgers_problem():
    return BurgersCase(BurgersSettings(nx=8, nt=6)).problem


# -- the checkpoints of a run --------------------------------------------------------------------------------


def test_a_disk_that_is_full_ends_the_checkpoints_and_not_the_run(capfd):
    file, calls = CheckpointFile("c", 1, MPI.COMM_SELF), []

    def write():
        calls.append(len(calls))
        if len(calls) > 1:
            raise OSError(28, "No space left on device")

    for iteration in range(4):
        file.after(iteration, write)
    line = capfd.readouterr().err
    assert len(calls) == 2 and line.count("\n") == 1
    assert "No space left" in line and "checkpoint of iteration 0" in line


def test_a_signal_writes_a_checkpoint_that_was_not_due():
    file, calls = CheckpointFile("c", 100, MPI.COMM_SELF), []
    with interruptible():
        file.after(1, lambda: calls.append(1))
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted, match="SIGINT: ended after iteration 2; c holds the checkpoint of iteration 2"):
            file.after(2, lambda: calls.append(2))
    assert calls == [2]
    with pytest.raises(Interrupted):
        file.leave()


@pytest.mark.parametrize("change", ["missing", "unknown", "shape", "type", "another method"])
def test_a_memory_that_is_not_the_methods_is_refused(change):
    f, start = Rosenbrock(4), torch.zeros(4, dtype=torch.float64)
    solver = LBFGS(f, max_it=3)
    history = solver.minimize(start).history
    memory = solver.memory()
    if change == "missing":
        del memory["inverse.S"]
    elif change == "unknown":
        memory["more"] = 1.0
    elif change == "shape":
        memory["x"] = memory["x"][1:]
    elif change == "type":
        memory["g"] = memory["g"].float()
    other = (SSBroyden if change == "another method" else LBFGS)(Rosenbrock(4), max_it=9)
    with pytest.raises(InputError, match="memory of"):
        other.minimize(start, memory=memory, history=history)


# -- runs of the script --------------------------------------------------------------------------------------

SIZE = ("-nx", 10, "-nt", 10)


def history(folder, *words, ranks=1):
    """Solve by the script; its history and solution."""
    summary, solution = folder / "summary.json", folder / "solution.npz"
    done = python("-m", "problems.burgers", *SIZE, *words, "-summary", summary, "-output", solution, ranks=ranks)
    assert done.returncode == 0, done.stderr
    return json.loads(summary.read_text()), np.load(solution)


def assert_same_run(found, expected, rtol):
    (summary, arrays), (whole, solution) = found, expected
    assert summary["iterations"] == whole["iterations"] and summary["reason"] == whole["reason"]
    for name in ("objective", "feasibility", "optimality"):
        expected = whole["history"][name]
        assert summary["history"][name] == (pytest.approx(expected, rel=rtol, abs=1e-12) if rtol else expected)
    for name in ("state", "control", "multiplier"):
        assert relative(arrays[name], solution[name]) <= rtol


@pytest.mark.parametrize("solver", ["sqp", pytest.param("newton", marks=pytest.mark.slow)])
def test_a_restarted_run_has_the_iterates_of_the_uninterrupted_one(tmp_path, solver):
    whole = history(tmp_path, "-solver", solver)
    file = tmp_path / "checkpoint"
    python("-m", "problems.burgers", *SIZE, "-solver", solver, "-sqp_max_it", 3, "-checkpoint", file)
    assert_same_run(history(tmp_path, "-solver", solver, "-restart", file), whole, 0.0)


@pytest.mark.mpi
def test_a_run_may_be_restarted_on_another_number_of_ranks(tmp_path):
    whole, file = history(tmp_path, "-control", "nodal"), tmp_path / "checkpoint"
    python("-m", "problems.burgers", *SIZE, "-control", "nodal", "-sqp_max_it", 2, "-checkpoint", file, ranks=2)
    assert_same_run(history(tmp_path, "-control", "nodal", "-restart", file, ranks=3), whole, 1e-7)


@pytest.mark.slow
def test_a_restarted_tao_run_finds_the_same_optimum(tmp_path):
    words = ("-solver", "tao", "-sqp_opt_tol", 1e-9)
    whole, file = history(tmp_path, *words), tmp_path / "checkpoint"
    python("-m", "problems.burgers", *SIZE, *words, "-tao_max_it", 5, "-checkpoint", file)
    summary, arrays = history(tmp_path, *words, "-restart", file)
    assert summary["objective"] == pytest.approx(whole[0]["objective"], rel=1e-12)
    assert relative(arrays["control"], whole[1]["control"]) <= 1e-5
    assert summary["history"]["iteration"] == list(range(summary["iterations"] + 1))


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["sqp", "newton"])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, solver):
    size = ("-nx", 64, "-nt", 64, "-alpha", 1e-3, "-solver", solver)
    file, draw = tmp_path / "checkpoint", random.Random(0)
    expected = python("-m", "problems.burgers", *size, "-output", tmp_path / "whole.npz")
    assert expected.returncode == 0
    words = [sys.executable, "-m", "problems.burgers", *map(str, size), "-checkpoint", str(file)]
    for _ in range(4):
        restart = ["-restart", str(file)] if file.exists() else []
        child = subprocess.Popen([*words, *restart], cwd=ROOT, env=os.environ | ENVIRONMENT)
        begin = file.stat().st_mtime_ns if file.exists() else 0
        while child.poll() is None and (not file.exists() or file.stat().st_mtime_ns == begin):
            time.sleep(0.005)
        time.sleep(0.3 * draw.random())
        child.send_signal(signal.SIGKILL)
        child.wait()
    done = python("-m", "problems.burgers", *size, "-restart", file, "-output", tmp_path / "rest.npz")
    assert done.returncode == 0, done.stderr
    whole, rest = np.load(tmp_path / "whole.npz"), np.load(tmp_path / "rest.npz")
    for name in ("state", "control", "multiplier"):
        assert relative(rest[name], whole[name]) <= 1e-9
