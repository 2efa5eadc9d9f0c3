"""Many short runs of scripts: a server that has imported what is slow forks a process for each.

A forked process runs `python -m MODULE words...` from its beginning, with its own PETSc and MPI: only PyTorch, SciPy
and the like are there already, which takes five of the six seconds of a start.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

#: What is imported once: nothing that starts MPI or PETSc, which each process does for itself.
SLOW = ("numpy", "scipy.sparse.linalg", "scipy.io", "torch", "torch.func", "safetensors", "skfem", "meshio", "sklearn")
SLOW += ("sklearn.datasets", "matplotlib.figure", "torch.fx.experimental.symbolic_shapes", "torch._dynamo")


@dataclass
class Run:
    """A process that the server has started.

    Attributes:
        pid: to kill it by.
        code: its exit status, negative for a signal; None while it runs.
        out, err: what it has printed, once it has ended.
    """

    pid: int
    files: tuple[Path, Path]
    code: int | None = None

    @property
    def out(self) -> str:
        return self.files[0].read_text(errors="replace")

    @property
    def err(self) -> str:
        return self.files[1].read_text(errors="replace")


class Forks:
    """The server and its processes; use as a context.

    Args:
        folder: where they write what they print.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0

    def __enter__(self) -> Forks:
        from tests.helpers.support import environment  # starts PETSc: not in the server

        words = [sys.executable, "-m", "tests.helpers.forks"]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.server = subprocess.Popen(words, cwd=ROOT, env=environment(), **pipes)  # type: ignore[call-overload]
        assert self._ask({"ready": True})
        return self

    def __exit__(self, *error: object) -> None:
        self.server.stdin.close()
        self.server.wait(timeout=30)

    def start(self, module: str, *words: object, cwd: Path | None = None) -> Run:
        """Start `python -m module words...` in a folder, by default one of its own."""
        self.count += 1
        home = cwd or self.folder / f"run{self.count}"
        home.mkdir(exist_ok=True)
        files = self.folder / f"{self.count}.out", self.folder / f"{self.count}.err"
        request = {"module": module, "words": [str(word) for word in words], "cwd": str(home)}
        pid = self._ask(request | {"files": [str(file) for file in files]})
        return Run(pid, files)

    def wait(self, run: Run, timeout: float = 120.0) -> Run:
        """Wait for the end; a process that takes longer is killed, and `TimeoutError` raised."""
        run.code = self._ask({"wait": run.pid, "timeout": timeout})
        if run.code is None:
            raise TimeoutError(f"{timeout} s: {run.err[-300:]}")
        return run

    def run(self, module: str, *words: object, cwd: Path | None = None, timeout: float = 120.0) -> Run:
        """Start and wait."""
        return self.wait(self.start(module, *words, cwd=cwd), timeout)

    def _ask(self, request: dict[str, Any]) -> Any:
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())


def kill(run: Run) -> bool:
    """End a process as a power failure does; false if it has ended before."""
    try:
        os.kill(run.pid, signal.SIGKILL)
        return True
    except ProcessLookupError:
        return False


# -- the server ----------------------------------------------------------------------------------------------


def serve() -> None:
    """Answer requests until the input ends; a forked process returns from here to run its module."""
    import_slow()
    answers = os.fdopen(os.dup(1), "w")  # before a child takes the standard output for its own
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = _wait(request["wait"], request["timeout"])
        elif "ready" in request:
            answer = True
        else:
            answer = os.fork()
            if answer == 0:
                answers.close()
                _become(**request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def import_slow() -> None:
    """Import what is slow, as far as it is installed."""
    for name in SLOW:
        with contextlib.suppress(ImportError):
            __import__(name)


def _wait(pid: int, timeout: float) -> int | None:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def _become(module: str, words: list[str], cwd: str, files: list[str]) -> None:
    """Be `python -m module words...`; ends the process."""
    for stream, file in zip((1, 2), files):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.path.insert(0, str(ROOT))
    os.chdir(cwd)
    sys.argv = ["-m", *words]  # as Python has it while it looks for the module
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    raise SystemExit(0)


if __name__ == "__main__":
    serve()
