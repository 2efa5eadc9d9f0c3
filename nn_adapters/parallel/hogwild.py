"""Asynchronous steps of threads that share the weights of a network, without locks."""

from __future__ import annotations

import copy
import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pdeopt.core.errors import InputError, SolveFailure

#: What a thread asks for: samples and targets of the next batch.
Batch = tuple[Tensor, Tensor]


class Hogwild:
    """Stochastic gradient steps by threads that read and write the same weights whenever they are ready.

    No thread waits for another: a gradient is of weights that others change meanwhile, and so is late by as many steps
    as they take between its reading and its writing (F. Niu, B. Recht, C. Re, S. J. Wright, Hogwild!, NeurIPS 2011).
    PyTorch's operations run outside of Python's lock, so threads share the cores; results differ from run to run.

    Args:
        network: without buffers that a batch changes, which threads would share.
        loss: of outputs and targets.
        rate: of the steps, theta -= rate * gradient.
        workers: threads.

    Attributes:
        staleness: of each step so far, the steps of other threads between its reading and its writing.

    Raises:
        InputError: no worker, a rate that is not positive, or a network with running statistics.

    Example:
        >>> training = Hogwild(network, nn.functional.cross_entropy, rate=0.1, workers=4)
        >>> training.run(batches)
    """

    def __init__(
        self, network: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], rate: float, workers: int = 2
    ) -> None:
        if workers < 1 or not (rate > 0 and math.isfinite(rate)):
            raise InputError("workers and rate", (workers, rate), "an integer >= 1, and a number > 0")
        for name, part in network.named_modules():
            if getattr(part, "track_running_stats", False):
                raise InputError("layer of threads", f"{name}: {part}", "one without running statistics")
        self.network, self.loss, self.rate, self.workers = network, loss, rate, workers
        self.staleness: list[int] = []
        self._taken, self._written = itertools.count(1), 0
        self._error: BaseException | None = None

    def run(self, batches: Iterable[Batch]) -> None:
        """Take a step for each batch; which thread takes which is chance.

        Args:
            batches: samples and targets; one thread at a time asks for the next one.

        Raises:
            SolveFailure: a loss that is not finite; all threads have ended.
        """
        self._error = None
        shared = _InTurn(batches)
        threads = [threading.Thread(target=self._work, args=(shared,)) for _ in range(self.workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def _work(self, batches: Iterator[Batch]) -> None:
        try:
            network = sharing_weights(self.network)
            pairs = list(zip(self.network.parameters(), network.parameters()))
            for x, y in batches:
                if self._error is not None:
                    return
                self._step(network, pairs, x, y)
        except BaseException as error:
            self._error = error

    def _step(self, network: nn.Module, pairs: list[tuple[Any, Any]], x: Tensor, y: Tensor) -> None:
        seen = self._written
        network.zero_grad()
        value = self.loss(network(x), y)
        if not math.isfinite(float(value.detach())):
            raise SolveFailure(f"the loss of a batch is {float(value.detach())}", "a smaller rate, or fewer workers")
        value.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for shared, own in pairs:
                if own.grad is not None:
                    shared.data.add_(own.grad, alpha=-self.rate)
        number = next(self._taken)
        self._written = max(self._written, number)
        self.staleness.append(number - 1 - seen)


class _InTurn:
    """An iterator that threads may share."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches, self._lock = iter(batches), threading.Lock()

    def __iter__(self) -> _InTurn:
        return self

    def __next__(self) -> Batch:
        with self._lock:
            return next(self._batches)


def sharing_weights(network: nn.Module) -> nn.Module:
    """A copy with gradients of its own, whose weights are the same memory.

    Args:
        network: any module.
    """
    found = copy.deepcopy(network)
    for own, shared in zip(found.parameters(), network.parameters()):
        own.data, own.grad = shared.data, None
    return found
