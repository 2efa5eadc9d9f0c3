"""The value and the gradient of a loss as one CUDA graph, captured once and replayed.

A narrow network on a GPU waits for Python, which starts thousands of small kernels. A graph starts them all at once:
the same kernels in the same memory. What a replay cannot do is decided here: which graph serves, and what happens where
the cycles of parallel layers have diverged.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nn_adapters.layers.layersolve import LARGEST_MISFIT
from nn_adapters.layers.parallelmodule import ParallelModule, mgrit_solvers
from nn_adapters.layers.parts.context import autocast_state
from pdeopt.core.errors import InputError

#: Kinds of calls that are remembered, with their graphs and the memory of these: whole batches and the last one of an
#: epoch, before and after cycles change.
MOST_KINDS = 4


class CudaGraph:
    """`torch.cuda.CUDAGraph`: what is called inside of `capture` once, `replay` does again, in the same memory."""

    #: type of the devices that it is for
    device = "cuda"

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    #: (device) -> a context: streams, of which each device has its own, are those of this one
    on = staticmethod(torch.cuda.device)

    @staticmethod
    @contextmanager
    def warm_up() -> Iterator[None]:
        """What is called before a capture goes to another stream, as PyTorch asks for it."""
        own, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(own)
        with torch.cuda.stream(side):
            yield
        own.wait_stream(side)

    @contextmanager
    def capture(self) -> Iterator[None]:
        """What is called inside is not done, but becomes the graph."""
        before = torch.cuda.stream(torch.cuda.current_stream())  # the stream afterwards, also where a capture fails
        with before, torch.cuda.graph(self._graph):
            yield

    def replay(self) -> None:
        """Do it."""
        self._graph.replay()


class CapturedGradient:
    """Value and gradient of a loss by the parameters of a network, replayed as a CUDA graph wherever that is right.

    Called with the tensors of a batch it returns the loss and sets the `.grad` of the parameters, in place of what an
    earlier call has set: nothing is added up, so a loss has all samples of a step. A `.grad` of another origin is
    refused, and so are hooks after accumulation, which would not be called. A scale of the loss, as a GradScaler's, is
    neither applied nor taken away. The first call of its
    kind is an ordinary one; the second is captured, and from then on replayed. A kind is what a graph depends on:
    shapes and types, where parameters and buffers are, cycles of parallel layers and whether they go one after the
    other, training mode, autocast. So `CycleControl` may change cycles, and `exactly(network)` is exact. Only the
    numbers in samples, parameters and buffers may change from call to call; whatever else the loss depends on stays as
    it was in the capture. Dropout draws its masks anew, by the generator of the device.

    A replay is waited for once, for the misfits of the cycles (`network.solvers[0].misfits`). Where they have diverged
    the call is done again without a graph, so that solves are repeated one layer after the other, with the warning.

    There are ordinary calls alone for networks or samples on the host, for layers of several ranks, with a tolerance of
    the cycles or warm starts, and, after a warning, where a capture fails, as for layers that ask for numbers.

    Args:
        network: any module.
        loss: the tensors of a batch -> the loss, a scalar, by this network.
        graph: class of the graphs, as `CudaGraph`.

    Attributes:
        replays: how many there were.

    Raises:
        InputError: a parameter with a `.grad` that is not of this object, or with hooks after accumulation.
        RuntimeError: what an ordinary call raises.

    Example:
        >>> gradient = CapturedGradient(network, lambda x, y: nn.functional.cross_entropy(network(x), y))
        >>> for x, y in batches:
        ...     value = gradient(x.cuda(), y.cuda())
        ...     optimizer.step()
    """

    def __init__(self, network: nn.Module, loss: Callable[..., Tensor], graph: Any = CudaGraph) -> None:
        self.network, self.loss, self.graph, self.replays = network, loss, graph, 0
        self._kinds: dict[Any, _Captured | None] = {}
        self._given: list[Tensor | None] = []
        self._has_failed = False

    def __call__(self, *tensors: Tensor) -> Tensor:
        """The loss, detached; gradients are in memory that later calls use again.

        Args:
            tensors: the arguments of the loss.
        """
        self._check()
        if not self._fits(tensors):
            return self._set(*self.evaluate(tensors))
        with self.graph.on(tensors[0].device):
            return self._call(tensors)

    def _call(self, tensors: Sequence[Tensor]) -> Tensor:
        kind = self._kind(tensors)
        is_known, captured = kind in self._kinds, self._kinds.pop(kind, None)
        self._kinds[kind] = captured  # the last one of those that are remembered
        if not is_known:
            if len(self._kinds) > MOST_KINDS:
                del self._kinds[next(iter(self._kinds))]
            with self.graph.warm_up():
                return self._set(*self.evaluate(tensors))
        if captured is None:
            captured = self._kinds[kind] = self._capture(tensors)
        if captured is None or not self._replay(captured, tensors):
            return self._set(*self.evaluate(tensors))
        return self._set(captured.value.clone(), captured.gradient)

    def evaluate(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor | None]]:
        """The loss and its gradient, by an ordinary call."""
        with torch.enable_grad(), torch.autocast(**autocast_state(self.graph.device)):  # which keeps no casts
            value = self.loss(*tensors)
            return value.detach(), torch.autograd.grad(value, self._trained, allow_unused=True)

    @property
    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.network.parameters() if parameter.requires_grad]

    def _check(self) -> None:
        """Refuse what `_set` would pass over in silence."""
        given = {id(g) for g in self._given if g is not None}
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad and parameter._post_accumulate_grad_hooks:
                raise InputError(f"hooks after accumulation of {name}", "some", "none, for a CapturedGradient")
            if parameter.requires_grad and parameter.grad is not None and id(parameter.grad) not in given:
                legal = "network.zero_grad() before: a CapturedGradient adds nothing up"
                raise InputError(f".grad of {name}", "one that another call has set", legal)

    def _set(self, value: Tensor, gradient: Sequence[Tensor | None]) -> Tensor:
        self._given = list(gradient)
        for parameter, g in zip(self._trained, gradient):
            parameter.grad = g
        return value

    def _fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether there may be a graph."""
        solvers, stored = mgrit_solvers(self.network), [*self.network.parameters(), *self.network.buffers()]
        places = {t.device for t in (*tensors, *stored)}
        is_there = bool(tensors) and len(places) == 1 and places.pop().type == self.graph.device
        is_free = all(not s.factors or (s.settings.rtol == 0 and s.settings.start != "warm") for s in solvers)
        return is_there and is_free and not self._has_failed and all(s.grid.mpi.size == 1 for s in solvers)

    def _kind(self, tensors: Sequence[Tensor]) -> Any:
        """What a graph depends on; see the class."""
        modules, solvers = list(self.network.modules()), mgrit_solvers(self.network)
        stored = (*self.network.parameters(), *self.network.buffers())
        return (
            tuple((t.shape, t.dtype, t.device) for t in tensors),
            tuple((t.data_ptr(), t.dtype, t.requires_grad) for t in stored),
            tuple((s.forward.cycles, s.adjoint.cycles, *s.factors, s.is_serial) for s in solvers),
            tuple((m.training, isinstance(m, ParallelModule) and m.approximate) for m in modules),
            tuple(autocast_state(self.graph.device).items()),
        )

    def _capture(self, tensors: Sequence[Tensor]) -> _Captured | None:
        try:
            return _Captured(self, tensors)
        except RuntimeError as error:
            self._has_failed, why = True, str(error).partition("\n")[0]
            warnings.warn(f"no CUDA graph of this gradient, but ordinary calls: {why}", RuntimeWarning, stacklevel=3)
            return None

    def _replay(self, captured: _Captured, tensors: Sequence[Tensor]) -> bool:
        """Whether the replay is right, rather than diverged; then nothing is left of it."""
        self.replays += 1
        misfits = captured.replay(tensors)
        is_right = all(misfit <= LARGEST_MISFIT for misfit in misfits)
        if not is_right:
            captured.take_back()
        return is_right


class _Captured:
    """One graph, what it reads, and what it leaves.

    Args:
        owner: whose call becomes the graph.
        tensors: of a call.

    Attributes:
        value, gradient: the loss, and the gradient by the trained parameters.
    """

    def __init__(self, owner: CapturedGradient, tensors: Sequence[Tensor]) -> None:
        self._graph, self._inputs = owner.graph(), [tensor.detach().clone() for tensor in tensors]
        self._solvers, self._buffers = mgrit_solvers(owner.network), list(owner.network.buffers())
        self._before = [buffer.clone() for buffer in self._buffers]
        for solver in self._solvers:
            solver.captured = []
        try:
            with self._graph.capture():
                for kept, buffer in zip(self._before, self._buffers):
                    kept.copy_(buffer)
                self.value, self.gradient = owner.evaluate(self._inputs)
                gaps = [gap for solver in self._solvers for _, gap in solver.captured]
                self._gaps = torch.stack(gaps) if gaps else None
            self._whose = [(solver, adjoint) for solver in self._solvers for adjoint, _ in solver.captured]
            self._rough = [solver.rough for solver in self._solvers]
        finally:
            for solver in self._solvers:
                solver.captured, solver.gaps, solver.rough = [], (0.0, 0.0), 0.0

    def replay(self, tensors: Sequence[Tensor]) -> list[float]:
        """Do it for other tensors; the misfits of its solves, of which the solvers know the largest."""
        for into, tensor in zip(self._inputs, tensors):
            into.copy_(tensor)
        self._graph.replay()
        misfits: list[float] = [] if self._gaps is None else self._gaps.tolist()
        for solver, rough in zip(self._solvers, self._rough):
            solver.residuals, solver.gaps, solver.rough = ([], []), (0.0, 0.0), rough
        for (solver, adjoint), misfit in zip(self._whose, misfits):
            forward, back = solver.misfits
            solver.gaps = (forward, max(back, misfit)) if adjoint else (max(forward, misfit), back)
        return misfits

    def take_back(self) -> None:
        """Buffers as they were before the replay."""
        with torch.no_grad():
            for kept, buffer in zip(self._before, self._buffers):
                buffer.copy_(kept)
