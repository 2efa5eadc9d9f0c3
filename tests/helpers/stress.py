"""How often the stress tests try, and what fell short.

`STRESS=1` asks for the whole number of tries, `STRESS=0.25` for a quarter; without it each test makes the few that a
run of the suite has time for. `STRESS_SEED` draws others.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

SHARE = float(os.environ.get("STRESS", "0"))
SEED = int(os.environ.get("STRESS_SEED", "0"))


def tries(whole: int, quick: int) -> int:
    """How many of `whole` tries this run makes: at least `quick`."""
    return max(quick, round(SHARE * whole))


def many(whole: int, quick: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Hypothesis with this many tries, the same in each run of a seed; what fails is shrunk and shown."""

    hypothesis = pytest.importorskip("hypothesis")

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        drawn = hypothesis.settings(
            max_examples=tries(whole, quick),
            deadline=None,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )(test)
        return hypothesis.seed(SEED)(drawn)

    return decorate


class Tally:
    """Counts the tries of a test, and keeps what fell short until all are made.

    Attributes:
        tried: how many.
        short: what failed, and how.
    """

    def __init__(self) -> None:
        self.tried, self.short = 0, []

    @contextmanager
    def one(self, name: str) -> Iterator[None]:
        """One try: what it raises is noted, and the next one goes on."""
        self.tried += 1
        try:
            yield
        except (Exception, SystemExit, pytest.fail.Exception) as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            said = " ".join(f"{type(error).__name__}: {error}".split())[:600]
            self.short.append(f"{name}: {said} ({where.filename.rsplit('/', 1)[-1]}:{where.lineno})")
            print("SHORT", self.short[-1], flush=True)

    def check(self) -> None:
        """Fail if anything fell short."""
        assert not self.short, f"{len(self.short)} of {self.tried} fell short:\n" + "\n".join(self.short)
