"""Programs as users write them, each in an interpreter of its own: PETSc starts once in a process."""

import subprocess
import sys

import pytest

from tests.helpers.support import ROOT

READ = """
from dataclasses import dataclass
from pdeopt.core import Settings, read, setting

@dataclass(frozen=True)
class Mine(Settings, prefix="mine_"):
    number: int = setting(8, "a number")
    size: int = setting(0, "another one")
"""
INIT = "import sys, petsc4py; petsc4py.init(sys.argv)\n"
SHOW = "print(read(Mine).number, read(Mine).size)\n"


@pytest.mark.parametrize(
    ("program", "values", "warnings"),
    [(INIT + READ + SHOW, "3 -2", 0), (READ + INIT + SHOW, "3 -2", 0), (READ + SHOW, "8 0", 1)],
    ids=["init first", "init later", "no init"],
)
def test_options_count_or_are_warned_of(program, values, warnings, tmp_path):
    script = tmp_path / "program.py"
    script.write_text(program)
    words = [sys.executable, str(script), "-mine_number", "3", "-mine_size", "-2"]
    ended = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert ended.stdout.strip() == values, ended.stderr
    assert ended.stderr.count("are not read: call petsc4py.init") == warnings


@pytest.mark.parametrize("program", [INIT + READ, READ + INIT], ids=["init first", "init later"])
def test_the_name_of_a_program_without_a_file_is_no_option(program):
    """Of `python -c` the first word is -c."""
    check = "from pdeopt.core import require_all_read\nrequire_all_read()\nprint('done')\n"
    words = [sys.executable, "-c", program + SHOW + check, "-mine_number", "3", "-mine_size", "1"]
    ended = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert ended.stdout.split()[:3] == ["3", "1", "done"], ended.stderr  # newer versions of PETSc say that -c is left
