"""Programs that stand on a page of the documentation, and what the page says that they print."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from petsc4py import PETSc

from tests.helpers.support import ROOT

RECIPES = ROOT / "docs" / "recipes"

#: A number with sign, decimals and exponent.
NUMBER = re.compile(r"[-+]?\d+(?:\.(\d+))?(?:e([-+]?\d+))?")


def run_program(page: Path) -> tuple[dict[str, Any], str]:
    """Run the blocks of Python on a page, one after the other: their names, and what they printed."""
    names: dict[str, Any] = {"__name__": "recipe"}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), own_options():
        for line, code in blocks(page, "python"):
            exec(compile("\n" * line + code, str(page), "exec", dont_inherit=True), names)
    return names, printed.getvalue()


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """The fenced blocks of a language, each with the number of the line before it."""
    text = page.read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [(text[: match.start(1)].count("\n"), match[1]) for match in found]


@contextlib.contextmanager
def own_options() -> Iterator[None]:
    """PETSc options that are set inside end with it."""
    options = PETSc.Options()
    before = options.getAll()
    try:
        yield
    finally:
        for name in set(options.getAll()) - set(before):
            options.delValue(name)


def assert_printed(page: Path, printed: str) -> None:
    """The page's blocks of text are what was printed; numbers agree up to one unit of their last digit."""
    shown = "".join(code for _, code in blocks(page, "text"))
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", shown).split(), printed
    for expected, found in zip(NUMBER.finditer(shown), NUMBER.finditer(printed)):
        unit = 10.0 ** (int(expected[2] or 0) - len(expected[1] or ""))
        assert abs(float(expected[0]) - float(found[0])) <= 1.01 * unit, printed
