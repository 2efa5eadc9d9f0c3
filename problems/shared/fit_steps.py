"""Steps of an optimizer of second order, or of a rival, on batches of a data set."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import nn_adapters as nna
import pdeopt as po
from nn_adapters.curvature import SECOND_ORDER, recall_whole, second_order, whole_memory

#: Samples of the batches between two evaluations of the whole loss, by default.
BETWEEN = 1024
#: Samples that are evaluated at a time.
CHUNK = 4096

FIRST_ORDER = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}


@dataclass(frozen=True)
class FitSettings(po.Settings):
    """Data, network and optimizer."""

    data: str = po.setting(
        "auto",
        "images; auto: mnist with -data_dir or -fetch, else scikit-learn's digits",
        choices=("auto", "digits", "mnist", "fashion_mnist", "cifar10"),
    )
    samples: int = po.setting(16_384, "training samples at most; 0 for all", at_least=0)
    pool: bool = po.setting(True, "means of 2x2 pixels")
    widths: str = po.setting("", "neurons of the hidden layers, or channels, as 100,100; by default the script's")
    activation: str = po.setting("tanh", "activation", choices=tuple(nna.ACTIVATIONS))
    optimizer: str = po.setting("kfac", "optimizer", choices=(*SECOND_ORDER, *FIRST_ORDER), reads=SECOND_ORDER)
    lr: float = po.setting(0.1, "learning rate of sgd, which has momentum 0.9, and of adam", above=0, at_most=1e30)
    rival: str = po.setting(
        "none", "first-order method to train beside one of second order, of -rival_lr", choices=("none", *FIRST_ORDER)
    )
    rival_lr: float = po.setting(0.1, "learning rate of -rival", above=0, at_most=1e30)
    batch: int = po.setting(512, "samples of a batch", at_least=1)
    averaging: float = po.setting(
        0.0, "a: weights of step k are (a + 1) / (k + a) of the average that is evaluated; 0 for the last", at_least=0
    )
    target_loss: float = po.setting(None, "loss of all training samples that ends the run", above=0, kind=float)
    max_steps: int = po.setting(200, "steps at most", at_least=0)
    check_every: int = po.setting(
        0, f"steps from one evaluation of all samples to the next; 0 for those of {BETWEEN} samples", at_least=0
    )
    precision: str = po.setting("single", "precision of the network", choices=("single", "double"))
    seed: int = po.setting(0, "seed of the first weights, of batches and of sampled targets", at_least=0)


def hidden_widths(text: str, default: Sequence[int]) -> list[int]:
    """The numbers in `100,100`."""
    words = text.split(",") if text else [str(each) for each in default]
    if not all(word.strip().isdecimal() and 0 < int(word) < 2**31 for word in words):
        raise po.InputError("-widths", text, "integers >= 1 with commas between them, as 100,100")
    return [int(word) for word in words]


@dataclass(frozen=True)
class Fit:
    """What is trained.

    Attributes:
        network: of the samples.
        loss: of outputs and targets.
        x, y: training samples and targets.
        x_test, y_test: samples and classes, or targets, for tests.
        classes: whether targets are classes.
    """

    network: nn.Module
    loss: nna.CrossEntropy | nna.SquaredError
    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: bool


class FitSteps:
    """Steps of an optimizer on batches in a random order of the samples; ranks share each batch.

    What is evaluated is an average of the weights over about the last k / a of k steps, by polynomial decay (O. Shamir,
    T. Zhang, Stochastic gradient descent for non-smooth optimization, ICML 2013, section 4): the noise of small batches
    is averaged away without a rate that falls, and the first steps are forgotten.

    Args:
        task: what is trained; its network is changed.
        own: settings.
        comm: of all ranks.
    """

    #: Settings that may change where a run goes on.
    free: ClassVar[tuple[str, ...]] = ("max_steps", "target_loss")

    def __init__(self, task: Fit, own: FitSettings, comm: Any) -> None:
        self.task, self.own, self.comm = task, own, comm
        self.optimizer = self.make_optimizer()
        self.order, self.generator = torch.empty(0, dtype=torch.int64), torch.Generator().manual_seed(own.seed)
        self.count, self.seconds = 0, 0.0
        self.averaged = AveragedModel(task.network, avg_fn=_polynomial(own.averaging), use_buffers=True)
        is_shared = comm.size > 1 and not isinstance(self.optimizer, nna.SecondOrder)
        self.sums = nna.GradientSums(task.network, comm) if is_shared else None

    @property
    def network(self) -> nn.Module:
        """What is evaluated."""
        return self.averaged if self.own.averaging else self.task.network

    def make_optimizer(self) -> Any:
        """The optimizer that the settings name; reads its options."""
        return _optimizer(self.task, self.own, self.comm)

    @property
    def most(self) -> int:
        """Steps of the run."""
        return self.own.max_steps

    @property
    def every(self) -> int:
        """Steps from one evaluation of all samples to the next."""
        return self.own.check_every or max(1, BETWEEN // self.own.batch)

    @property
    def epochs(self) -> float:
        """Passes through the samples so far."""
        return self.count * min(self.own.batch, len(self.task.x)) / len(self.task.x)

    def samples(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Samples and targets of a batch, the same on all ranks."""
        return self.task.x[rows], self.task.y[rows]

    def observe(self) -> None:
        """Called after each evaluation of all samples. Collective."""

    def found(self) -> dict[str, Any]:
        """More for the summary. Collective."""
        return {}

    def step(self) -> float:
        """Take one; the loss of the batch before it, of this rank's samples. Collective."""
        begin = time.process_time()
        if len(self.order) < min(self.own.batch, len(self.task.x)):
            self.order = torch.randperm(len(self.task.x), generator=self.generator)
        rows, self.order = self.order[: self.own.batch], self.order[self.own.batch :]
        own = slice(self.comm.rank, None, self.comm.size)
        x, y = (part[own] for part in self.samples(rows))

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            value = self.task.loss(self.task.network(x), y)
            if self.sums is not None:
                self.sums.samples = len(x)
            value.backward()
            if self.sums is not None:
                self.sums.finish()
            return value

        value = float(self.optimizer.step(closure).detach())
        self.count += 1
        if self.own.averaging:
            self.averaged.update_parameters(self.task.network)
        self.seconds += time.process_time() - begin
        return value

    @torch.no_grad()
    def loss(self) -> float:
        """That of all training samples."""
        network, x, y = self.network, self.task.x, self.task.y
        parts = [self.task.loss.each(network(a), b).sum() for a, b in zip(x.split(CHUNK), y.split(CHUNK))]
        return float(torch.stack(parts).double().sum()) / len(x)

    @torch.no_grad()
    def test(self) -> float:
        """Share of the test samples that are classified rightly; else their loss."""
        network, x, y = self.network, self.task.x_test, self.task.y_test
        found = torch.cat([network(part) for part in x.split(CHUNK)])
        right = (found.argmax(1) == y).double() if self.task.classes else self.task.loss.each(found, y).double()
        return float(right.mean())

    def memory(self) -> dict[str, Any]:
        """What `recall` takes; of the optimizer, on the first rank alone. Collective."""
        theta = nn.utils.parameters_to_vector(self.task.network.parameters()).detach()
        place = {"theta": theta, "order": self.order.clone(), "generator": self.generator.get_state()}
        place["averaged"] = nn.utils.parameters_to_vector(self.averaged.parameters()).detach()
        counts = {"count": self.count, "seconds": self.seconds}
        if isinstance(self.optimizer, nna.SecondOrder):
            state = whole_memory(self.optimizer, self.comm)
        else:
            states = self.optimizer.state_dict()["state"]
            state = {f"{k}.{name}": torch.as_tensor(each) for k, all_ in states.items() for name, each in all_.items()}
        return place | counts | {f"optimizer.{name}": value for name, value in state.items()}

    def recall(self, memory: dict[str, Any]) -> None:
        """Go on from what `memory` gave."""
        _fill(self.task.network, memory["theta"])
        _fill(self.averaged, memory["averaged"])
        self.averaged.n_averaged.fill_(int(memory["count"]))
        self.order, self.count, self.seconds = memory["order"], int(memory["count"]), float(memory["seconds"])
        self.generator.set_state(memory["generator"])
        state = {name[10:]: value for name, value in memory.items() if name.startswith("optimizer.")}
        if isinstance(self.optimizer, nna.SecondOrder):
            recall_whole(self.optimizer, state, self.comm)
            return
        states: dict[int, dict[str, Any]] = {}
        for name, value in state.items():
            number, _, kind = name.partition(".")
            states.setdefault(int(number), {})[kind] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": states})


def _optimizer(task: Fit, own: FitSettings, comm: Any) -> Any:
    """The optimizer that the settings name; reads its options."""
    if own.optimizer in FIRST_ORDER:
        words = {"momentum": 0.9} if own.optimizer == "sgd" else {}
        return FIRST_ORDER[own.optimizer](task.network.parameters(), lr=own.lr, **words)
    return second_order(own.optimizer, task.network, task.loss, own.seed, comm if comm.size > 1 else None)


@torch.no_grad()
def _fill(network: nn.Module, theta: Tensor) -> None:
    """The parameters from a vector, where they are: products with views of the vector would round otherwise."""
    parameters = list(network.parameters())
    for p, part in zip(parameters, theta.split([p.numel() for p in parameters])):
        p.copy_(part.reshape(p.shape))


def _polynomial(a: float) -> Callable[[Tensor, Tensor, Any], Tensor]:
    """The average after the next step, the `count + 1`st that is taken into it."""

    def average(averaged: Tensor, p: Tensor, count: Any) -> Tensor:
        return torch.lerp(averaged, p, (a + 1.0) / (float(count) + 1.0 + a))

    return average
