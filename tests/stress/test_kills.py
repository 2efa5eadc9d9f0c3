"""A run that is killed at any instant and restarted ends as one that was left alone: the same numbers, bit for bit."""

import random
import time

import pytest

from tests.helpers.checkpointed import RUNS, differences, has_checkpoints, result, words_of
from tests.helpers.forks import Forks, kill
from tests.helpers.stress import SEED, SHARE, tries


def undisturbed(forks, name, home):
    """Run in one piece: what it found, and the seconds to its first checkpoint and to its end."""
    script, words = words_of(name, long=True)
    home.mkdir()
    begin = time.monotonic()
    run = forks.start(f"problems.{script}", *words, "-summary", "s.json", "-checkpoint", "ck", cwd=home)
    while not (home / "ck").exists() and time.monotonic() < begin + 60 and not (home / "s.json").exists():
        time.sleep(0.005)
    first = time.monotonic() - begin
    forks.wait(run, 200)
    assert run.code in (0, 3), run.err[-500:]
    return result(home / "s.json"), first, time.monotonic() - begin


def killed(forks, name, home, instant):
    """Run, end it so long after its first checkpoint, and restart it; what it found, and whether it was killed."""
    script, words = words_of(name, long=True)
    home.mkdir()
    words += ["-summary", "s.json", "-checkpoint", "ck"]
    run, begin = forks.start(f"problems.{script}", *words, cwd=home), time.monotonic()
    while not (home / "ck").exists() and not (home / "s.json").exists() and time.monotonic() < begin + 60:
        time.sleep(0.002)
    time.sleep(instant)
    was_killed = kill(run)
    forks.wait(run)
    restart = ["-restart", "ck"] if (home / "ck").exists() else []
    if not was_killed or (home / "s.json").exists():
        return result(home / "s.json"), False, bool(restart)
    run = forks.run(f"problems.{script}", *words, *restart, cwd=home, timeout=200)
    assert run.code in (0, 3), f"{run.code} {run.err[-500:]}"
    left = sorted(path.name for path in home.iterdir())
    assert left == ["ck", "s.json"], f"left behind: {left}"
    return result(home / "s.json"), True, bool(restart)


def check_same(name, found, expected):
    """Bit for bit; TAO, which keeps its memory to itself, comes to the same optimum."""
    if "TAO" in name:
        assert found["objective"] == pytest.approx(expected["objective"], rel=1e-4)
    else:
        assert not differences(found, expected), differences(found, expected)[:4]


def share(name):
    """How many of the fifty runs are those of this name."""
    place, count = list(RUNS).index(name), tries(50, 0)
    return count // len(RUNS) + (place < count % len(RUNS))


@pytest.mark.skipif(not SHARE, reason="STRESS=1 kills fifty runs; the tests of checkpoints restart some")
@pytest.mark.parametrize("name", RUNS)
def test_killed_runs_end_as_those_that_are_left_alone(tally, tmp_path, name):
    draw, restarts, count = random.Random(f"{SEED} {name}"), 0, share(name)
    if not (count and has_checkpoints(name)):
        pytest.skip("a larger STRESS kills it" if has_checkpoints(name) else "it writes no checkpoints")
    with Forks(tmp_path) as forks:
        expected, first, end = undisturbed(forks, name, tmp_path / "alone")
        for at in range(count):
            instant = draw.uniform(0.0, 0.8 * (end - first))
            with tally.one(f"{name}, killed {instant:.2f} s after its first checkpoint"):
                for attempt in range(4):  # one that has ended before is killed earlier
                    home = tmp_path / f"{at}.{attempt}"
                    found, was_killed, was_restarted = killed(forks, name, home, instant / 3**attempt)
                    if was_killed:
                        break
                restarts += was_killed and was_restarted
                check_same(name, found, expected)
    tally.check()
    assert restarts >= 0.4 * tally.tried  # the instants are late enough to mean something
