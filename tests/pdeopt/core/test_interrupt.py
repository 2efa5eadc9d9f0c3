"""Signals wait for the end of an iteration; a second one does not."""

import os
import pickle
import signal
import subprocess
import sys
import threading

import pytest
from mpi4py import MPI

from pdeopt.core.interrupt import Interrupted, interruptible, interruption
from tests.helpers.support import ENVIRONMENT, ROOT

COMM = MPI.COMM_SELF


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_noted_and_forgotten_at_the_end(number, code):
    before = signal.getsignal(number)
    with interruptible():
        assert interruption(COMM) == 0
        os.kill(os.getpid(), number)
        assert interruption(COMM) == number
    assert interruption(COMM) == 0 and signal.getsignal(number) is before
    found = pickle.loads(pickle.dumps(Interrupted(number, "kept")))
    assert found.exit_code == code and str(found) == f"{number.name}: kept"


def test_other_threads_change_nothing():
    before, found = signal.getsignal(signal.SIGTERM), []

    def run():
        with interruptible():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before]


def test_the_second_signal_ends_the_process_at_once():
    program = (
        "import os, signal\n"
        "from pdeopt.core.interrupt import interruptible\n"
        "with interruptible():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('one', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('two', flush=True)\n"
    )
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM and done.stdout == "one\n"
