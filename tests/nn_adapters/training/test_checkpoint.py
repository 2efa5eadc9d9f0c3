"""Checkpoints of training: to the last bit what goes on, and nothing of another network, optimizer or run."""

import os
import signal

import pytest
import torch
from safetensors.torch import load, save

from nn_adapters.data.generated import peaks
from nn_adapters.layers.blocks import dense
from nn_adapters.layers.layerparallel import LayerParallel
from nn_adapters.training.checkpoint import FITTED
from nn_adapters.training.loop import Training, TrainingSettings
from pdeopt.core import storage
from pdeopt.core.errors import InputError
from pdeopt.core.interrupt import interruptible

DATA = peaks(0)
LEARNING = {"long_steps": "fitted", "serial": "never", "fused": "never"}
WORDS = dict(epochs=3, samples=120, batch=20, bias_every=2, bias_limit=1.0)


def normalized(width):
    return torch.nn.Sequential(
        torch.nn.Linear(width, width), torch.nn.BatchNorm1d(width), torch.nn.Tanh(), torch.nn.Dropout(0.1)
    )


def training(width=4, depth=8, dropout=0.3, block=dense, mgrit=None, **words):
    torch.manual_seed(1)
    network = torch.nn.Sequential(
        torch.nn.Linear(2, width),
        torch.nn.BatchNorm1d(width),
        LayerParallel(None, lambda: block(width), depth, **{"coarsening": "4", **(mgrit or {})}),
        torch.nn.Dropout(dropout),
        torch.nn.Linear(width, 5),
    )
    return Training(network, DATA, TrainingSettings(**{**WORDS, **words}), problem={"depth": depth})


def curve(run):
    return [(e.loss, e.accuracy, e.gradient_error, e.damping) for e in run.history], run.control.state(), run.residuals


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "kfac", "adam, fitted"])
def test_a_run_that_a_signal_ended_inside_an_epoch_goes_on_to_the_last_bit(tmp_path, monkeypatch, optimizer):
    words = dict(optimizer=optimizer.split(",")[0], dropout=0.0 if optimizer == "kfac" else 0.3)
    words |= {"block": normalized} if optimizer == "adamw" else {}
    if "fitted" in optimizer:  # long steps, which learn from each batch; fewer layers would go one after the other
        words |= {"mgrit": LEARNING, "depth": 16}
    whole = training(**words)
    whole.run()
    run, step = training(**words, checkpoint=str(tmp_path / "c")), Training._batch

    def batch(self, rows, epoch, number):
        if (epoch, number) == (2, 3):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, rows, epoch, number)

    monkeypatch.setattr(Training, "_batch", batch)
    with interruptible():
        run.run()
    assert run.files.signal == signal.SIGTERM and len(run.history) == 1
    monkeypatch.setattr(Training, "_batch", step)
    rest = training(**words, restart=str(tmp_path / "c"))
    rest.run()
    assert curve(rest) == curve(whole)
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, rest.network.state_dict()[name]), name
    fits = [run.network[2].solvers[0].fit for run in (whole, rest)]
    assert "fitted" not in optimizer or all(torch.equal(*(getattr(fit, name) for fit in fits)) for name in FITTED)


def test_other_intervals_begin_to_learn_anew(tmp_path):
    """As many of them, but of other layers."""
    run = training(epochs=1, depth=16, mgrit=LEARNING, checkpoint=str(tmp_path / "c"))
    run.run()
    again, other = (
        training(depth=16, mgrit={**LEARNING, "coarsening": factor}, restart=str(tmp_path / "c"))
        .network[2]
        .solvers[0]
        .fit
        for factor in ("4", "5")
    )
    assert torch.equal(again.squares, run.network[2].solvers[0].fit.squares) and other.squares is None


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("training") / "c"
    training(epochs=1, checkpoint=str(path)).run()
    return path


@pytest.mark.parametrize(
    "words, name",
    [
        (dict(depth=4), "depth"),
        (dict(width=5), "network"),
        (dict(dropout=0.2), "network"),
        (dict(seed=3), "seed"),
        (dict(optimizer="sgd"), "optimizer"),
        (dict(batch=30), "batch"),
        (dict(samples=100), "samples"),
        (dict(bias_limit=1e-3), "bias_limit"),
    ],
)
def test_another_network_optimizer_or_run_is_refused(file, words, name):
    with pytest.raises(InputError, match=f"{name} of the checkpoint"):
        training(restart=str(file), **words)


def test_other_data_are_refused(file, monkeypatch):
    monkeypatch.setitem(globals(), "DATA", peaks(1))
    with pytest.raises(InputError, match="data of the checkpoint"):
        training(restart=str(file))


def forged(content, change):
    """The file with other tensors and right checksums."""
    length = int.from_bytes(content[:8], "little")
    words = storage._parsed(content[8 : 8 + length])["__metadata__"]["header"]
    tensors = load(content)
    change(tensors)
    table = {name: (storage.NAMES[t.dtype], list(t.shape)) for name, t in tensors.items()}
    sums = {"header": words, "sha256": storage._of_header(words, table), "sha256.data": storage._of_numbers(tensors)}
    return save(tensors, metadata=sums)


CHANGES = {
    "missing": lambda t: t.pop("parameter.0.weight"),
    "state is missing": lambda t: t.pop("state.exp_avg.0.weight"),
    "buffer is missing": lambda t: t.pop("buffer.1.running_var"),
    "unknown": lambda t: t.update({"parameter.9.weight": torch.ones(2)}),
    "shape": lambda t: t.update({"parameter.0.weight": t["parameter.0.weight"].T.contiguous()}),
    "type": lambda t: t.update({"parameter.0.weight": t["parameter.0.weight"].double()}),
    "not finite": lambda t: t["parameter.0.weight"].fill_(torch.nan),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_tensor_is_accounted_for(file, tmp_path, name):
    (tmp_path / "c").write_bytes(forged(file.read_bytes(), CHANGES[name]))
    with pytest.raises(InputError, match="-restart"):
        training(restart=str(tmp_path / "c"))


def test_a_finished_run_has_nothing_left_to_do_and_a_longer_one_goes_on(file):
    done, longer = training(epochs=1, restart=str(file)), training(epochs=2, restart=str(file))
    last = done.run()
    assert last == done.history[0] and len(done.history) == 1 and longer.run().epoch == 2
