"""Sphinx configuration; `make docs` builds into build/docs."""

import re
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

napoleon_custom_sections = [("Class arguments", "params_style")]

_sentences = {}


def _prepare(app, what, name, obj, options, lines):
    """Before napoleon: docstrings are written for readers, with examples indented, norms |x| and products a * b.

    An indented block after an empty line becomes a literal block; `|` and `*` elsewhere are no markup. Comments of
    attributes are kept from napoleon, which takes what stands before a colon there for a type.
    """
    out, literal, last = [], None, ""
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if literal is not None and line.strip() and indent < literal:
            literal = None
        if literal is None and line.strip():
            before = len(last) - len(last.lstrip())
            if out and not out[-1].strip() and indent >= before + 4 and not last.lstrip().startswith("-"):
                literal = indent
                out += [] if last.rstrip().endswith("::") else [" " * before + "::", ""]
            else:
                parts = line.split("`")  # odd parts are code
                parts[::2] = [re.sub(r"(?<!\\)([|*])", r"\\\1", part) for part in parts[::2]]
                line = "`".join(parts)
        out.append(line)
        last = line if line.strip() else last
    lines[:] = out
    if what in ("attribute", "data", "property"):
        _sentences[name] = out


def _restore(app, what, name, obj, options, lines):
    """After napoleon: comments of attributes as they were."""
    lines[:] = _sentences.pop(name, lines)


def setup(app):
    app.connect("autodoc-process-docstring", _prepare, priority=100)
    app.connect("autodoc-process-docstring", _restore, priority=900)
