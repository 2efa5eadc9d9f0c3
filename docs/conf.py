"""Sphinx configuration; `make docs` builds into build/docs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "extensions"))
sys.path.insert(0, str(Path(__file__).parents[1]))

import pdeopt

project = "pdeopt"
author = "The pdeopt developers"
copyright = author
version = release = pdeopt.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "doors", "mathml"]
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
html_math_renderer = "mathml"

exclude_patterns = ["package.md"]  # what a package index shows

html_theme = "furo"
html_title = "pdeopt"
html_static_path = ["static"]
html_css_files = ["pdeopt.css"]
html_show_sphinx = False
html_copy_source = False

# The code is written for readers of docstrings, not of Sphinx roles: single backticks are code.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
python_maximum_signature_line_length = 100
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

_sentences = {}


def _keep(app, what, name, obj, options, lines):
    """Before napoleon, which takes what stands before a colon in the comment of an attribute for its type."""
    if what in ("attribute", "data", "property"):
        _sentences[name] = list(lines)


def _mend(app, what, name, obj, options, lines):
    """After napoleon: comments of attributes as they were, and norms |x|, which reStructuredText takes for names."""
    lines[:] = _sentences.pop(name, lines)
    for k, line in enumerate(lines):
        parts = line.split("`")  # odd parts are code
        parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]
        lines[k] = "`".join(parts)


def setup(app):
    app.connect("autodoc-process-docstring", _keep, priority=100)
    app.connect("autodoc-process-docstring", _mend, priority=900)
