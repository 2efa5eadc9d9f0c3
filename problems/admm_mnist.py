"""Images, motions and Peaks by training without gradients: the layers of the network are split, ADMM solves for them.

    python -m problems.admm_mnist                                            # scikit-learn's digits
    python -m problems.admm_mnist -data_dir DATA -plot admm.png              # MNIST, 784-500-500-10
    mpiexec -n 2 python -m problems.admm_mnist -data_dir DATA -max_cpu_seconds 60
    python -m problems.admm_mnist -data_dir DATA -form seed -activation hard_sigmoid -states random -epochs 20
    python -m problems.admm_mnist -data peaks                                # an ODE network of 16 layers

`-form seed` is the algorithm as it was published (G. Taylor and others, ICML 2016), its misprints corrected; `-states`
says where its states start, which the paper does not. All other settings of the method are `-split_*` and `-admm_*`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from mpi4py import MPI
from petsc4py import PETSc
from torch import nn

import nn_adapters as nna
import pdeopt as po
from nn_adapters.splitting import LayerSplitting, SplitTrainingSettings, StreamedLayers, WholeLayers
from pdeopt.core import InputError, interruptible, require_memory, sections
from pdeopt.core.memory import forget_peak, used_memory
from pdeopt.optimize.splitting import ADMM, AdmmSettings
from problems.har_gru import standardized
from problems.shared.checkpoints import SplitCheckpoints
from problems.shared.command_line import command_line, finish, start
from problems.shared.files import CheckpointFiles, DataFiles, ReportFiles, check_targets, choose, write_report
from problems.shared.split_training import CurvePoint, Samples, SplitTraining, deal, picture, say_point, summary

#: Iterations from checkpoint to checkpoint.
EVERY = 20

#: Activations by name, as modules that can be split.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "hard_sigmoid": lambda: nn.Hardtanh(0.0, 1.0),
    "leaky_relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "identity": nn.Identity,
}

#: What is right for each data set: widths of the hidden layers, layers of the ODE network, and epochs.
PRESETS: dict[str, tuple[str, int, int]] = {
    "mnist": ("500,500", 0, 3),
    "fashion_mnist": ("500,500", 0, 3),
    "har": ("200,200", 0, 10),
    "digits": ("100,100", 0, 40),
    "peaks": ("32", 16, 40),
}

#: When ADMM stops and when its multipliers move, by default: epochs and seconds end a run.
ADMM_DEFAULTS: dict[str, Any] = {"warm_up": 10, "max_it": 2**31 - 1}


@dataclass(frozen=True)
class SplitScriptSettings(po.Settings):
    """Data, network, and how it is trained."""

    data: str = po.setting(
        "auto", "samples; auto: mnist with -data_dir or -fetch, else scikit-learn's digits", choices=("auto", *PRESETS)
    )
    samples: int = po.setting(0, "training samples that are used; 0 for all", at_least=0)
    shares: str = po.setting("", "samples of each rank relative to the others', as 2,1; by default equal")
    widths: str = po.setting("", "neurons of the hidden layers, as 500,500; by default those of the data")
    layers: int = po.setting(
        None, "layers of an ODE network after them; by default those of the data, 16 for peaks", at_least=0, kind=int
    )
    Tf: float = po.setting(5.0, "time of the ODE network", above=0)
    activation: str = po.setting("relu", "activation", choices=tuple(ACTIVATIONS))
    loss: str = po.setting(
        "hinge", "loss of the outputs; -split_loss wins", choices=("hinge", "squared", "cross_entropy")
    )
    form: str = po.setting(
        "streaming",
        "batches; all samples in the published order; or all samples from the last layer backward; -split_form wins",
        choices=("streaming", "seed", "backward"),
    )
    states: str = po.setting(
        "forward", "first states of the forms with all samples; -split_states wins", choices=("forward", "random")
    )
    epochs: int = po.setting(
        None, "passes through the training samples; by default those of the data", at_least=0, kind=int
    )
    evaluate_every: float = po.setting(1.0, "epochs from one evaluation to the next", above=0)
    max_cpu_seconds: float = po.setting(
        0.0, "seconds of the processor, without evaluations, after which the run ends; 0 for none", at_least=0
    )
    precision: str = po.setting("single", "precision of the network", choices=("single", "double"))
    seed: int = po.setting(0, "seed of the first weights, batches and random states", at_least=0)


#: What may change at a restart: how far a run goes.
FREE = ("epochs", "max_cpu_seconds")


def hidden_widths(text: str) -> list[int]:
    """The numbers in `500,500`."""
    words = text.split(",")
    if not all(word.strip().isdecimal() and 0 < int(word) < 2**31 for word in words):
        raise InputError("-widths", text, "integers >= 1 with commas between them, as 500,500")
    return [int(word) for word in words]


def make_network(
    features: int, widths: Sequence[int], layers: int, own: SplitScriptSettings, classes: int
) -> nn.Module:
    """Hidden layers of these widths, layers of an ODE network of the last width, and a linear layer to the classes."""
    act, parts, before = ACTIVATIONS[own.activation], [], features
    for width in widths:
        parts += [nn.Linear(before, width), act()]
        before = width
    if layers:
        parts.append(nna.LayerStack(lambda: nn.Sequential(nn.Linear(before, before), act()), layers, own.Tf))
    network = nn.Sequential(*parts, nn.Linear(before, classes))
    nna.initialize(network, "glorot", torch.Generator().manual_seed(own.seed))
    return network


def load(own: SplitScriptSettings, name: str, files: DataFiles) -> nna.Dataset:
    """The samples that the settings name, signals standardized."""
    data = files.load(name, own.seed)
    return standardized(data) if name == "har" else data


OPTIONS = [
    *sections(SplitScriptSettings),
    *sections(SplitTrainingSettings),
    *sections(AdmmSettings, **ADMM_DEFAULTS, multipliers=False),
    *sections(DataFiles),
    *sections(ReportFiles),
    *sections(CheckpointFiles, checkpoint_every=EVERY),
]


def main(argv: Sequence[str] | None = None) -> float:
    """Train; the test accuracy of the last weights."""
    with command_line(argv, __doc__, OPTIONS):
        own, files, report = po.read(SplitScriptSettings), po.read(DataFiles), po.read(ReportFiles)
        kept = po.read(CheckpointFiles, checkpoint_every=EVERY)
        how = po.read(SplitTrainingSettings, loss=own.loss, form=own.form, states=own.states, seed=own.seed)
        limits = po.read(AdmmSettings, **ADMM_DEFAULTS, multipliers=how.form != "streaming")
        po.require_all_read()
        comm, imports = MPI.COMM_WORLD, used_memory()[0]
        check_targets(comm, report, kept)
        name = choose(own.data, files, "mnist", "digits")
        widths, layers, epochs = sizes(own, name)
        shares = [_number(word) for word in own.shares.split(",")] if own.shares else []
        samples = deal(comm, lambda: load(own, name, files), shares, own.samples)
        network = make_network(samples.x.shape[1], widths, layers, own, samples.classes)
        if own.precision == "double":
            network.double()
            samples = replace(samples, x=samples.x.double(), x_test=samples.x_test.double())
        forget_peak()
        training = prepare(own, how, network, samples, epochs)
        parameters = {**vars(own), "epochs": epochs, **_named(how), **_named(limits)}
        print_of = fingerprint(own, how, limits, samples, [*widths, layers])
        checkpoints = SplitCheckpoints(kept, comm, print_of, training.memory)
        with interruptible():
            result = training.run(ADMM(training.splitting, limits), checkpoints, "admm_mnist")
        found = summary("admm_mnist", training, result, imports, parameters)
        title = f"admm_mnist, {samples.name}, {how.form}: test accuracy {found['test_accuracy']:.4f}"
        write_report(comm, report, found, lambda: picture(title, training.marks, result.history))
        PETSc.Sys.Print(f"{title}; {result.message} ({found['cpu_seconds']:.1f} CPU s)")
        checkpoints.leave()
        finish("admm_mnist", result.reason > 0, result.message)
        return float(found["test_accuracy"])


def sizes(own: SplitScriptSettings, name: str) -> tuple[list[int], int, int]:
    """Widths, layers of the ODE network and epochs: those of the options, else those of the data."""
    text, layers, epochs = PRESETS[name]
    widths = hidden_widths(own.widths or text)
    layers = layers if own.layers is None else own.layers
    numbers = 4 * (sum(a * b for a, b in pairwise(widths)) + layers * widths[-1] ** 2 + widths[0] * 2)
    require_memory(numbers, "-widths, -layers", f"{own.widths or text}, {layers}", "smaller ones")
    return widths, layers, epochs if own.epochs is None else own.epochs


def prepare(
    own: SplitScriptSettings,
    how: SplitTrainingSettings,
    network: nn.Module,
    samples: Samples,
    epochs: int,
    comm: Any = MPI.COMM_WORLD,
    say: Callable[[CurvePoint], None] | None = say_point,
) -> SplitTraining:
    """The training of a network, whose clock runs from here; `say` tells what evaluations find."""
    n = sum(samples.counts)
    team = comm if comm.size > 1 else None
    per_epoch = n / how.batch_of(n) if how.form == "streaming" else 1.0
    iterations = math.ceil(epochs * per_epoch - 1e-9)

    def make() -> LayerSplitting:
        kind = partial(StreamedLayers, iterations) if how.form == "streaming" else WholeLayers
        return kind(network, samples.x, samples.y, how, team)

    return SplitTraining(
        network, samples, make, iterations, per_epoch, own.evaluate_every, own.max_cpu_seconds, comm, say
    )


def fingerprint(
    own: SplitScriptSettings, how: SplitTrainingSettings, limits: AdmmSettings, samples: Samples, sizes: Sequence[int]
) -> dict[str, Any]:
    """What must be equal where a run goes on, the samples of each rank among them."""
    given = {name: value for name, value in asdict(own).items() if name not in (*FREE, "widths", "layers", "shares")}
    method = {key: value for key, value in _named(limits).items() if key.split("_", 1)[1] not in ("max_it", "monitor")}
    parts = {"sizes": list(sizes), "samples of the ranks": samples.counts, "data": samples.print}
    return {"problem": "admm_mnist", **given, **_named(how), **method, **parts}


def _named(settings: po.Settings) -> Mapping[str, Any]:
    """The values of settings by the names of their options."""
    return {settings.prefix + each.name: getattr(settings, each.name) for each in fields(settings)}


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise InputError("-shares", word, "numbers with commas between them, as 2,1") from None


if __name__ == "__main__":
    start(main)
