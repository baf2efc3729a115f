"""Sphinx configuration. Every warning is an error (``.ci/run``), and the build needs no network."""

from __future__ import annotations

import os
import re
from pathlib import Path

import attrs
import nbformat
from nbclient import NotebookClient

import stagetrio

project = "stagetrio"
author = copyright = "the stagetrio contributors"
release = version = stagetrio.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinxcontrib_trio",
    "myst_parser",  # for design.md, which is read in the repository as much as here
]
source_suffix = {".rst": "restructuredtext", ".md": "markdown"}
exclude_patterns = ["_build"]

# `Name` links where we document it and is plain code where others do. It cannot be an error (nitpicky): the names of
# Trio, attrs and the standard library resolve only by inventories fetched from a network.
default_role = "py:obj"

napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [(section, "returns_style") for section in ("Checkpoints", "Cost", "Source")]

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True

html_theme = "furo"
html_title = f"stagetrio {release}"

_INLINE_SECTION = re.compile(r"(Checkpoints|Cost|Source): (?=\S)")


def _sections_to_fields(app, what, name, obj, options, lines):  # the signature is autodoc's
    """Let ``Checkpoints: text`` stand beside the parameters: a field, as napoleon makes of a section.

    Napoleon takes a section only from a header on a line of its own; ours are mostly one sentence long.
    """
    out: list[str] = []
    in_field = False
    for line in lines:
        if section := _INLINE_SECTION.match(line):
            in_field = True
            out += ["", f":{section[1]}: {line[section.end() :]}"]
        else:
            in_field = in_field and bool(line.strip())
            out.append(f"    {line.strip()}" if in_field else line)
    lines[:] = out


_ATTRS_DEFAULT = re.compile(r"attr_dict\['(\w+)'\]\.default")


def _attrs_defaults(app, what, name, obj, options, signature, returns):  # the signature is autodoc's
    """Show the defaults of attrs classes, and not the expressions of their generated ``__init__``."""
    if signature and attrs.has(obj):
        signature = _ATTRS_DEFAULT.sub(lambda match: repr(getattr(attrs.fields(obj), match[1]).default), signature)
    return signature, returns


def _draw_figures(app):
    """Have the notebook on fairness draw the pictures of its page, where they have not been drawn yet."""
    figures, root = Path(app.srcdir, "figures"), Path(app.srcdir).parent
    if not figures.is_dir():
        os.environ["STAGETRIO_FIGURES"] = str(figures)
        notebook = nbformat.read(root / "notebooks" / "02_fairness.ipynb", as_version=4)
        NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(root)}}).execute()


def setup(app):
    app.connect("builder-inited", _draw_figures)
    app.connect("autodoc-process-signature", _attrs_defaults)
    app.connect("autodoc-process-docstring", _sections_to_fields, priority=900)  # after napoleon
