"""The training scripts, end to end on small networks."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from mpi4py import MPI

import nn_adapters as nna
from nn_adapters.data.generated import peaks
from nn_adapters.layers.blocks import dense
from nn_adapters.layers.layerparallel import LayerParallel
from nn_adapters.parallel.groups import Groups
from nn_adapters.training.loop import Training, TrainingSettings
from nn_adapters.training.nested import nested_epochs
from pdeopt.core.errors import InputError, SolveFailure
from problems import har_gru, indian_pines, mnist, video_gru
from problems import peaks as script
from tests.helpers.support import ROOT, command, environment, python

SMALL = [
    "-batch",
    "500",
    "-lr",
    "1e-2",
    "-layers",
    "32",
    "-epochs",
    "3",
    "-samples",
    "600",
    "-layer_mgrit_coarsening",
    "4",
]


def test_the_summary_holds_what_the_run_found(tmp_path):
    words = ["-summary", str(tmp_path / "run.json"), "-plot", str(tmp_path / "run.png"), "-layer_mgrit_rtol", "1e-9"]
    words += ["-layer_mgrit_adjoint_cycles", "1", "-layer_mgrit_serial", "never", "-bias_limit", "0"]
    accuracy = script.main([*SMALL, *words])
    summary = json.loads((tmp_path / "run.json").read_text())
    assert summary["test_accuracy"] == accuracy and 0.2 < accuracy <= 1
    assert summary["epochs"] == 3 and len(summary["history"]) == 3 and summary["train_loss"] < 1.7
    assert 0 < summary["gradient_error"] < 1 and summary["residuals"]["forward"][0] > 0
    assert summary["parameters"]["layers"] == 32
    assert (tmp_path / "run.png").stat().st_size > 1000


def test_one_level_is_training_as_pytorch_does_it(tmp_path):
    """A loop in plain PyTorch over the serial network, with the same batches, ends with the same accuracy."""
    accuracy = script.main(
        [*SMALL, "-layer_mgrit_levels", "1", "-schedule", "constant", "-summary", str(tmp_path / "s.json")]
    )
    data = peaks(0)
    torch.manual_seed(0)
    network = script.Classifier(script.PeaksSettings(layers=32), None, nna.MgritSettings(levels=1), data)
    layers = network.layers.serial()

    def forward(x):
        return network.closing(layers(network.opening(x)))

    parts = [network.opening, layers, network.closing]
    optimizer = torch.optim.Adam([p for part in parts for p in part.parameters()], lr=1e-2)
    for epoch in (1, 2, 3):
        generator, losses = torch.Generator().manual_seed(epoch), []
        for rows in torch.randperm(600, generator=generator).split(500):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(forward(data.x_train[rows]), data.y_train[rows])
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    found = float((forward(data.x_test).argmax(1) == data.y_test).double().mean())
    assert accuracy == pytest.approx(found, abs=0.011)
    last = json.loads((tmp_path / "s.json").read_text())["train_loss"]
    assert last == pytest.approx(np.mean(losses), rel=1e-3)


def test_a_restart_gives_the_same_curve(tmp_path):
    file, whole, rest = (str(tmp_path / name) for name in ("run.safetensors", "whole.json", "rest.json"))
    words = [*SMALL, "-schedule", "constant"]
    script.main([*words, "-epochs", "4", "-summary", whole])
    script.main([*words, "-epochs", "2", "-checkpoint", file])
    script.main([*words, "-epochs", "4", "-restart", file, "-summary", rest])
    curves = [[e["loss"] for e in json.loads(Path(name).read_text())["history"]] for name in (whole, rest)]
    assert curves[0] == curves[1]


@pytest.mark.mpi
def test_two_ranks_train_as_one_and_go_on_where_one_stopped(tmp_path):
    file = str(tmp_path / "run.safetensors")
    words = [*SMALL, "-schedule", "constant", "-samples", "500"]
    for name, more, ranks in (
        ("one", ["-epochs", "3"], 1),
        ("first", ["-epochs", "1", "-checkpoint", file], 1),
        ("two", ["-epochs", "3", "-restart", file], 2),
        ("data", ["-epochs", "3", "-layer_ranks", "1"], 2),
    ):
        done = python("-m", "problems.peaks", *words, *more, "-summary", tmp_path / f"{name}.json", ranks=ranks)
        assert done.returncode == 0, done.stderr
    curves = {
        name: [e["loss"] for e in json.loads((tmp_path / f"{name}.json").read_text())["history"]]
        for name in ("one", "two", "data")
    }
    assert curves["two"] == pytest.approx(curves["one"], rel=1e-4)  # single precision
    assert curves["data"] == pytest.approx(curves["one"], rel=1e-4)


@pytest.mark.mpi
def test_a_killed_rank_ends_the_others_and_leaves_a_checkpoint(tmp_path):
    file = tmp_path / "run.safetensors"
    words = command("-m", "problems.peaks", "-layers", 64, "-epochs", 1000, "-checkpoint", file, ranks=2)
    process = subprocess.Popen(
        words, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    deadline = time.monotonic() + 300
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    children = subprocess.run(["pgrep", "-f", str(file)], capture_output=True, text=True).stdout.split()
    ranks = [pid for pid in map(int, children) if pid != process.pid]
    os.kill(ranks[-1], signal.SIGKILL)
    assert process.wait(timeout=600) != 0
    done = python("-m", "problems.peaks", "-layers", 64, "-epochs", 2, "-restart", file)
    assert done.returncode == 0, done.stderr


def training(epochs=1, **words):
    network = torch.nn.Sequential(
        torch.nn.Linear(2, 4), LayerParallel(None, lambda: dense(4), 16, coarsening="4"), torch.nn.Linear(4, 5)
    )
    return Training(network, peaks(0), TrainingSettings(epochs=epochs, **words), Groups(MPI.COMM_SELF))


def test_a_loss_that_is_not_finite_is_named_and_the_checkpoint_stays(tmp_path):
    file = tmp_path / "run.safetensors"
    run = training(3, checkpoint=str(file), samples=300)

    def spoil(epoch):
        if epoch.epoch == 2:
            with torch.no_grad():
                run.network[0].weight.fill_(torch.nan)

    run.observe = spoil
    with pytest.raises(SolveFailure, match="epoch 3, batch 1"):
        run.run()
    resumed = training(3, restart=str(file), samples=300)
    assert len(resumed.history) == 2 and resumed.run().loss > 0


def test_cycles_follow_the_error_of_gradients_and_the_summary_says_so(tmp_path):
    file = tmp_path / "run.json"
    script.main([*SMALL, "-layers", "64", "-initial", "1", "-epochs", "1", "-summary", str(file)])
    summary = json.loads(file.read_text())
    assert summary["bias"][0]["batch"] == 1 and summary["accumulated_bias"] >= 0
    assert summary["serial"] or summary["bias"][-1]["error"] <= summary["bias"][-1]["allowed"]


def test_no_epochs_and_no_samples_left_over():
    last = training(0).run()
    assert last.epoch == 0 and 0 <= last.accuracy <= 1
    assert training(1, batch=7, samples=20).run().epoch == 1


def test_nested_iteration_ends_at_full_depth_with_the_work_of_one_run(tmp_path):
    assert nested_epochs(60, 3) == [80, 40, 20]
    file = tmp_path / "run.json"
    script.main([*SMALL, "-epochs", "6", "-nested", "2", "-summary", str(file)])
    summary = json.loads(file.read_text())
    assert summary["epochs"] == 3 and summary["parameters"]["layers"] == 32


@pytest.mark.parametrize(
    "words, message",
    [
        (["-nested", "7"], "as often as the layers can be halved"),
        (["-restart", "nothing"], "a file written by -checkpoint"),
        (["-layer_ranks", "3"], "divides the 1 ranks"),
        (["-epochz", "3"], "did you mean -epochs"),
        (["-layer_mgrit_relaxation", "G"], "FCF"),
        (["-plot", "x.txt"], ".png"),
    ],
)
def test_bad_options_are_named(words, message):
    with pytest.raises(InputError, match=message):
        script.main([*SMALL, *words])


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    file = str(tmp_path / "run.safetensors")
    script.main([*SMALL, "-epochs", "1", "-checkpoint", file])
    with pytest.raises(InputError, match="width of the checkpoint"):
        script.main([*SMALL, "-width", "9", "-restart", file])


@pytest.mark.parametrize(
    "main, words",
    [
        (mnist.main, ["-layers", "8", "-epochs", "3", "-channels", "4"]),
        (indian_pines.main, ["-layers", "8", "-epochs", "2"]),
        (har_gru.main, ["-hidden", "16", "-gru_layers", "1", "-epochs", "1", "-samples", "200"]),
        (video_gru.main, ["-epochs", "1", "-videos", "60"]),
    ],
)
def test_the_other_scripts_run(main, words):
    if main is mnist.main:
        pytest.importorskip("sklearn")
    assert main(words) > (0.5 if main in (mnist.main, indian_pines.main) else 0.0)
