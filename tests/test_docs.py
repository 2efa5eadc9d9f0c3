"""Every Python example of the documentation runs."""

import os
import re

import pytest

from tests.helpers.support import ROOT

PAGES = ["README.md", "docs/guide.md", "docs/networks.md", "docs/optimizers.md", "docs/pinns.md"]


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch):
    """The blocks of a page share their names, as a reader who types them in would."""
    path = ROOT / page
    if not path.exists():
        pytest.skip(f"{page} is not written yet")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "example"}
    text = path.read_text()
    for match in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        line = text[: match.start()].count("\n") + 1
        exec(compile("\n" * line + match[1], os.fspath(path), "exec"), names)
