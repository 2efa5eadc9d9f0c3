"""How tensors become messages between ranks, in the memory of the host and, as far as shows without one, of a GPU."""

import _ctypes
import ctypes
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from mpi4py import MPI
from petsc4py import PETSc

from pdeopt.core.errors import InputError
from pdeopt.core.messages import LARGEST, _type_of, whole_message
from pdeopt.core.options import unread
from pdeopt.steps.exchange import gpuaware, parcels
from pdeopt.steps.exchange.neighbors import Neighbors
from tests.helpers import parallel_messages
from tests.helpers.parallel_messages import OPTION, as_if_on_a_gpu
from tests.helpers.support import python


def test_messages_on_one_rank():
    parallel_messages.main(MPI.COMM_SELF)


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_messages_are_the_same_in_the_memory_of_the_host_and_of_a_gpu(ranks):
    """All types and kinds of messages, and a network; also where only some ranks send from a GPU."""
    done = python("-m", "tests.helpers.parallel_messages", ranks=ranks)
    assert done.returncode == 0, done.stderr


# -- what mpi4py is given ---------------------------------------------------------------------------------------


class Recorder:
    """The middle one of three ranks, which notes what is done in which order, and sends nothing."""

    rank, size = 1, 3

    def __init__(self):
        self.done = []

    def _note(self, what, message):
        memory = getattr(MPI, "buffer", None) or MPI.memory  # the name in mpi4py 4, and the one before
        self.done.append((what, memory(message).address))

    def Isend(self, message, rank):
        self._note("send", message)
        return SimpleNamespace(Wait=lambda: None)

    def Send(self, message, rank):
        self._note("send", message)

    def Recv(self, message, rank):
        self._note("receive", message)

    def Bcast(self, message, root):
        self._note("send" if root == self.rank else "receive", message)

    def Allreduce(self, message, total):
        self._note("send", message)
        self._note("receive", total)

    def wait(self, tensor):
        """Stands for waiting for the stream of a GPU."""
        self.done.append(("wait", tensor.data_ptr()))
        return tensor


MESSAGES = {
    "exchange": lambda mpi, row: Neighbors(mpi).exchange(row, 1),
    "send": lambda mpi, row: Neighbors(mpi).send_after(row),
    "receive": lambda mpi, row: Neighbors(mpi).receive_before(row),
    "from this rank": lambda mpi, row: parcels.from_rank(mpi, row, 1),
    "from another": lambda mpi, row: parcels.from_rank(mpi, row, 0),
    "sum": parcels.sum_over_ranks,
}


@pytest.mark.parametrize("name", MESSAGES)
def test_mpi_gets_the_memory_of_the_gpu_when_its_stream_is_through(name):
    mpi, row = Recorder(), torch.randn(6)
    with as_if_on_a_gpu(), patch.object(parcels, "_ready", mpi.wait):
        found = MESSAGES[name](mpi, row)
    sent = [place for what, place in mpi.done if what == "send"]
    received = [place for what, place in mpi.done if what == "receive"]
    assert sent + received and set(sent) <= {row.data_ptr()}
    if received and name != "from this rank":
        assert received == [found.data_ptr()] != [row.data_ptr()]
    for step, (what, place) in enumerate(mpi.done):
        assert what == "wait" or ("wait", place) in mpi.done[:step]


def test_rows_that_are_not_in_one_piece_are_copied_before_the_stream_is_waited_for():
    mpi, column = Recorder(), torch.randn(6, 2)[:, 1]
    with as_if_on_a_gpu(), patch.object(parcels, "_ready", mpi.wait):
        Neighbors(mpi).send_after(column)
    (_, waited), (_, sent) = mpi.done
    assert waited == sent != column.data_ptr()


def test_rows_of_the_host_are_sent_from_where_they_are_without_asking_about_gpus():
    mpi, row = Recorder(), torch.randn(6)
    with patch.object(parcels, "takes_gpu_memory", None):
        Neighbors(mpi).send_after(row)
    assert mpi.done == [("send", row.data_ptr())]


@pytest.mark.parametrize("length", [LARGEST + 1, 2**32, 5 * 2**32 + 12345])
def test_more_bytes_than_a_count_of_mpi_can_say_are_one_item(length):
    kind = _type_of(length)
    assert kind.Get_size() == length and kind.Get_extent() == (0, length)
    assert whole_message(range(length)) == [range(length), 1, kind]
    assert whole_message(range(LARGEST)) == range(LARGEST)


# -- whether MPI takes memory of a GPU ----------------------------------------------------------------------------


def mpich(error, answer):
    def query(kind, place):
        assert kind == 0
        ctypes.cast(place, ctypes.POINTER(ctypes.c_int))[0] = answer
        return error

    return SimpleNamespace(MPIX_GPU_query_support=query, MPIX_Query_cuda_support=lambda: 1 - answer)


#: A library that knows nothing of MPI.
OTHER = ctypes.CDLL(_ctypes.__file__)


def open_mpi(answer, handle=OTHER._handle):
    return SimpleNamespace(MPIX_Query_cuda_support=lambda: answer, _handle=handle)


LIBRARIES = [
    (mpich(MPI.SUCCESS, 1), True),
    (mpich(MPI.SUCCESS, 0), False),
    (mpich(MPI.ERR_ARG, 1), False),
    (open_mpi(1), True),
    (open_mpi(0), False),
    (open_mpi(-1), False),
    (SimpleNamespace(), False),
    (OTHER, False),
]


@pytest.mark.parametrize(("library", "answer"), LIBRARIES)
def test_a_library_is_asked_for_what_it_takes(library, answer):
    assert gpuaware.says_so(library) is answer


def test_what_open_mpi_was_compiled_with_may_be_turned_off():
    library = ctypes.CDLL(MPI.__file__)
    try:
        is_on = ctypes.c_bool.in_dll(library, "opal_cuda_support").value
    except ValueError:
        pytest.skip("an MPI without this variable")
    assert gpuaware.says_so(open_mpi(1, library._handle)) is is_on


def test_the_library_of_this_run_is_asked_once():
    gpuaware.is_gpu_aware.cache_clear()
    with patch.object(gpuaware, "says_so", side_effect=[True]) as asked:
        assert gpuaware.takes_gpu_memory() and gpuaware.takes_gpu_memory()
    assert asked.call_count == 1
    gpuaware.is_gpu_aware.cache_clear()
    assert gpuaware.is_gpu_aware() is gpuaware.says_so(ctypes.CDLL(MPI.__file__))


WORDS = {"0": False, "1": True, "": True, "false": False, "TRUE": True, "no": False, "on": True}


@pytest.fixture
def option():
    yield lambda word: PETSc.Options().setValue(OPTION, word)
    PETSc.Options().delValue(OPTION)


@pytest.mark.parametrize("word", WORDS)
def test_the_option_of_petsc_has_the_last_word(option, word):
    option(word)
    with patch.object(gpuaware, "is_gpu_aware", lambda: not WORDS[word]):
        assert gpuaware.takes_gpu_memory() is WORDS[word]


def test_other_words_are_refused_and_a_run_without_a_gpu_may_have_the_option(option):
    option("maybe")
    assert OPTION not in unread()
    with pytest.raises(InputError, match=r"use_gpu_aware_mpi.*maybe.*true or false"):
        gpuaware.takes_gpu_memory()


# -- on a GPU -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device that PyTorch can use")
@pytest.mark.parametrize("dtype", parallel_messages.DTYPES)
def test_rows_of_a_gpu_in_both_memories(option, dtype):
    rows = torch.arange(12).reshape(3, 4).to("cuda", dtype)
    option("1")
    assert parcels.outgoing(rows).data_ptr() == rows.data_ptr() and parcels.incoming(rows).is_cuda
    option("0")
    own, place = parcels.outgoing(rows), parcels.incoming(rows, (2, 4))
    assert own.is_pinned() and torch.equal(own, rows.cpu()) and place.is_pinned() and place.shape == (2, 4)
    assert torch.equal(parcels.arrived(own, rows), rows)
