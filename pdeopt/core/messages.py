"""Sums over the ranks of a team, in parts that belong to ranks, and in few bytes.

What training by splitting and Kronecker factors send: Gram matrices as packed triangles, whose sums only the ranks that
factor them need, and solutions that all ranks need.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from mpi4py import MPI
from torch import Tensor

from pdeopt.core.errors import InputError
from pdeopt.core.team import Team, TorchTeam

T = TypeVar("T")
U = TypeVar("U")

#: Messages in several rounds: yields the requests of a round, returns the result.
Course: TypeAlias = Generator[list[Any], None, T]

#: For each rank its pieces in a row: their sizes, and the ranks to which they go.
Routes: TypeAlias = Sequence[Sequence[tuple[int, Sequence[int]]]]

#: How the numbers of a message are written.
PRECISIONS = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: The largest count that MPI has before version 4: that of a C int.
LARGEST = 2**31 - 1


def whole_message(memory: Any) -> Any:
    """Bytes as mpi4py takes them, however many: more than a count can say are one item of a type that is made for them.

    Args:
        memory: an array or a tensor of bytes, (length,).
    """
    return memory if len(memory) <= LARGEST else [memory, 1, _type_of(len(memory))]


@lru_cache
def _type_of(length: int, place: int = 0) -> MPI.Datatype:
    """So many bytes in a row, from a place on: as many blocks of a mebibyte as there are, and the rest."""
    blocks, rest = divmod(length, _BLOCK)
    whole = MPI.BYTE.Create_contiguous(_BLOCK).Create_contiguous(blocks)
    return MPI.Datatype.Create_struct([1, rest], [place, place + blocks * _BLOCK], [whole, MPI.BYTE]).Commit()


_BLOCK = 2**20


def even_parts(size: int, ranks: int) -> list[int]:
    """Numbers of each rank where `size` of them are dealt out in a row, as evenly as they can be."""
    return [size // ranks + (rank < size % ranks) for rank in range(ranks)]


class Arrival(Generic[T]):
    """What is on its way: messages that have been sent, and what becomes of those that come.

    Args:
        course: sends, yields the requests of mpi4py that must be done before it goes on, and so on; its return value is
            the result. The first messages leave at once.

    Attributes:
        has_come: whether the result is there.
    """

    _result: T

    def __init__(self, course: Course[T]) -> None:
        self._course, self._requests = course, list[Any]()
        self.has_come = False
        self._go_on()

    def _go_on(self) -> None:
        try:
            self._requests = next(self._course)
        except StopIteration as end:
            self.has_come, self._result = True, end.value

    def advance(self) -> bool:
        """Let the library below move bytes: without a thread of its own, MPI does so in its calls alone.

        Returns:
            `has_come`.
        """
        while not self.has_come and all(request.Test() for request in self._requests):
            self._go_on()
        return self.has_come

    def rest(self) -> Course[T]:
        """What is still to do, for a course that goes on with the result."""
        while not self.has_come:
            yield self._requests
            self._go_on()
        return self._result

    def then(self, make: Callable[[T], U]) -> Arrival[U]:
        """The same messages, with what `make` makes of their result."""

        def course() -> Course[U]:
            return make((yield from self.rest()))

        return Arrival(course())

    def finish(self) -> T:
        """Wait, and give the result."""
        while not self.has_come:
            for request in self._requests:
                request.Wait()
            self._go_on()
        return self._result


class Rounding:
    """How numbers become bytes, and what the next ones bring of that which rounding took.

    Args:
        precision, feedback: see `Messages`.

    Raises:
        InputError: an unknown precision.
    """

    def __init__(self, precision: str, feedback: bool) -> None:
        if precision not in PRECISIONS:
            raise InputError("precision of messages", precision, " | ".join(PRECISIONS))
        self.precision, self.feedback = PRECISIONS[precision], feedback
        self._lost: dict[str, Tensor] = {}

    def write(self, kind: str, pieces: Sequence[Tensor]) -> list[Tensor]:
        """Messages, tensors of bytes; what rounding takes is kept for the next of this kind."""
        if self.precision == pieces[0].dtype and kind not in self._lost:  # nothing is rounded
            return [_bytes(piece) for piece in pieces]
        whole = torch.cat(list(pieces))
        lengths = [len(piece) for piece in pieces]
        if self.feedback and kind in self._lost:
            whole = whole + self._lost[kind].to(whole)
        written = [self._round(piece) for piece in whole.split(lengths)]
        if self.feedback:
            self._lost[kind] = whole - torch.cat([self.read(message, whole) for message in written])
        return written

    def _round(self, numbers: Tensor) -> Tensor:
        """Bytes of numbers; float16 in units of the largest, which stand in front in single precision."""
        if self.precision != torch.float16:
            return _bytes(numbers.to(self.precision))
        largest = float(numbers.abs().max()) if len(numbers) else 1.0
        unit = torch.tensor([largest or 1.0], dtype=torch.float32)
        return torch.cat([_bytes(unit), _bytes((numbers / unit.to(numbers)).to(self.precision))])

    def read(self, message: Tensor, like: Tensor) -> Tensor:
        """The numbers of a message in the dtype and on the device of `like`."""
        if self.precision != torch.float16:
            return _numbers(message, self.precision).to(like)
        unit = _numbers(message[:_UNIT], torch.float32)
        return _numbers(message[_UNIT:], self.precision).to(like) * unit.to(like)

    def length(self, numbers: int) -> int:
        """Bytes of a message of so many numbers."""
        return (_UNIT if self.precision == torch.float16 else 0) + self.precision.itemsize * numbers

    def memory(self) -> dict[str, Tensor]:
        """What rounding took and the next messages bring, for a restart."""
        return {name: lost.clone() for name, lost in self._lost.items()}

    def recall(self, memory: dict[str, Tensor]) -> None:
        """Go on from what `memory` gave."""
        self._lost = {name: lost.clone() for name, lost in memory.items()}


class Messages:
    """Sums of a buffer of a fixed size over a team: reduced to the ranks that own its parts, gathered from them.

    Each rank sends (N - 1)/N of the buffer in either half, whatever the library below: MPI, gloo or nccl. Numbers are
    rounded where they leave a rank, and summed in the order of the ranks in the buffer's own precision, so that the sum
    is the same on all ranks to the last bit. What rounding took is added to the next message of the same kind (error
    feedback: F. Seide, H. Fu, J. Droppo, G. Li, D. Yu, Interspeech 2014; S. P. Karimireddy, Q. Rebjock, S. U. Stich,
    M. Jaggi, ICML 2019): the error of a sum of messages stays that of one of them.

    Args:
        team: of ranks; None or one rank: nothing is sent and nothing is rounded.
        size: numbers in the buffer.
        precision: of a number in a message: float64 | float32 | bfloat16 | float16. Those in float16, which ends at
            65504, are sent in units of the largest among them.
        parts: numbers of the buffer that belong to each rank, in a row; by default even.
        feedback: whether what rounding took is kept for the next message.

    Attributes:
        sent, sends: bytes and messages that this rank has sent so far.

    Raises:
        InputError: an unknown precision, or parts that do not add up to the buffer.

    Example:
        >>> messages = Messages(MPI.COMM_WORLD, 1000, "bfloat16")
        >>> own = messages.reduce_scatter(buffer)            # the sum of this rank's part
        >>> whole = messages.allgather(own)                  # all parts
        >>> arrival = messages.begin_reduce(buffer)          # the same in two halves, with work between them
        >>> own, weight = arrival.finish()
    """

    def __init__(
        self,
        team: Team | None,
        size: int,
        precision: str = "float32",
        parts: Sequence[int] | None = None,
        feedback: bool = True,
    ) -> None:
        self.rounding = Rounding(precision, feedback)
        self.team: Any = team
        self.rank, self.ranks = (0, 1) if team is None else (team.rank, team.size)
        self.size = size
        self.parts = even_parts(size, self.ranks) if parts is None else list(parts)
        if len(self.parts) != self.ranks or sum(self.parts) != size or min(self.parts) < 0:
            raise InputError("parts of a message", self.parts, f"{self.ranks} numbers >= 0 that add up to {size}")
        self.sent, self.sends = 0, 0

    def reduce_scatter(self, buffer: Tensor, weight: float = 0.0) -> tuple[Tensor, float]:
        """The sum over the ranks of this rank's part of the buffer, (parts[rank],), and of the weights. Collective.

        Args:
            buffer: this rank's share of the sum, (size,).
            weight: a number that goes along and is not rounded, as that of the samples in the buffer.
        """
        return self.begin_reduce(buffer, weight).finish()

    def begin_reduce(self, buffer: Tensor, weight: float = 0.0) -> Arrival[tuple[Tensor, float]]:
        """`reduce_scatter`, of which only the messages leave here; the buffer may change at once. Collective."""
        if self.ranks == 1:
            return here((buffer.clone(), weight))
        pieces = buffer.split(self.parts)
        own = pieces[self.rank].clone()
        head = _bytes(torch.tensor([weight], dtype=torch.float64))
        messages = [torch.cat([head, message]) for message in self.rounding.write("reduce", pieces)]
        arrival = self._exchange(messages, [len(head) + self.rounding.length(len(own))] * self.ranks)

        def total_of(received: list[Tensor]) -> tuple[Tensor, float]:
            total, weights = torch.zeros_like(own), 0.0
            for rank, message in enumerate(received):
                total += own if rank == self.rank else self.rounding.read(message[len(head) :], own)
                weights += weight if rank == self.rank else float(_numbers(message[: len(head)], torch.float64))
            return total, weights

        return arrival.then(total_of)

    def allgather(self, own: Tensor) -> Tensor:
        """The parts of all ranks in a row, (size,); equal on all of them to the last bit. Collective.

        Args:
            own: this rank's part, (parts[rank],).
        """
        return self.begin_allgather(own).finish()

    def begin_allgather(self, own: Tensor) -> Arrival[Tensor]:
        """`allgather`, of which only the messages leave here. Collective."""
        if self.ranks == 1:
            return here(own.clone())
        return self.begin_spread(own, [[(part, range(self.ranks))] for part in self.parts]).then(torch.cat)

    def sum(self, buffer: Tensor) -> Tensor:
        """The sum over the ranks, (size,), on all of them. Collective."""
        return self.begin_sum(buffer).finish()[0]

    def begin_sum(self, buffer: Tensor, weight: float = 0.0) -> Arrival[tuple[Tensor, float]]:
        """The sums of the buffers and of the weights, on all ranks; the second half leaves when the first has come.

        Collective. Two such sums that are on their way at once need teams of their own: ranks differ in when the second
        halves leave.
        """
        reduced = self.begin_reduce(buffer, weight)

        def course() -> Course[tuple[Tensor, float]]:
            own, weights = yield from reduced.rest()
            return (yield from self.begin_allgather(own).rest()), weights

        return Arrival(course())

    def spread(self, own: Tensor, routes: Routes) -> list[Tensor]:
        """Pieces of each rank's part to the ranks that need them, all of which see the same. Collective.

        Args:
            own: this rank's part.
            routes: for each rank its pieces in a row: their sizes, and the ranks to which they go.

        Returns:
            The pieces for this rank, those of rank 0 first; one of its own that goes to others, too, as they see it.
        """
        return self.begin_spread(own, routes).finish()

    def begin_spread(self, own: Tensor, routes: Routes) -> Arrival[list[Tensor]]:
        """`spread`, of which only the messages leave here. Collective."""
        pieces = routes[self.rank]
        written = self.rounding.write("gather", own.split([size for size, _ in pieces])) if pieces else []
        nothing = torch.empty(0, dtype=torch.uint8)
        sent = [
            torch.cat([nothing, *(message for message, (_, targets) in zip(written, pieces) if rank in targets)])
            for rank in range(self.ranks)
        ]
        lengths = [[self.rounding.length(size) for size, targets in each if self.rank in targets] for each in routes]

        def read(received: list[Tensor]) -> list[Tensor]:
            received[self.rank] = sent[self.rank]
            pairs = zip(received, lengths)
            return [self.rounding.read(piece, own) for message, each in pairs for piece in message.split(each)]

        return self._exchange(sent, list(map(sum, lengths))).then(read)

    def memory(self) -> dict[str, Tensor]:
        """What rounding took and the next messages bring, for a restart."""
        return self.rounding.memory()

    def recall(self, memory: dict[str, Tensor]) -> None:
        """Go on from what `memory` gave."""
        self.rounding.recall(memory)

    def _exchange(self, messages: Sequence[Tensor], lengths: Sequence[int]) -> Arrival[list[Tensor]]:
        """What each rank has for this one, of so many bytes; nothing is sent to the rank itself."""
        lengths = [length if rank != self.rank else 0 for rank, length in enumerate(lengths)]
        sent = [message if rank != self.rank else message[:0] for rank, message in enumerate(messages)]
        self.sent += sum(map(len, sent))
        self.sends += sum(len(message) > 0 for message in sent)
        return exchange(self.team, sent, lengths, 8 * self.ranks * (self.size + self.ranks))


#: Bytes of the unit in front of a message in float16.
_UNIT = 4


def _bytes(numbers: Tensor) -> Tensor:
    return numbers.detach().cpu().contiguous().view(torch.uint8)


def _numbers(message: Tensor, dtype: torch.dtype) -> Tensor:
    return message.clone().view(dtype)  # the copy is aligned


def here(result: T) -> Arrival[T]:
    """What has come already, as on a team of one."""

    def course() -> Course[T]:
        yield from ()
        return result

    return Arrival(course())


def exchange(
    team: Any, messages: Sequence[Tensor], lengths: Sequence[int], most: int = LARGEST + 1
) -> Arrival[list[Tensor]]:
    """All to all: this rank's bytes for each rank, for those that each rank has for it. Collective.

    Args:
        team: mpi4py communicator or `TorchTeam`.
        messages: tensors of bytes, one a rank; they may change at once.
        lengths: bytes that come from each rank.
        most: a bound of the bytes that a rank sends and of those that it receives, the same on all of them.
    """
    sizes = [len(message) for message in messages]
    sent = torch.cat(list(messages))

    def course() -> Course[list[Tensor]]:
        if isinstance(team, TorchTeam):
            return list(team.alltoall(sent, sizes, lengths).split(list(lengths)))
        received = torch.empty(sum(lengths), dtype=torch.uint8)
        if most <= LARGEST:
            yield [team.Ialltoallv([sent.numpy(), sizes], [received.numpy(), list(lengths)])]
        else:  # which takes longer for small messages
            yield [team.Ialltoallw(_pieces(sent, sizes), _pieces(received, lengths))]
        return list(received.split(list(lengths)))

    return Arrival(course())


def _pieces(memory: Tensor, lengths: Sequence[int]) -> list[Any]:
    """What goes to each rank or comes from it, as mpi4py takes it for MPI_Alltoallw.

    Places are counts of MPI, which end at 2 GiB, also where each piece is small. Beyond, types know the places: what
    two ranks agree upon is the number of bytes, so that each may write its own pieces in either way.
    """
    places, ranks = [0, *accumulate(lengths)][:-1], len(lengths)
    if len(memory) <= LARGEST:
        return [memory.numpy(), (list(lengths), places), [MPI.BYTE] * ranks]
    return [memory.numpy(), ([1] * ranks, [0] * ranks), list(map(_type_of, lengths, places))]
