"""Sphinx configuration. Every warning is an error (``.ci/run``), and the build needs no network."""

from __future__ import annotations

import tomllib
from pathlib import Path

with (Path(__file__).parent.parent / "pyproject.toml").open("rb") as _file:
    _project = tomllib.load(_file)["project"]

project = "stagetrio"
author = copyright = "the stagetrio contributors"
release = version = _project["version"]

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
