"""One to four ranks find equal numbers, in every script."""

import json
import math

import pytest

from tests.helpers.checkpointed import common
from tests.helpers.on_ranks import RUNS
from tests.helpers.stress import SHARE, tries
from tests.helpers.support import python

#: Sums over ranks are added in another order, which training and nonconvex problems amplify.
TOLERANCE = 1e-6

#: What a summary says of the run itself; why it went in series or not counts by ranks.
OF_RANKS = (
    "ranks",
    "size",
    "processes",
    "message",
    "krylov",
    "summary",
    "bytes",
    "products",
    "solves",
    "costs",
    "serial",
)


def close(a, b, where=""):
    """Where two values differ by more than rounding makes them."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [key for key in sorted({*a, *b}) if not any(word in key for word in OF_RANKS)]
        return [d for key in keys for d in close(a.get(key), b.get(key), f"{where}.{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for number, pair in enumerate(zip(a, b)) for d in close(*pair, f"{where}[{number}]")]
    numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (a, b))
    equal = math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE) if numbers else a == b
    return [] if equal else [f"{where}: {str(a)[:40]} and {str(b)[:40]}"]


@pytest.mark.mpi
@pytest.mark.slow
def test_scripts_find_the_same_on_one_to_four_ranks(tally, tmp_path):
    names, found = list(RUNS)[: tries(len(RUNS), 2)], {}
    for ranks in (1, 2, 3, 4) if SHARE else (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        done = python("-m", "tests.helpers.on_ranks", folder, *names, ranks=ranks, timeout=600)
        for name in names:
            with tally.one(f"mpiexec -n {ranks} python -m problems.{name} {RUNS[name]}"):
                assert (folder / f"{name}.json").exists(), done.stderr[-600:]
                found[name, ranks] = common(json.loads((folder / f"{name}.json").read_text()))
                assert not close(found[name, ranks], found[name, 1]), close(found[name, ranks], found[name, 1])[:4]
    tally.check()
