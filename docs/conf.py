"""Sphinx configuration. Every warning is an error (``.ci/run``), and the build needs no network."""

from __future__ import annotations

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
