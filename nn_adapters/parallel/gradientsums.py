"""Data parallel training: gradients summed over ranks while the backward pass still runs."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from nn_adapters.parallel.twolevel import TwoLevelSums
from pdeopt.core.errors import InputError, SolveFailure
from pdeopt.core.messages import PRECISIONS, Arrival, Messages
from pdeopt.core.team import TorchTeam

#: Begins the sum of a buffer and a weight over the ranks.
Begin: TypeAlias = Callable[[Tensor, float], Arrival[tuple[Tensor, float]]]

#: What a sum over ranks may be.
REDUCE = ("mean", "sum")


class GradientSums:
    """Gradients of ranks that have samples of their own become those of all samples, for any optimizer of PyTorch.

    The gradient of a layer leaves as soon as the backward pass has it: parameters are put into buckets, last ones
    first, and the sum of a bucket begins when all its gradients are there. MPI moves bytes whenever the pass reaches
    another parameter; `finish` waits for what is left. Beside `torch.optim.SGD`, synchronous data parallel training:

        for x, y in batches:                       # those of this rank
            optimizer.zero_grad()
            sums.samples = len(x)
            loss(network(x), y).backward()         # a mean over the samples
            sums.finish()                          # .grad is the mean over the samples of all ranks
            optimizer.step()

    The sums are the same on all ranks to the last bit, and so are the weights. A parameter without a gradient counts as
    zero. Buffers, such as the means of a batch normalization, are each rank's own. Frozen parameters are left out.

    Args:
        network: whose parameters are the same on all ranks of the communicator.
        team: an mpi4py communicator or a `TorchTeam`, whose sums begin in `finish`.
        precision: of a number in a message: float64 | float32 | bfloat16 | float16, with error feedback, see
            `Messages`; None for that of the gradients.
        reduce: "mean" over the samples, or the "sum" over the ranks.
        bucket: bytes of gradients that leave together, at least.
        passes: backward passes that add up to a gradient, as those of micro-batches.
        delay: steps by which the gradients that `finish` brings are late. Messages then have whole steps to arrive; the
            first steps find `.grad` None, and optimizers of PyTorch pass over it.
        node_size: ranks of a node, for sums in two levels: 0 for those that share memory. None for sums in one level.

    Attributes:
        samples: of this rank in the batch at hand; the weight of its gradient in the mean. 1 by default, for equal
            shares; 0 for a rank that has none and makes no backward pass.
        sent, sends: bytes and messages that this rank has sent so far.

    Raises:
        InputError: parameters of other names, shapes or values on some ranks; settings that are not legal; a backward
            pass after the gradient has left.

    Example:
        >>> sums = GradientSums(network, MPI.COMM_WORLD, precision="bfloat16")
    """

    def __init__(
        self,
        network: nn.Module,
        team: Any,
        precision: str | None = None,
        reduce: str = "mean",
        bucket: int = 1 << 20,
        passes: int = 1,
        delay: int = 0,
        node_size: int | None = None,
    ) -> None:
        if reduce not in REDUCE:
            raise InputError("reduce", reduce, " | ".join(REDUCE))
        if passes < 1 or delay < 0:
            raise InputError("passes and delay of gradients", (passes, delay), "at least 1, and at least 0")
        if node_size is not None and precision is not None:
            raise InputError("sums in two levels", f"messages in {precision}", "that of the gradients, None")
        require_equal(network, team)
        self.team, self.is_mean, self.passes, self.delay, self.samples = team, reduce == "mean", passes, delay, 1.0
        self._can_overlap, self._waiting = not isinstance(team, TorchTeam), False
        self._levels = None if node_size is None else TwoLevelSums(team, node_size)
        self._messages: list[Messages] = []
        self._teams: list[Any] = []
        self._buckets = [
            _Bucket(named, [self._begin_of(named, precision) for _ in range(delay + 1)])
            for named in buckets(network, bucket)
        ]
        self._hooks = [
            p.register_post_accumulate_grad_hook(lambda p, bucket=bucket: self._ready(bucket, p))  # type: ignore[misc]
            for bucket in self._buckets
            for p in bucket.parameters
        ]

    def _begin_of(self, named: Sequence[tuple[str, nn.Parameter]], precision: str | None) -> Begin:
        """How the sum of a bucket begins. Those on their way at once differ by tags, or by communicators."""
        if self._levels is not None:
            levels, tag = self._levels, len(self._teams)
            self._teams.append(None)
            return lambda buffer, weight: levels.begin_sum(buffer, weight, tag)
        size, dtype = sum(p.numel() for _, p in named), named[0][1].dtype
        own = next((name for name, each in PRECISIONS.items() if each == dtype), "float32")
        self._teams.append(self.team.Dup() if self._can_overlap and self.team.size > 1 else self.team)
        self._messages.append(Messages(self._teams[-1], size, precision or own))
        return self._messages[-1].begin_sum

    @property
    def sent(self) -> int:
        """Bytes that this rank has sent so far."""
        return sum(each.sent for each in [*self._messages, self._levels] if each is not None)

    @property
    def sends(self) -> int:
        """Messages that this rank has sent so far."""
        return sum(each.sends for each in [*self._messages, self._levels] if each is not None)

    @property
    def begun(self) -> int:
        """Buckets whose sums are on their way, of this backward pass."""
        return sum(bucket.has_left for bucket in self._buckets)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, backward passes add to the gradients, and nothing leaves."""
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    def _ready(self, bucket: _Bucket, parameter: Tensor) -> None:
        """A gradient is there: the hook of its parameter."""
        if self._waiting:
            return
        if bucket.has_left:
            legal = "`finish` after each, or passes=, or `with sums.waiting()` around all but the last"
            raise InputError("backward passes", "one more after the gradient has left", legal)
        bucket.passes[id(parameter)] += 1
        if self._can_overlap and min(bucket.passes.values()) >= self.passes:
            bucket.leave(self._weight)
        for each in self._buckets:
            each.advance()

    @property
    def _weight(self) -> float:
        return self.samples if self.is_mean else 1.0

    def finish(self) -> None:
        """Wait for the sums, and put them into `.grad`. Collective.

        Raises:
            SolveFailure: a gradient that is not finite, on all ranks; it names the parameter and the ranks.
            InputError: no rank has a sample.
        """
        for bucket in self._buckets:
            if not bucket.has_left:
                bucket.leave(self._weight)
        found = [bucket.arrive(self.delay) for bucket in self._buckets]
        for bucket, sums in zip(self._buckets, found):
            if sums is not None:
                self._require_finite(bucket, sums[0])
        for bucket, sums in zip(self._buckets, found):
            bucket.put(None if sums is None else self._mean(*sums))

    def _mean(self, total: Tensor, weight: float) -> Tensor:
        if self.is_mean and weight == 0.0:
            raise InputError("samples of the batch", "none on all ranks", "at least one")
        return total / weight if self.is_mean else total

    def _require_finite(self, bucket: _Bucket, total: Tensor) -> None:
        """The sum is the same on all ranks, so that all come here."""
        if bool(total.isfinite().all()):
            return
        broken = [not all(bool(p.grad.isfinite().all()) for p in bucket.parameters if p.grad is not None)]
        ranks = [rank for rank, each in enumerate(self.team.allgather(broken[0])) if each]
        names = [name for name, part in zip(bucket.names, bucket.split(total)) if not bool(part.isfinite().all())]
        for messages in self._messages:
            messages.recall({})  # what rounding has lost is not finite either
        where = f" on rank {', '.join(map(str, ranks))}" if ranks and not self.delay else ""
        raise SolveFailure(f"the gradient of {names[0]} is not finite{where}", "a smaller rate, or other samples")

    def close(self) -> None:
        """Wait for what is on its way, forget it, and leave the parameters. Collective."""
        for hook in self._hooks:
            hook.remove()
        for bucket in self._buckets:
            while bucket.arrive(0) is not None:
                pass
        for each in self._teams:
            if each is not None and each is not self.team:
                each.Free()
        self._buckets, self._hooks, self._teams = [], [], []


class _Bucket:
    """Parameters whose gradients leave together.

    Args:
        named: names and parameters.
        begin: how their sum begins, in turn.
    """

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], begin: Sequence[Begin]) -> None:
        self.names, self.parameters = [name for name, _ in named], [p for _, p in named]
        self.begin = deque(begin)
        self.under_way: deque[Arrival[tuple[Tensor, float]]] = deque()
        self.clear()

    def clear(self) -> None:
        """Be ready for a gradient."""
        self.passes, self.has_left = dict.fromkeys(map(id, self.parameters), 0), False

    def leave(self, weight: float) -> None:
        """Begin the sum of the gradients, times a weight."""
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        flat = torch.cat([part.detach().reshape(-1) for part in parts])
        self.under_way.append(self.begin[0](flat if weight == 1.0 else weight * flat, weight))
        self.begin.rotate(-1)
        self.has_left = True

    def advance(self) -> None:
        """Let bytes move."""
        for arrival in self.under_way:
            arrival.advance()

    def arrive(self, delay: int) -> tuple[Tensor, float] | None:
        """The sums that are `delay` steps old, if there are such."""
        self.clear()
        return self.under_way.popleft().finish() if len(self.under_way) > delay else None

    def put(self, mean: Tensor | None) -> None:
        """Into `.grad`."""
        parts = [None] * len(self.parameters) if mean is None else self.split(mean)
        for p, part in zip(self.parameters, parts):
            p.grad = part

    def split(self, flat: Tensor) -> list[Any]:
        """A part for each parameter, of its shape."""
        parts = flat.split([p.numel() for p in self.parameters])
        return [part.reshape(p.shape) for p, part in zip(self.parameters, parts)]


def buckets(network: nn.Module, size: int) -> list[list[tuple[str, nn.Parameter]]]:
    """Parameters that are not frozen, last ones first, in groups of one dtype and of `size` bytes or more.

    Args:
        network: any module.
        size: of a group, but for the last ones.
    """
    full: list[list[tuple[str, nn.Parameter]]] = []
    open_: dict[torch.dtype, list[tuple[str, nn.Parameter]]] = {}
    for name, p in reversed([each for each in network.named_parameters() if each[1].requires_grad]):
        group = open_.setdefault(p.dtype, [])
        group.append((name, p))
        if sum(each.numel() * each.element_size() for _, each in group) >= size:
            full.append(open_.pop(p.dtype))
    return [*full, *open_.values()]


def require_equal(network: nn.Module, team: Any) -> None:
    """Refuse networks that are not the same on all ranks: their steps would be, but not their weights. Collective.

    Args:
        network: any module.
        team: an mpi4py communicator or a `TorchTeam`.

    Raises:
        InputError: names, shapes or values that differ, on all ranks.
    """
    if team.size == 1:
        return
    digest = hashlib.sha256()
    shapes = {}
    for name, p in network.named_parameters():
        shapes[name] = tuple(p.shape), str(p.dtype), p.requires_grad
        digest.update(p.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    found = team.allgather((shapes, digest.hexdigest()))
    for rank, (others, values) in enumerate(found):
        odd = next((name for name in {**found[0][0], **others} if others.get(name) != found[0][0].get(name)), None)
        if odd is not None:
            got = f"{odd}: {others.get(odd)} on rank {rank}, {found[0][0].get(odd)} on rank 0"
            raise InputError("parameters", got, "the same on all ranks")
        if values != found[0][1]:
            legal = "the same on all ranks: one seed, or `share_weights(network, team)`"
            raise InputError("weights", f"others on rank {rank} than on rank 0", legal)


@torch.no_grad()
def share_weights(network: nn.Module, team: Any, root: int = 0) -> None:
    """Give all ranks the parameters and buffers of one. Collective.

    Args:
        network: of the same parameters on all ranks.
        team: an mpi4py communicator or a `TorchTeam`.
        root: the rank whose weights they are.
    """
    state = [*network.parameters(), *network.buffers()]
    for own, other in zip(state, team.bcast([each.detach().cpu() for each in state], root)):
        own.copy_(other)
