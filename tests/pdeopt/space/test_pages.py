"""The pages on weak forms are true."""

import runpy

from tests.helpers import forms  # noqa: F401 (where DOLFINx is absent it skips this module)
from tests.helpers.pages import run_program
from tests.helpers.support import ROOT


def test_the_example_of_the_page_converges(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, printed = run_program(ROOT / "docs" / "forms.md")
    assert "converged" in printed
    reaction = names["reaction"]
    assert reaction.values(names["problem"].unpack(names["result"])[0]).shape == (16, 17 * 17)


def test_the_example_of_the_readme_is_the_script_and_finds_what_it_says(capsys):
    readme = (ROOT / "README.md").read_text()
    script = (ROOT / "problems" / "reaction_diffusion_forms.py").read_text()
    code = script[script.index("import numpy") :]
    assert code in readme and len(code.splitlines()) <= 30
    runpy.run_module("problems.reaction_diffusion_forms")
    assert capsys.readouterr().out.strip() in readme
