"""Sphinx configuration; `make docs` builds into build/docs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import pdeopt

project = "pdeopt"
author = "The pdeopt developers"
copyright = author
version = release = pdeopt.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "pdeopt"
html_show_sphinx = False
html_copy_source = False

# The code is written for readers of docstrings, not of Sphinx roles: single backticks are code.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False


def _escape_formulas(app, what, name, obj, options, lines):
    """Docstrings write norms as |x|, which reStructuredText takes for substitutions."""
    for k, line in enumerate(lines):
        parts = line.split("`")  # odd parts are code
        parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]
        lines[k] = "`".join(parts)


def setup(app):
    app.connect("autodoc-process-docstring", _escape_formulas, priority=900)  # after napoleon
