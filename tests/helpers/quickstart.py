"""Starts of processes that cost a tenth: a server that has imported what is slow forks each of them.

`python shim.py SOCKET words...` is `python words...`, for words that begin with -m or -c: the server gives a process
the shim's environment, folder, streams and cores, and what ties it to an mpiexec of MPICH, so that mpiexec may start
shims as it starts any program. What is there already is PyTorch, SciPy and the like; MPI and PETSc start in each
process. A shim ends as its process does, and a process is killed where its shim is.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.helpers.forks import ROOT, import_slow

# -- for the tests ---------------------------------------------------------------------------------------------


@functools.cache
def quick_python() -> list[str]:
    """The words that stand for `python`; the first call starts the server, which ends with this process."""
    from tests.helpers.support import environment  # starts PETSc: not in the server

    folder = tempfile.TemporaryDirectory(prefix="pdeopt")
    address = os.path.join(folder.name, "socket")
    words = [sys.executable, "-m", "tests.helpers.quickstart", address]
    server = subprocess.Popen(words, cwd=ROOT, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    for last in (folder.cleanup, server.wait, server.stdin.close):  # called from the end of this list
        atexit.register(last)
    assert server.stdout.readline() == b"ready\n"
    return [sys.executable, "-S", str(Path(__file__).with_name("shim.py")), address]


# -- the server ------------------------------------------------------------------------------------------------


def serve(address: str) -> None:
    """Fork for each shim until the input ends; a forked process returns from here to run its program."""
    import_slow()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for keepers
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        print("ready", flush=True)
        while sys.stdin not in select.select([sys.stdin, listener], [], [])[0]:
            shim = listener.accept()[0]
            if os.fork() == 0:
                listener.close()
                return keep(shim)
            shim.close()


def keep(shim: socket.socket) -> None:
    """Fork the process of a shim; end it with the shim, and the shim with it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, streams, *_ = socket.recv_fds(shim, 1 << 20, 4)
    pid = os.fork()
    if pid == 0:
        shim.close()
        return become(streams, **json.loads(message))
    ready = select.select([os.pidfd_open(pid), shim], [], [])[0]
    if shim in ready:  # it has nothing more to say: it was killed
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        shim.sendall(str(code).encode())
    finally:
        os._exit(0)


def become(streams: list[int], words: list[str], folder: str, environment: dict[str, str], cores: list[int]) -> None:
    """Be `python words...`."""
    for number, stream in enumerate(streams[:3]):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(environment)
    if "PMI_FD" in environment:
        os.environ["PMI_FD"] = str(streams[3])
    os.chdir(folder)
    os.sched_setaffinity(0, cores)
    kind, program, *rest = words
    sys.argv = [kind, *rest]  # as Python has it while it looks for the module
    if kind == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    raise SystemExit(0)


if __name__ == "__main__":
    serve(sys.argv[1])
