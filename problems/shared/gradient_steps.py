"""PyTorch's SGD and Adam on batches of a sampled function: what classifiers trained by APTS are compared with."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor

import nn_adapters as nna
import pdeopt as po
from pdeopt.core import DescentRecord
from pdeopt.functions import Tally


class GradientSteps:
    """SGD with momentum 0.9, or Adam: a step a batch, in a random order of the samples that is drawn anew each pass.

    Args:
        loss: the mean over all samples.
        kind: "sgd" or "adam".
        lr: learning rate.
        batch: samples of a batch.
        seed: of the orders.

    Attributes:
        theta: the weights, (size,).
        steps: so far.
    """

    def __init__(self, loss: nna.NetworkLoss, kind: str, lr: float, batch: int, seed: int) -> None:
        self.loss, self.batch, self.steps = loss, batch, 0
        self._weights = loss.parameters().requires_grad_()
        words = {"momentum": 0.9} if kind == "sgd" else {}
        make = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[kind]
        self.optimizer: Any = make([self._weights], lr=lr, **words)  # type: ignore[operator]
        self._generator = torch.Generator().manual_seed(seed)
        self._waiting = torch.empty(0, dtype=torch.int64)

    @property
    def theta(self) -> Tensor:
        """The weights, (size,)."""
        return self._weights.detach()

    def step(self) -> po.History:
        """Take a step on the next batch; its record, alone."""
        if not len(self._waiting):
            self._waiting = torch.randperm(self.loss.samples, generator=self._generator)
        rows, self._waiting = self._waiting[: self.batch], self._waiting[self.batch :]
        value, self._weights.grad = self.loss.subset(rows).value_and_gradient(self.theta)
        self.optimizer.step()
        self.steps += 1
        spent = self.spent()
        counts = int(spent.values), int(spent.gradients), int(spent.hessian_products), spent.work
        return po.History([DescentRecord(self.steps, value, self.loss.norm(self._weights.grad), 0.0, *counts)])

    def spent(self) -> Tally:
        """Calls so far."""
        return self.loss.tally.copy()

    def memory(self) -> dict[str, Any]:
        """What `recall` takes."""
        state = {f"state.{name}": torch.as_tensor(value) for name, value in self._state().items()}
        random = {"waiting": self._waiting.clone(), "random": self._generator.get_state()}
        tally = torch.tensor(astuple(self.spent()), dtype=torch.float64)
        return {"theta": self.theta.clone(), "steps": self.steps, "tally": tally} | random | state

    def recall(self, memory: dict[str, Any]) -> None:
        """Go on from what `memory` gave.

        Raises:
            InputError: another number of weights, or another optimizer's state.
        """
        theta, state = memory["theta"], {name[6:]: value for name, value in memory.items() if name[:6] == "state."}
        legal = f"{tuple(self.theta.shape)}, and states alike"
        if any(value.shape not in ((), self.theta.shape) for value in (theta, *state.values())):
            raise po.InputError("-restart", f"weights of shape {tuple(theta.shape)}", legal)
        with torch.no_grad():
            self._weights.copy_(theta)
        self.optimizer.state[self._weights] = {name: value.clone() for name, value in state.items()}
        self.steps, self._waiting = int(memory["steps"]), memory["waiting"].clone()
        self._generator.set_state(memory["random"])
        self.loss.tally.set(Tally(*memory["tally"].tolist()))

    def _state(self) -> dict[str, Any]:
        state = self.optimizer.state.get(self._weights, {})
        return {name: value for name, value in state.items() if value is not None}
