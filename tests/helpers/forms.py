"""Weak forms for tests, with a cache of compiled forms that does not depend on the user's home."""

from __future__ import annotations

import os

import pytest

import pdeopt as po
from tests.helpers.support import ROOT

#: Where compiled forms stay for the next run of the tests; what DOLFINx would choose depends on the user's home.
CACHE = ROOT / "build" / "cache"


def import_with_cache():
    """DOLFINx, which reads the folder of its cache once, when it is imported. Skips the test module without it."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(CACHE)
    try:
        pytest.importorskip("dolfinx", reason="weak forms need DOLFINx: make setup-fenicsx")
    finally:
        os.environ.pop("XDG_CACHE_HOME")
        if before is not None:
            os.environ["XDG_CACHE_HOME"] = before


import_with_cache()

from problems.benchmarks.weak_forms import Functions, bump, burgers, heat, interval, klein_gordon  # noqa: E402, F401


def tracking(constraint, target, alpha, nt, T=1.0, comm=None, **others):
    """The problem of a target with the masses of the constraint."""
    objective = po.Tracking(target, others.pop("mass", constraint.state_mass), **others)
    objective += po.ControlCost(alpha, constraint.control_mass)
    return po.ControlProblem(constraint, objective, po.TimeGrid.uniform(nt, T, comm))
