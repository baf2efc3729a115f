"""Tokens of a limiter that others draw from too: taken one by one, given back together.

Theory of operation. A `trio.CapacityLimiter` lends one token to one borrower, so a loan of several is several
borrowers, gathered in turn while those already had are kept: small loans of others cannot starve a large one. Two that
gather from one limiter at once could each hold what the other waits for. So each borrower knows its loan, a gatherer
looks for another one among the limiter's borrowers before it keeps a part, and gives way until that one is done.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Protocol

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

    def statistics(self) -> Any:
        """Something whose ``borrowers`` is a list of those who have one."""


class _Part:
    """The borrower of one token of a loan."""

    __slots__ = ("loan",)

    def __init__(self, loan: Loan) -> None:
        self.loan = loan


class Loan:
    """`tokens` tokens of `limiter`.

    Args:
        limiter: Whose.
        tokens: How many, ≥ 1.
    """

    __slots__ = ("_gathered", "_parts", "limiter", "tokens")

    def __init__(self, limiter: Limiter, tokens: int) -> None:
        self.limiter = limiter
        self.tokens = tokens
        self._parts: list[_Part] = []
        self._gathered: trio.Event | None = None  # while it gathers

    def take_nowait(self) -> bool:
        """Borrow all of them now, or none; say whether it did."""
        if self.limiter.available_tokens < self.tokens:
            return False
        try:
            while len(self._parts) < self.tokens:
                part = _Part(self)
                self.limiter.acquire_on_behalf_of_nowait(part)
                self._parts.append(part)
        except trio.WouldBlock:
            self.give_back(False)
            return False
        return True

    async def take(self) -> None:
        """Wait for all of them.

        Checkpoints: always. A cancelled call has none of them.
        """
        try:
            await self._take_part()
            if self.tokens > 1:
                await self._gather()
        except BaseException:
            self.give_back(False)
            raise

    async def _take_part(self) -> None:
        part = _Part(self)
        await self.limiter.acquire_on_behalf_of(part)
        self._parts.append(part)

    async def _gather(self) -> None:
        while (other := self._other_gatherer()) is not None:
            self.give_back(False)
            await other.wait()
            await self._take_part()
        self._gathered = trio.Event()
        try:
            while len(self._parts) < self.tokens:
                await self._take_part()
        finally:
            self._gathered.set()
            self._gathered = None

    def _other_gatherer(self) -> trio.Event | None:
        for borrower in self.limiter.statistics().borrowers:
            if isinstance(borrower, _Part) and borrower.loan._gathered is not None:
                return borrower.loan._gathered
        return None

    def give_back(self, well: bool) -> None:
        """Give back all there are.

        Args:
            well: Whether they were used for work that succeeded, which is what an adaptive limiter learns from.
        """
        release = self.limiter.release_on_behalf_of
        if not well:
            release = getattr(self.limiter, "forget_on_behalf_of", release)
        while self._parts:
            release(self._parts.pop())


class Lending:
    """The loans of one limiter, each by the name of what it is for.

    Args:
        limiter: Whose.
    """

    def __init__(self, limiter: Limiter) -> None:
        self.limiter = limiter
        self.held = 0
        """Tokens lent."""
        self._loans: dict[Hashable, Loan] = {}

    def take_nowait(self, name: Hashable, tokens: int) -> bool:
        """Lend `tokens` now, or none; say whether it did."""
        loan = Loan(self.limiter, tokens)
        if not loan.take_nowait():
            return False
        self._note(name, loan)
        return True

    async def take(self, name: Hashable, tokens: int) -> None:
        """Wait until `tokens` are lent.

        Checkpoints: always. A cancelled call has lent none.
        """
        loan = Loan(self.limiter, tokens)
        await loan.take()
        self._note(name, loan)

    def give_back(self, name: Hashable, well: bool) -> None:
        """Give back what was lent for `name`; `well` as for `Loan.give_back`."""
        loan = self._loans.pop(name)
        self.held -= loan.tokens
        loan.give_back(well)

    def _note(self, name: Hashable, loan: Loan) -> None:
        self._loans[name] = loan
        self.held += loan.tokens
