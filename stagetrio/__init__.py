"""Structured concurrency for Trio servers that keep their pace."""
