"""The documentation is true: its examples run, its links lead somewhere, and the picture of the rooms is current."""

import os
import re
import runpy
import sys
from importlib import import_module
from importlib.util import find_spec

import pytest

from tests.helpers.support import ROOT

EXAMPLES = [
    "README.md",
    "docs/guide.md",
    "docs/compression.md",
    "docs/deepxde.md",
    "docs/kernels.md",
    "docs/large_batch.md",
    "docs/least_squares.md",
    "docs/networks.md",
    "docs/optimizers.md",
    "docs/package.md",
    "docs/parallel_training.md",
    "docs/pinns.md",
    "docs/splitting.md",
]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def without_code(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def links(text):
    """(text, target) of every link and picture that stays in the checkout."""
    found = re.findall(r"\[((?:[^][]|\[[^][]*\])*)\]\(([^)\s]+)\)", without_code(text))
    return [(words, target) for words, target in found if "://" not in target]


def anchors(text):
    """The anchors of a page's headings, as GitHub and MyST make them."""
    titles = re.findall(r"^#+ (.*)$", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", EXAMPLES)
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch):
    """The blocks of a page share their names, as a reader who types them in would."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [page])  # the command line of pytest is not that of the page
    names = {"__name__": "example"}
    text = (ROOT / page).read_text()
    for match in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if "dolfinx" in match[1]:  # tests/pdeopt/space runs it, where DOLFINx is installed
            continue
        line = text[: match.start()].count("\n") + 1
        exec(compile("\n" * line + match[1], os.fspath(ROOT / page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page):
    for words, target in links(page.read_text()):
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text()), target
        if path.suffix == ".py" and (symbol := re.fullmatch(r"`(\w+)`", words)):
            is_module = symbol[1] == path.stem
            assert is_module or re.search(rf"^\s*(def|class) {symbol[1]}\b", path.read_text(), re.MULTILINE), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_name_of_the_library_exists(page):
    """Of those in full, as pdeopt.optimize.SPQN."""
    for name in set(re.findall(r"\b(?:pdeopt|nn_adapters)(?:\.[a-zA-Z_]\w*)+", without_code(page.read_text()))):
        module, _, symbol = name.rpartition(".")
        assert hasattr(import_module(module), symbol) or find_spec(name), name


def test_a_package_index_shows_no_link_into_the_checkout():
    """The long description is read where there is no checkout."""
    name = re.search(r"^long_description = file: (.*)$", (ROOT / "setup.cfg").read_text(), re.MULTILINE)[1]
    assert not links((ROOT / name).read_text())


def test_the_picture_of_the_rooms_is_current():
    drawn = runpy.run_path(os.fspath(ROOT / "docs" / "rooms.py"))
    assert drawn["PICTURE"].read_text() == drawn["picture"](), "run python docs/rooms.py"


def test_the_table_of_rooms_is_complete():
    rooms = runpy.run_path(os.fspath(ROOT / "docs" / "rooms.py"))["ROOMS"]
    table = re.findall(r"^\| `([a-z_/]+)/` \|", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    assert sorted(table) == sorted(name for rooms_of in rooms.values() for name in rooms_of)
