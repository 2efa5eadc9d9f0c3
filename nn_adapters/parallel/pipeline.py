"""Pipelines of layers: each rank has some layers of a network, and micro-batches pass through the ranks."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor, nn

from pdeopt.core.errors import InputError, SolveFailure
from pdeopt.core.messages import whole_message

SCHEDULES = ("1f1b", "gpipe")

#: Tags of features that go forward, and of derivatives that come back.
FORWARD, BACKWARD = 1, 2

#: Dtypes of messages, by number.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

#: Numbers in front of a message: its dtype, its axes, and their sizes.
HEADER = 10


class Pipeline:
    """A network whose layers are dealt out to ranks in a row, a stage each; batches go through in micro-batches.

    Two schedules, with the same gradients. "gpipe" does all micro-batches forward, then all backward (Y. Huang et al.,
    GPipe, NeurIPS 2019). "1f1b" begins to go backward as soon as it can, then one forward, one backward (D. Narayanan
    et al., PipeDream, SOSP 2019), so that a rank of S holds the activations of at most S - rank micro-batches, not of
    all M. Either way ranks are idle for a share (S - 1)/(M + S - 1) of the time.

    Gradients are those of the serial network, to rounding: of the mean (or sum) over the whole batch. `step` adds them
    to `.grad`; clearing them and the optimizer are yours, with `stage.parameters()`. To share samples as well,
    `GradientSums(pipeline.stage, groups.data, passes=pipeline.microbatches)`.

    Args:
        network: a Sequential of at least as many modules as ranks, the same on all of them. A rank keeps its own.
        comm: an mpi4py communicator, as `Groups.layers`.
        microbatches: M.
        schedule: 1f1b | gpipe.
        costs: of the modules, by which they are dealt out so that the dearest stage is cheap; by default their numbers
            of parameters.
        reduce: what the loss is over its samples, "mean" or "sum".

    Attributes:
        stage: the modules of this rank, with their names in the network, so that keys are those of its `state_dict`.
        held: the most micro-batches whose activations this rank has held at once.
        sent, sends: bytes and messages that this rank has sent so far.

    Raises:
        InputError: what is no Sequential, or has too few modules; a parameter of two stages; statistics of batches
            (BatchNorm), which micro-batches would change; settings that are not legal.

    Example:
        >>> pipeline = Pipeline(network, MPI.COMM_WORLD, microbatches=8)
        >>> optimizer = torch.optim.SGD(pipeline.stage.parameters(), lr=0.1)
        >>> loss = pipeline.step(x, y, nn.functional.cross_entropy)
        >>> optimizer.step()
    """

    def __init__(
        self,
        network: nn.Sequential,
        comm: Any,
        microbatches: int = 4,
        schedule: str = "1f1b",
        costs: Sequence[float] | None = None,
        reduce: str = "mean",
    ) -> None:
        if schedule not in SCHEDULES or reduce not in ("mean", "sum"):
            legal = f"{' | '.join(SCHEDULES)}, and mean | sum"
            raise InputError("schedule and reduce of a pipeline", (schedule, reduce), legal)
        if microbatches < 1:
            raise InputError("micro-batches", microbatches, "an integer >= 1")
        parts = require_pipeline(network, comm.size)
        costs = [sum(p.numel() for p in part.parameters()) for part in network] if costs is None else costs
        if len(costs) != len(parts) or not all(cost >= 0 and math.isfinite(cost) for cost in costs):
            raise InputError("costs of layers", list(costs), f"{len(parts)} numbers >= 0")
        self.comm, self.microbatches, self.schedule, self.is_mean = comm.Dup(), microbatches, schedule, reduce == "mean"
        self.rank, self.ranks = comm.rank, comm.size
        self.ends = stages(costs, comm.size)
        self._names = [[name for name, _ in parts[first:last]] for first, last in self.ends]
        require_alone([parts[first:last] for first, last in self.ends])
        first, last = self.ends[self.rank]
        self.stage = nn.Sequential(OrderedDict(parts[first:last]))
        self.held, self.sent, self.sends = 0, 0, 0
        self._requests: list[tuple[Any, Any]] = []

    @property
    def is_first(self) -> bool:
        """Whether samples enter here."""
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether the loss is computed here."""
        return self.rank == self.ranks - 1

    # -- training ------------------------------------------------------------------------------------------

    def step(self, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> float:
        """Evaluate a batch, and add the gradients to `.grad`. Collective.

        Args:
            x: samples, (samples, ...), on all ranks; only the first one reads more than their number.
            y: targets, (samples, ...), which only the last rank reads.
            loss: of outputs and targets, a mean over the samples (or a sum, see `reduce`).

        Returns:
            the loss of the batch, on all ranks.

        Raises:
            SolveFailure: a loss that is not finite, on all ranks.
        """
        samples = x.tensor_split(self.microbatches), y.tensor_split(self.microbatches)
        batches = [(a, b) for a, b in zip(*samples) if len(a)]
        open_: deque[tuple[Tensor, Tensor]] = deque()
        forward = iter(batches)
        total = 0.0
        for kind in self._order(len(batches)):
            if kind == "forward":
                inputs, outputs = self._forward(*next(forward), loss, len(x))
                total += float(outputs.detach()) if self.is_last else 0.0
                open_.append((inputs, outputs))
                self.held = max(self.held, len(open_))
            else:
                self._backward(*open_.popleft())
        self._wait()
        value = float(self.comm.bcast(total, self.ranks - 1))
        if not math.isfinite(value):
            raise SolveFailure(f"the loss of a batch is {value}", "a smaller rate, or other samples")
        return value

    def _order(self, batches: int) -> Iterator[str]:
        """What this rank does one after the other."""
        ahead = batches if self.schedule == "gpipe" else min(self.ranks - self.rank - 1, batches)
        yield from ["forward"] * ahead
        for _ in range(batches - ahead):
            yield "forward"
            yield "backward"
        yield from ["backward"] * ahead

    def _forward(
        self, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor], samples: int
    ) -> tuple[Tensor, Tensor]:
        """A micro-batch through the stage: what came in, and what goes out, or its share of the loss."""
        inputs = x if self.is_first else self._receive(self.rank - 1, FORWARD).requires_grad_()
        is_changed = any(getattr(part, "inplace", False) for part in self.stage.modules())
        with torch.enable_grad():
            outputs = self.stage(inputs.clone() if is_changed and not self.is_first else inputs)
            if self.is_last:
                return inputs, loss(outputs, y) * (len(x) / samples if self.is_mean else 1.0)
        self._send(outputs, self.rank + 1, FORWARD)
        return inputs, outputs

    def _backward(self, inputs: Tensor, outputs: Tensor) -> None:
        """The derivatives of a micro-batch."""
        g = None if self.is_last else self._receive(self.rank + 1, BACKWARD)
        if outputs.requires_grad:
            outputs.backward(g)  # type: ignore[no-untyped-call]
        if not self.is_first:
            self._send(torch.zeros_like(inputs) if inputs.grad is None else inputs.grad, self.rank - 1, BACKWARD)

    # -- the whole network ---------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Outputs of samples, on all ranks, without gradients. Collective."""
        outputs = self.stage(x if self.is_first else self._receive(self.rank - 1, FORWARD))
        if not self.is_last:
            self._send(outputs, self.rank + 1, FORWARD)
        self._wait()
        return self.comm.bcast(outputs if self.is_last else None, self.ranks - 1)  # type: ignore[no-any-return]

    def full_state_dict(self) -> dict[str, Tensor]:
        """The `state_dict` of the serial network, on all ranks. Collective."""
        parts = self.comm.allgather(self.stage.state_dict())
        return {key: value for part in parts for key, value in part.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take this rank's part of the `state_dict` of the serial network."""
        own = set(self._names[self.rank])
        self.stage.load_state_dict({key: value for key, value in state.items() if key.split(".")[0] in own})

    # -- messages ------------------------------------------------------------------------------------------

    def _send(self, features: Tensor, rank: int, tag: int) -> None:
        if features.dtype not in DTYPES or features.dim() > HEADER - 2:
            got = f"{features.dtype} of {features.dim()} axes"
            raise InputError("features between stages", got, "floating-point numbers of at most 8 axes")
        head = np.zeros(HEADER, dtype=np.int64)
        head[:2], head[2 : 2 + features.dim()] = (DTYPES.index(features.dtype), features.dim()), features.shape
        numbers = features.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        message = np.concatenate([head.view(np.uint8), numbers])
        self._requests = [each for each in self._requests if not each[0].Test()]
        self._requests.append((self.comm.Isend(whole_message(message), rank, tag), message))
        self.sent += len(message)
        self.sends += 1

    def _receive(self, rank: int, tag: int) -> Tensor:
        status = MPI.Status()
        self.comm.Probe(rank, tag, status)
        message = np.empty(status.Get_elements(MPI.BYTE), dtype=np.uint8)
        self.comm.Recv(whole_message(message), rank, tag)
        kind, axes, *shape = message[: 8 * HEADER].view(np.int64).tolist()
        device = next((p.device for p in self.stage.parameters()), torch.device("cpu"))
        return torch.from_numpy(message[8 * HEADER :]).view(DTYPES[kind]).reshape(shape[:axes]).to(device)

    def _wait(self) -> None:
        for request, _ in self._requests:
            request.Wait()
        self._requests = []


def stages(costs: Sequence[float], ranks: int) -> list[tuple[int, int]]:
    """Layers in a row for each rank, [first, last), none empty, such that the dearest stage is as cheap as can be.

    Args:
        costs: of the layers, >= 0.
        ranks: at most as many as layers.
    """
    sums, layers = np.array([0.0, *accumulate(costs)]), len(costs)
    best = np.full((ranks + 1, layers + 1), np.inf)  # of the first so many ranks and layers, the dearest stage
    cut = np.zeros((ranks + 1, layers + 1), dtype=int)
    best[0, 0] = 0.0
    for k in range(1, ranks + 1):
        for n in range(k, layers + 1):
            dearest = np.maximum(best[k - 1, :n], sums[n] - sums[:n])
            cut[k, n] = int(dearest.argmin())
            best[k, n] = dearest[cut[k, n]]
    ends = [layers]
    for k in range(ranks, 0, -1):
        ends.append(int(cut[k, ends[-1]]))
    return list(pairwise(reversed(ends)))


def require_pipeline(network: nn.Module, ranks: int) -> list[tuple[str, nn.Module]]:
    """The modules of a network that can be a pipeline of so many ranks, with their names.

    Raises:
        InputError: see `Pipeline`.
    """
    if not isinstance(network, nn.Sequential):
        raise InputError("network of a pipeline", type(network).__name__, "nn.Sequential")
    if len(network) < ranks:
        raise InputError("ranks of a pipeline", ranks, f"at most the {len(network)} modules of the network")
    for name, part in network.named_modules():
        if isinstance(part, nn.modules.batchnorm._NormBase) and part.running_mean is not None:
            raise InputError("layer of a pipeline", f"{name}: {part}", "LayerNorm or GroupNorm, which know no batches")
    return list(network.named_children())


def require_alone(parts: Sequence[Sequence[tuple[str, nn.Module]]]) -> None:
    """Refuse parameters that are on two ranks, whose gradients would be only part of it on each.

    Args:
        parts: names and modules of each rank.

    Raises:
        InputError: it names the module.
    """
    seen: dict[int, int] = {}
    for rank, stage in enumerate(parts):
        for name, part in stage:
            for p in part.parameters():
                if seen.setdefault(id(p), rank) != rank:
                    raise InputError("layer of a pipeline", f"{name}, with weights of another stage", "its own weights")
