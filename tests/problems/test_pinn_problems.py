"""The scripts that train PINNs, end to end on small networks."""

import importlib
import json
from dataclasses import replace

import pytest
import torch
from mpi4py import MPI

from pdeopt.core.errors import InputError
from pdeopt.core.monitor import Reason
from problems import pinn_burgers, pinn_inverse_burgers
from problems.benchmarks import gpu
from problems.benchmarks.pinns import crossing
from problems.shared.equations import EQUATIONS
from problems.shared.files import CheckpointFiles
from problems.shared.pinn_settings import OPTIMIZERS, PinnSettings, chosen
from problems.shared.pinn_training import PinnTraining
from tests.helpers.pretended import DEVICE, PretendedDevice
from tests.helpers.support import relative

SMALL = ["-points", "200", "-layers", "2", "-width", "6", "-error_every", "10"]


def summary_of(tmp_path, *words, main=pinn_burgers.main):
    file = tmp_path / "run.json"
    error = main([*SMALL, *map(str, words), "-summary", str(file)])
    summary = json.loads(file.read_text())
    assert summary["relative_l2"] == error
    return summary


@pytest.mark.parametrize("name", EQUATIONS)
def test_every_equation_is_trained(name, tmp_path):
    main = importlib.import_module(f"problems.pinn_{name}").main
    words = ["-max_gradients", 30, "-optimizer", "ssbroyden", "-point_levels", 1]
    found = summary_of(tmp_path, *words, main=main)
    assert found["problem"] == name and found["loss"] < 0.999 * found["start_loss"]
    assert 30 <= found["gradients"] <= 50 and found["work"] >= 30 and found["reason"] == Reason.WORK_DONE
    measured = [e for e in found["history"]["relative_l2"] if e is not None]
    assert 3 <= len(measured) <= 4 and found["history"]["work"][-1] == found["work"]


@pytest.mark.parametrize("optimizer", ["lm", "spqn", "lbfgs"])
def test_ranks_share_what_an_optimizer_can_share(optimizer):
    settings = PinnSettings(points=60, layers=2, width=4, optimizer=optimizer)
    minimizer = PinnTraining(EQUATIONS["burgers"], settings, CheckpointFiles()).minimizer
    assert getattr(minimizer, "team", None) is (None if optimizer == "lbfgs" else MPI.COMM_WORLD)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_trains(optimizer, tmp_path):
    found = summary_of(tmp_path, "-max_gradients", 40, "-optimizer", optimizer)
    counted = "jacobians" if optimizer == "lm" else "gradients"
    assert found["loss"] < found["start_loss"] and found["history"][counted][-1] >= 40
    assert found["parameters"]["optimizer"] == optimizer


@pytest.mark.parametrize("name", EQUATIONS)
def test_least_squares_is_the_default(name, tmp_path):
    main = importlib.import_module(f"problems.pinn_{name}").main
    found = summary_of(tmp_path, "-opt_max_it", 12, "-lm_candidates", 500, main=main)
    assert found["parameters"]["optimizer"] == "lm" and found["loss"] < found["start_loss"]
    curve = found["curve"]
    assert set(curve) == {"cpu_seconds", "work", "loss", "relative_l2"}
    assert len({len(column) for column in curve.values()}) == 1 and curve["cpu_seconds"] == sorted(curve["cpu_seconds"])
    large = chosen(EQUATIONS[name], PinnSettings(layers=4, width=50))
    features = next(iter(EQUATIONS[name].forms))
    assert (large.optimizer, large.body, large.adaptive, large.features) == ("ssbroyden", "resnet", True, features)


def test_the_viscosity_is_found_from_noisy_measurements(tmp_path):
    words = ["-opt_max_it", 30, "-layers", 2, "-width", 8, "-measured", 300, "-lm_candidates", 500]
    found = summary_of(tmp_path, *words, main=pinn_inverse_burgers.main)
    assert set(found["coefficients"]) == {"log_nu"} and found["parameters"]["measured"] == 300
    first, true = EQUATIONS["inverse_burgers"].coefficients["log_nu"]
    error = found["coefficient_errors"]["log_nu"]
    assert error == pytest.approx(abs(found["coefficients"]["log_nu"] - true)) and error < 0.6 * (first - true)


def test_broyden_begins_on_fewer_points(tmp_path):
    words = ["-optimizer", "ssbroyden", "-opt_max_it", 3]
    found, plain = summary_of(tmp_path, *words), summary_of(tmp_path, *words, "-point_levels", 1)
    assert found["work"] < 0.5 * plain["work"]


@pytest.mark.parametrize("name", EQUATIONS)
def test_every_equation_has_the_same_numbers_on_a_device(name):
    settings = PinnSettings(points=70, layers=2, width=4)
    with PretendedDevice() as device:
        runs = [PinnTraining(EQUATIONS[name], replace(settings, device=d), CheckpointFiles()) for d in ("cpu", DEVICE)]
        host, there = (run.function for run in runs)
        theta = host.initial(0)
        device.spent()
        value, gradient = there.value_and_gradient(theta)
        assert device.spent() == ["there", "home"]
        expected = host.value_and_gradient(theta)
        assert value == pytest.approx(expected[0], rel=1e-12) and relative(gradient, expected[1]) < 1e-11
        assert runs[1].error(theta) == pytest.approx(runs[0].error(theta), rel=1e-11)


def test_a_run_on_a_device_goes_on_on_the_host(tmp_path):
    file = tmp_path / "run.safetensors"
    words = ["-lm_resample_every", 2, "-lm_candidates", 300, "-opt_max_it"]
    whole = summary_of(tmp_path, *words, 6)
    with PretendedDevice():
        summary_of(tmp_path, *words, 3, "-device", DEVICE, "-checkpoint", file, "-plot", tmp_path / "run.png")
    rest = summary_of(tmp_path, *words, 6, "-restart", file)
    assert rest["history"]["objective"] == pytest.approx(whole["history"]["objective"], rel=1e-7)


def test_the_benchmark_of_devices_has_a_row():
    with PretendedDevice():
        shape, host, there, error, graph, jacobian, gram = gpu.pinn_row("2x6", 50, torch.device(DEVICE)).split()
    assert shape == "2x6" and graph == "-" and float(error) < 1e-12
    assert min(map(float, (host, there, jacobian))) > 0.0 and float(gram) >= 0.0


def test_a_spent_limit_of_time_is_no_failure(tmp_path):
    found = summary_of(tmp_path, "-max_cpu_seconds", 0.3)
    assert found["reason"] == Reason.WORK_DONE and "max_cpu_seconds" in found["message"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_restart_goes_on_with_the_same_iterates(optimizer, tmp_path):
    file = tmp_path / "run.safetensors"
    own = ["-lm_resample_every", 5, "-lm_candidates", 500] if optimizer == "lm" else ["-resample_every", 15]
    words = ["-optimizer", optimizer, *own, "-opt_max_it"]
    whole = summary_of(tmp_path, *words, 40)
    summary_of(tmp_path, *words, 22, "-checkpoint", file, "-checkpoint_every", 1)
    rest = summary_of(tmp_path, *words, 40, "-restart", file)
    assert rest["history"]["objective"] == whole["history"]["objective"]
    for key in ("loss", "relative_l2", "gradients", "values"):
        assert rest[key] == whole[key], key
    assert rest["work"] == pytest.approx(whole["work"], rel=1e-12)


def test_new_points_are_drawn_and_counted(tmp_path):
    words = ["-optimizer", "ssbroyden", "-opt_max_it", 30, "-point_levels", 1]
    plain, found = summary_of(tmp_path, *words), summary_of(tmp_path, *words, "-resample_every", 12)
    before = [w for w in plain["history"]["work"] if w < 12]
    assert found["history"]["objective"][: len(before)] == plain["history"]["objective"][: len(before)]
    assert found["history"]["objective"] != plain["history"]["objective"]
    assert found["work"] > found["gradients"] + 3  # ten candidates a point, forward alone


def test_a_run_stops_at_the_error_that_is_asked_for(tmp_path):
    found = summary_of(tmp_path, "-target_error", 0.5, "-error_every", 1, "-plot", tmp_path / "run.png")
    assert found["reason"] == Reason.CONVERGED_TARGET and found["relative_l2"] <= 0.5
    assert (tmp_path / "run.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "words, message",
    [
        (["-optimizer", "sgd"], "lbfgs"),
        (["-device", "cuda:99"], r"cuda:99.*legal: cpu"),
        (["-layerz", "3"], "did you mean -layers"),
        (["-points", "0"], ">= 1"),
        (["-optimizer", "spqn", "-spqn_parts", "3"], "1 to 2"),
        (["-restart", "nothing"], "a file written by -checkpoint"),
        (["-plot", "x.txt"], ".png"),
        (["-sampler", "grid"], "hammersley"),
        (["-resample_every", "10"], "-lm_resample_every"),
        (["-features", "odd"], r"plain \| periodic"),
    ],
)
def test_bad_options_are_named(words, message):
    with pytest.raises(InputError, match=message):
        pinn_burgers.main([*SMALL, *words])


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    file = str(tmp_path / "run.safetensors")
    pinn_burgers.main([*SMALL, "-opt_max_it", "1", "-checkpoint", file, "-checkpoint_every", "1"])
    with pytest.raises(InputError, match="width of the checkpoint"):
        pinn_burgers.main([*SMALL, "-width", "7", "-restart", file])


def test_one_curve_is_ahead_of_another_from_when_on_it_stays_so():
    fast = {"cpu_seconds": [1.0, 4.0], "relative_l2": [0.5, 0.1]}
    late = {"cpu_seconds": [1.0, 2.0, 3.0, 6.0], "relative_l2": [0.9, 0.2, 0.3, 0.01]}
    assert crossing(late, fast) == 6.0 and crossing(fast, late) is None
    assert crossing(fast, {"cpu_seconds": [5.0], "relative_l2": [0.2]}) == 1.0
