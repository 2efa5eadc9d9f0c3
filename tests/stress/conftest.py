"""A tally for each stress test, and the table that all of them make."""

import pytest

from tests.helpers.stress import Tally


@pytest.fixture
def tally():
    """Counts the tries of a test; `tally.check()` fails if one fell short."""
    return Tally()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item, call):
    if call.when == "call" and "tally" in item.funcargs:
        found = item.funcargs["tally"]
        item.user_properties.append(("stress", (found.tried, max(len(found.short), int(call.excinfo is not None)))))


def pytest_terminal_summary(terminalreporter):
    rows = [
        (report.nodeid.split("::")[-1], *value, report.duration)
        for kind in ("passed", "failed")
        for report in terminalreporter.stats.get(kind, [])
        if report.when == "call"
        for name, value in report.user_properties
        if name == "stress"
    ]
    if rows:
        terminalreporter.section("what was tried, how many, how many fell short, seconds")
        for name, tried, short, seconds in sorted(rows):
            terminalreporter.write_line(f"{name:70} {tried:5} {short:5} {seconds:8.1f}")
