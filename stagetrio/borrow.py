"""Tokens of a limiter that others draw from too: taken one by one, given back together.

A `trio.CapacityLimiter` lends one token to one borrower. A loan of several is several borrowers, gathered in turn while
those already had are kept, so that small loans of others cannot starve a large one for ever.
"""

from __future__ import annotations

from typing import Protocol

import trio


class Limiter(Protocol):
    """What `trio.CapacityLimiter` and its look-alikes have in common."""

    @property
    def total_tokens(self) -> float:
        """How many may be borrowed at once."""

    @property
    def available_tokens(self) -> float:
        """How many of them are free; below zero after the total was lowered."""

    def acquire_on_behalf_of_nowait(self, borrower: object) -> None:
        """Borrow one for `borrower`, or raise `trio.WouldBlock`."""

    async def acquire_on_behalf_of(self, borrower: object) -> None:
        """Wait for one."""

    def release_on_behalf_of(self, borrower: object) -> None:
        """Give back what `borrower` has."""


class Loan:
    """`tokens` tokens of `limiter`.

    Args:
        limiter: Whose.
        tokens: How many, ≥ 1.
    """

    __slots__ = ("_borrowers", "limiter", "tokens")

    def __init__(self, limiter: Limiter, tokens: int) -> None:
        self.limiter = limiter
        self.tokens = tokens
        self._borrowers: list[object] = []

    def take_nowait(self) -> bool:
        """Borrow all of them now, or none; say whether it did."""
        if self.limiter.available_tokens < self.tokens:
            return False
        try:
            while len(self._borrowers) < self.tokens:
                borrower = object()
                self.limiter.acquire_on_behalf_of_nowait(borrower)
                self._borrowers.append(borrower)
        except trio.WouldBlock:
            self.give_back(False)
            return False
        return True

    async def take(self) -> None:
        """Wait for all of them.

        Checkpoints: always. A cancelled call has none of them.
        """
        try:
            while len(self._borrowers) < self.tokens:
                borrower = object()
                await self.limiter.acquire_on_behalf_of(borrower)
                self._borrowers.append(borrower)
        except BaseException:
            self.give_back(False)
            raise

    def give_back(self, well: bool) -> None:
        """Give back all there are.

        Args:
            well: Whether they were used for work that succeeded, which is what an adaptive limiter learns from.
        """
        release = self.limiter.release_on_behalf_of
        if not well:
            release = getattr(self.limiter, "forget_on_behalf_of", release)
        while self._borrowers:
            release(self._borrowers.pop())
