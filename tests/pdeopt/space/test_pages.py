"""The pages on weak forms are true."""

from tests.helpers import forms  # noqa: F401 (where DOLFINx is absent it skips this module)
from tests.helpers.pages import run_program
from tests.helpers.support import ROOT


def test_the_example_of_the_page_converges(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, printed = run_program(ROOT / "docs" / "forms.md")
    assert "converged" in printed
    reaction = names["reaction"]
    assert reaction.values(names["problem"].unpack(names["result"])[0]).shape == (16, 17 * 17)
