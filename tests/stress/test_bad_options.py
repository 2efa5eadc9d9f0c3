"""Wrong words on the command line of every script: one line, exit code 2, and nothing is written."""

from importlib import import_module

import pytest

import nn_adapters as nna
from pdeopt.core.errors import InputError
from problems.shared.equations import Equation
from tests.helpers.bad_options import drawn
from tests.helpers.forks import Forks
from tests.helpers.scripts import SMALL, fake_dataset
from tests.helpers.stress import SEED, tries

#: What is there before and after.
THERE = "there"

#: Sizes that no machine has memory for, from a command line that is small otherwise.
SIZES = [
    ("burgers", "-nt", "1000000000"),
    ("burgers", "-nx", "99999999999999999999"),
    ("heat", "-nx", "100000000"),
    ("klein_gordon", "-nt", "100000000000"),
    ("box_init", "-depth", "1000000000"),
    ("box_init", "-seeds", "1000000000"),
    ("function_regression", "-depth", "1000000000"),
    ("pinn_burgers", "-points", "1000000000"),
    ("pinn_burgers", "-point_levels", "1000"),
    ("mnist", "-channels", "100000000"),
    ("peaks", "-nested", "100000"),
    ("peaks", "-layers", "10000000000"),
    ("logistic", "-samples", "10000000000"),
    ("har_gru", "-hidden", "100000000"),
    ("transformer", "-hidden", "100000000000"),
    ("video_gru", "-videos", "10000000000"),
    ("resnet_multilevel", "-width", "1000000000"),
]


def one_line(text):
    assert len(text.strip().splitlines()) == 1 and "Traceback" not in text, text[-600:]


def untouched(folder):
    left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    assert left == [THERE], f"left behind: {left}"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with one folder in it."""
    (tmp_path / "work" / THERE).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def test_wrong_words_are_refused_in_one_line(tally, folder, monkeypatch, capfd):
    """In this process, which is fast: `InputError` becomes exit code 2 in one place, as the next test shows."""
    monkeypatch.setattr(nna, "load_dataset", fake_dataset)
    monkeypatch.setattr(Equation, "relative_error", lambda *arguments: 1.0)
    for script, words in drawn(folder / THERE, tries(350, 20), SEED):
        with tally.one(f"python -m problems.{script} {' '.join(words)}"):
            with pytest.raises(InputError) as caught:
                import_module(f"problems.{script}").main(words)
            one_line(str(caught.value))
            untouched(folder)
    tally.check()


@pytest.mark.parametrize("kind", ["words", pytest.param("sizes", marks=pytest.mark.slow)])
def test_processes_end_with_exit_code_2(tally, tmp_path, kind):
    cases = (
        [(script, [*SMALL[script], option, value]) for script, option, value in SIZES]
        if kind == "sizes"
        else list(drawn("/tmp", 350 + tries(50, 2), SEED))[350:]
    )
    if kind == "sizes":
        cases = cases[: tries(len(SIZES), 1)]
    with Forks(tmp_path) as forks:
        for number, (script, words) in enumerate(cases):
            with tally.one(f"python -m problems.{script} {' '.join(words)}"):
                home = tmp_path / str(number)
                (home / THERE).mkdir(parents=True)
                done = forks.run(f"problems.{script}", *words, cwd=home, timeout=180)
                assert done.code == 2, (done.code, done.out[-200:], done.err[-300:])
                one_line(done.err)
                assert not done.out, done.out
                untouched(home)
    tally.check()
