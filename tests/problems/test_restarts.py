"""Scripts that are interrupted go on as if nothing had happened, and finished runs say so."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib import import_module

import pytest

from pdeopt.core.errors import InputError
from pdeopt.core.interrupt import Interrupted
from pdeopt.optimize import CheckpointFile
from problems import heat
from tests.helpers.support import ENVIRONMENT, ROOT

#: Script, options, and the option that says how far a run goes, with how far it goes whole.
RUNS = {
    "logistic": ("logistic", "-data generated -samples 60 -features 6 -rtol 1e-14 -optimizer mlvr -opt_max_it 6"),
    "multilevel": ("resnet_multilevel", "-data digits -samples 40 -pool 2 -layers 4 -width 4 -opt_max_it 4"),
    "apts": ("apts_mnist", "-data digits -samples 100 -opt_max_work 12"),
    "adam": ("apts_mnist", "-data digits -samples 100 -optimizer adam -batch 20 -opt_max_work 2"),
    "windows": ("burgers", "-nx 8 -nt 8 -solver admm -admm_windows 3 -admm_max_it 5"),
    "lsgd": ("function_regression", "-steps 8"),
    "regression by adam": ("function_regression", "-method adam -steps 8"),
    "regression by lm": ("function_regression", "-method lm -width 6 -steps 8 -lm_resample_every 2 -lm_rows 100"),
    "box": ("box_init", "-depth 4 -seeds 2 -points 3"),
    "admm": ("admm_mnist", "-data digits -samples 100 -widths 8 -split_batch 25 -epochs 2"),
    "admm, seed": ("admm_mnist", "-data digits -samples 100 -widths 8 -form seed -activation hard_sigmoid -epochs 5"),
    "kfac": ("kfac_mnist", "-data digits -samples 100 -widths 8 -batch 20 -max_steps 12"),
    "kfac by adam": ("kfac_mnist", "-data digits -samples 100 -widths 8 -optimizer adam -max_steps 4"),
    "large batches": (
        "large_batch",
        "-data digits -samples 60 -widths 6 -batch 20 -epochs 3 -optimizer lamb -mixup 0.3 -erase 0.5 -sharpness true",
    ),
    "hessian-free": ("autoencoder", "-data digits -samples 60 -widths 6 -optimizer hessian_free -max_steps 4"),
    "support vectors": ("kernel_svm", "-samples 80 -method admm -checkpoint_every 1 -admm_max_it 8"),
    "nested": ("peaks", "-layers 8 -samples 60 -batch 20 -epochs 2 -nested 2"),
}
#: What of a summary is of the machine or of the command line.
OWN = ("seconds", "wall_time_s", "costs", "parameters", "versions", "memory", "peak_memory_mb")


def run(folder, script, *words):
    """The summary of a run that may end with any exit code."""
    summary = folder / "s.json"
    summary.unlink(missing_ok=True)
    words = [*map(str, words), "-error_if_not_converged", "false", "-summary", str(summary)]
    try:
        import_module(f"problems.{script}").main(words)
    finally:
        found = json.loads(summary.read_text()) if summary.exists() else {}
    found = {key: value for key, value in found.items() if key not in OWN}
    for name in ("history", "curve"):  # lists of epochs
        if isinstance(found.get(name), list):
            found[name] = [{key: value for key, value in each.items() if "seconds" not in key} for each in found[name]]
    for name in ("cpu_seconds", "rival_cpu_seconds"):
        found.pop(name, None)
    return found


@pytest.mark.parametrize("name", RUNS)
def test_an_interrupted_run_goes_on_to_the_last_bit(tmp_path, monkeypatch, capfd, name):
    script, words = RUNS[name]
    words = words.split()
    whole, after, calls = run(tmp_path, script, *words), CheckpointFile.after, []

    def interrupt(self, *arguments, **more):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        after(self, *arguments, **more)

    monkeypatch.setattr(CheckpointFile, "after", interrupt)
    with pytest.raises(Interrupted) as found:
        run(tmp_path, script, *words, "-checkpoint", tmp_path / "c")
    assert found.value.exit_code == 143 and (tmp_path / "s.json").exists()
    monkeypatch.setattr(CheckpointFile, "after", after)
    assert run(tmp_path, script, *words, "-restart", tmp_path / "c", "-checkpoint", tmp_path / "c") == whole
    capfd.readouterr()
    assert run(tmp_path, script, *words, "-restart", tmp_path / "c") == whole
    assert "nothing was left to do" in capfd.readouterr().out
    with pytest.raises(InputError, match="problem of the checkpoint"):
        heat.main(["-nx", "4", "-ny", "2", "-nt", "2", "-restart", str(tmp_path / "c")])


def test_a_finished_run_reads_all_options_and_names_the_misspelt(tmp_path):
    words = ["-nx", 6, "-ny", 3, "-nt", 6, "-solver", "newton", "-sqp_kkt_precond", "wathen"]
    run(tmp_path, "heat", *words, "-checkpoint", tmp_path / "c")
    assert run(tmp_path, "heat", *words, "-restart", tmp_path / "c")["reason"] > 0
    with pytest.raises(InputError, match="wathenn"):
        run(tmp_path, "heat", *words, "-restart", tmp_path / "c", "-wathenn_schur", "x")


@pytest.mark.parametrize(
    "number, code", [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)]
)
def test_a_signal_ends_a_program_after_its_iteration(tmp_path, number, code):
    words = ["-nx", 32, "-nt", 64, "-sqp_opt_tol", 1e-300, "-sqp_max_it", 10**6, "-alpha", 1e-3, "-solver", "newton"]
    files = ["-checkpoint", tmp_path / "c", "-summary", tmp_path / "s.json"]
    command = [sys.executable, "-m", "problems.burgers", *map(str, words + files)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    child = subprocess.Popen(command, cwd=ROOT, env=os.environ | ENVIRONMENT, start_new_session=True, **pipes)
    deadline = time.monotonic() + 60
    while not (tmp_path / "c").exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(number)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == code, errors
    assert errors.startswith(f"interrupted: {number.name}: ended after iteration") and errors.count("\n") == 1
    assert json.loads((tmp_path / "s.json").read_text())["reason"] < 0
