"""What is kept of one flow, and what is handed out of it.

A flow's items are ``first`` and then ``rest``, so that a flow with one item at a time needs no container, and items of
cost 1.0, which is what most have, no second one for their costs.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Iterable
from typing import Any, Generic, Protocol, TypeVar

import msgspec

F = TypeVar("F", bound=Hashable)
T = TypeVar("T")

LEAST, MOST = 1e-60, 1e60  # of a cost or a weight: with these no product of the reckoning leaves the floats

EMPTY: Any = object()
"""What `Flow.first` is while the flow has no item."""


def check_positive(name: str, value: float) -> float:
    """Return ``value``, or raise a `TypeError` or `ValueError` that names it unless it is above 0 and in range."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be finite and above 0, not {value!r}")
    if not LEAST <= value <= MOST:
        raise ValueError(f"{name} must be between {LEAST} and {MOST}, not {value!r}")
    return value


def check_actual(value: float) -> None:
    """Raise a `ValueError` that names it unless it can be what something has cost."""
    if not 0 <= value <= MOST:
        raise ValueError(f"actual must be finite and at least 0, and at most {MOST}, not {value!r}")


class Flow(Generic[F, T]):
    """The record of one flow; 300 bytes while it is idle.

    Args:
        key: Who it is.
        weight: Its share relative to the others', above 0.
        order: The order it takes part in.
        start: The tag it begins with.
        rank: The rank it begins in.
    """

    __slots__ = (
        *("key", "weight", "inverse", "order", "first", "rest", "costs", "finish", "reserved", "in_hand"),
        *("filed", "rank", "rate", "spread", "held", "pins", "waiters"),
    )

    def __init__(self, key: F, weight: float, order: Any, start: float, rank: Any) -> None:
        self.key = key
        self.weight = weight
        self.inverse = 1.0 / weight
        self.order = order
        self.first: T = EMPTY
        self.rest: deque[T] | None = None
        self.costs: deque[float] | None = None  # of all items; None: 1.0 each
        self.finish = start  # normalised work booked
        self.reserved = 0.0  # normalised estimates of what is in hand
        self.in_hand = 0
        self.filed: float | None = None  # the tag under which it is filed; None: it is not
        self.rank = rank  # where it is filed, or will be
        self.rate = self.spread = 0.0  # settled cost per declared unit, mean and mean deviation; 0: nothing settled yet
        self.held = 0
        self.pins = 0  # channels that hold on to this record
        self.waiters: Any = None  # whatever the owner of the order keeps here; the record is not forgotten meanwhile

    def __len__(self) -> int:
        return (self.first is not EMPTY) + (len(self.rest) if self.rest else 0)

    def __bool__(self) -> bool:
        return True

    def append(self, item: T, cost: float) -> None:
        """Add an item behind the first, which there must be."""
        if self.costs is not None:
            self.costs.append(cost)
        elif cost != 1.0:
            self.costs = deque([1.0] * len(self))
            self.costs.append(cost)
        if self.rest is None:
            self.rest = deque()
        self.rest.append(item)

    def extend(self, items: Iterable[T]) -> None:
        """Add items of cost 1.0 behind the first, where there are none of another cost."""
        if self.rest is None:
            self.rest = deque(items)
        else:
            self.rest.extend(items)

    def pop_newest(self) -> T:
        """Remove the newest item, which must not be the only one."""
        assert self.rest
        if self.costs is not None:
            self.costs.pop()
        return self.rest.pop()

    def newest_first(self) -> None:
        """Let the newest item be served next; the others keep their order."""
        if self.rest:
            self.rest.appendleft(self.first)
            self.first = self.rest.pop()
            if self.costs is not None:
                self.costs.rotate(1)

    def pop_oldest(self) -> T:
        """Remove the oldest item, which must not be the only one."""
        assert self.rest
        item, self.first = self.first, self.rest.popleft()
        if self.costs is not None:
            self.costs.popleft()
        return item

    def items(self) -> list[T]:
        """Its items, oldest first."""
        return [] if self.first is EMPTY else [self.first, *(self.rest or ())]


class Books(Protocol):
    """Where deliveries are settled."""

    abandoned: deque[tuple[Flow[Any, Any], float, float]]

    def settle(self, record: Flow[Any, Any], declared: float, estimate: float, actual: float) -> None: ...


class Delivery(msgspec.Struct, Generic[F, T], eq=False):
    """One item in hand, whose true cost is still to be told.

    Attributes:
        flow: Whose item it is.
        item: What was sent.
        declared: The cost its sender gave.
    """

    flow: F
    item: T
    declared: float
    _estimate: float
    _record: Flow[F, T]
    _books: Books | None

    def __repr__(self) -> str:
        return f"<Delivery of {self.item!r} from {self.flow!r}>"

    def settle(self, actual: float) -> None:
        """Book what the item has cost, in the unit of the queue.

        Only the first call counts; later ones do nothing, so that a ``finally`` may settle what was settled already. A
        delivery that is dropped without it is booked at its estimate.

        Args:
            actual: The cost, finite and ≥ 0.

        Raises:
            ValueError: ``actual`` is negative or not finite.
        """
        books = self._books
        if books is not None:
            check_actual(actual)
            self._books = None
            books.settle(self._record, self.declared, self._estimate, actual)

    def __del__(self) -> None:
        books = self._books
        if books is not None:
            books.abandoned.append((self._record, self.declared, self._estimate))
