"""What is arranged for several ranks, seen from one process; tests/test_mpi.py has the ranks."""

import os
import subprocess
import sys
import threading

import pytest

from pdeopt.core.ranks import abort_ranks_on_error, leave
from tests.helpers.support import ROOT


def hooks():
    return sys.excepthook, threading.excepthook, SystemExit.code


def test_what_is_arranged_is_taken_back():
    before = hooks()
    abort_ranks_on_error()
    try:
        assert all(own is not other for own, other in zip(hooks(), before))
        for code in (None, 0, 3, "words"):
            with pytest.raises(SystemExit) as left:
                sys.exit(code)
            assert left.value.code == code
    finally:
        abort_ranks_on_error(False)
    assert hooks() == before


def test_a_script_of_one_process_leaves_with_code_and_text(capfd):
    with pytest.raises(SystemExit) as left:
        leave(2, "error: of the user\n")
    assert left.value.code == 2 and capfd.readouterr().err == "error: of the user\n"


@pytest.mark.parametrize(
    "words, code, last",
    [
        ("sys.exit(3)", 3, ""),
        ("raise SystemExit('enough')", 1, "enough"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
        ("sys.exit()", 0, ""),
    ],
)
def test_one_process_ends_as_python_does(words, code, last):
    """By hand, and without MPI."""
    program = f"import sys; from pdeopt.core.ranks import abort_ranks_on_error; abort_ranks_on_error(); {words}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code
    assert done.stderr.strip().split("\n")[-1] == last


@pytest.mark.parametrize("value, watched", [("1", True), ("0", False)])
def test_a_launcher_is_noticed_and_the_environment_may_forbid(value, watched):
    program = "import sys, pdeopt; print(sys.excepthook is not sys.__excepthook__)"
    environment = os.environ | {"PMI_SIZE": "2", "PDEOPT_ABORT_RANKS": value, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(watched), done.stderr
