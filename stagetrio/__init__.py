"""Structured concurrency for Trio servers that keep their pace."""

from __future__ import annotations

__version__ = "0.1.0"
