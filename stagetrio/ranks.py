"""Flows filed under their tags, so that the least tag is found first.

Flows with equal tags stand in one bucket, first come, first served; a heap holds the distinct tags. Where costs are
equal the tags coincide, and serving costs no heap operation at all; where they all differ it costs one push and one
pop of a float, which is less than what a heap of tuples costs.

Nothing is removed from the middle. A member that is filed anew or leaves has another ``filed`` or ``rank`` from then
on, and its old place is recognised as stale when it is reached; `Rank.sweep` drops the stale places when the owner
finds that there may be too many.
"""

from __future__ import annotations

import math
from heapq import heapify, heappop, heappush
from typing import Any, Generic, Protocol, TypeVar


class Member(Protocol):
    """What a rank asks of its members."""

    filed: float | None
    """The tag under which it is filed; None: it is not."""
    rank: Any
    """The rank in which it is filed, or will be."""


M = TypeVar("M", bound=Member)


class Rank(Generic[M]):
    """{tag: members, first come first}, a heap of the tags, and the bucket in service, which is in neither.

    Args:
        cost: What an item of a member costs, about; for the owner to compare ranks by.
    """

    __slots__ = ("bucket", "buckets", "cost", "high", "listed", "low", "next", "tag", "tags")

    def __init__(self, cost: float) -> None:
        self.cost = cost
        self.low, self.high = cost / 2, cost * 2  # for the owner: whose members' items cost this much stay
        self.listed = False  # for the owner: whether it is among those that may have members
        self.buckets: dict[float, list[M]] = {}
        self.tags: list[float] = []
        self.bucket: list[M] = []  # in service: taken out of buckets, served up to next
        self.next = 0
        self.tag = -math.inf

    def file(self, record: M, tag: float) -> list[M]:
        """Put a member behind those of its tag; return their bucket, good until something else is called."""
        record.filed = tag
        if tag == self.tag:
            self.bucket.append(record)
            return self.bucket
        if tag < self.tag:
            self.put_back()
        bucket = self.buckets.get(tag)
        if bucket is None:
            bucket = self.buckets[tag] = [record]
            heappush(self.tags, tag)
        else:
            bucket.append(record)
        return bucket

    def put_back(self) -> None:
        """Take no bucket to be in service."""
        rest = self.bucket[self.next :]
        if self.tag in self.buckets:
            self.buckets[self.tag][:0] = rest
        elif rest:
            self.buckets[self.tag] = rest
            heappush(self.tags, self.tag)
        self.bucket, self.next, self.tag = [], 0, -math.inf

    def first(self) -> M | None:
        """Return the member with the least tag, which `tag` then is; None when there is none."""
        while True:
            bucket, tag = self.bucket, self.tag
            while self.next < len(bucket):
                record = bucket[self.next]
                if record.filed == tag and record.rank is self:
                    return record
                self.next += 1  # a stale place
            if not self.tags:
                return None
            self.advance()

    def trim(self) -> None:
        """Forget the members that were served, since newcomers may keep one bucket going for ever."""
        if self.next >= 1024:
            del self.bucket[: self.next]
            self.next = 0

    def advance(self) -> None:
        """Take the bucket with the least tag, which there must be, into service."""
        self.tag = heappop(self.tags)
        self.bucket = self.buckets.pop(self.tag)
        self.next = 0

    def sweep(self) -> None:
        """Drop the stale places."""
        self.put_back()
        kept = ((tag, [r for r in b if r.filed == tag and r.rank is self]) for tag, b in self.buckets.items())
        self.buckets = {tag: bucket for tag, bucket in kept if bucket}
        self.tags = list(self.buckets)
        heapify(self.tags)
