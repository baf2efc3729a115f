"""What is not worth serving any more, or stands where others should: shedding, one item at a time.

Theory of operation
===================

A queue that sheds knows when each item came and until when it is worth serving (`Stamped`), and looks at each before it
is taken. Three things end an item's wait:

- its *deadline* has passed. The sender knows best what its client still waits for.
- *CoDel*: it has waited longer than it may. While its class has been empty within the last ``interval``, a queue is a
  burst that is being worked off, and ``interval`` is what an item may wait. A class that has not been empty for that
  long is overloaded, everybody in it waits, and waiting longer helps nobody: then ``target`` is the limit, and what
  exceeds it is shed, the oldest first, until what is left is fresh. So the work done is done on items whose clients are
  still there. The last item of a class is never shed for its age: shedding must not make a worker idle.
- *eviction*: the queue is full, and a flow that holds less than the longest one sends. The longest flow's newest item
  goes, as if it had been refused in the first place. Classes that are served later give way first, whatever their
  longest flow holds, those that are served before never. Nobody's only item is evicted.

With ``newest_first`` an overloaded class is served from its newest items on (adaptive LIFO): who has just come is
served at once, who has waited long will not be, and is shed after ``interval``.

Fairness comes first: who is next is decided among flows, and only then is the flow's item looked at. A polite flow's
item does not grow old behind a hog's, so it is the hog's items that are shed. Nothing shed is charged to its flow.

Source: Nichols and Jacobson, "Controlling Queue Delay", ACM Queue 2012; the rule for servers from Maurer, "Fail at
Scale", ACM Queue 2015 (Facebook's controlled delay and adaptive LIFO).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Protocol

import attrs
import msgspec

from stagetrio.flow import Delivery, F, Flow, T, check_positive
from stagetrio.intake import now
from stagetrio.longest import Longest

OnShed = Callable[[Any, str], object]


def _check_seconds(_: object, attribute: attrs.Attribute[float], value: float) -> None:
    check_positive(attribute.name, value)


def check_codel(value: CoDel | None) -> None:
    """Raise a `TypeError` that names it unless it says how long items may wait."""
    if value is not None and not isinstance(value, CoDel):
        raise TypeError(f"codel must be a CoDel or None, not {value!r}")


@attrs.frozen
class CoDel:
    """How long items may wait.

    Args:
        target: Seconds an item may wait while its class is overloaded, above 0.
        interval: Seconds it may wait otherwise, and for which the class must not have been empty to be overloaded.
        newest_first: Whether an overloaded class is served from the newest item of each flow on.
    """

    target: float = attrs.field(default=0.005, validator=_check_seconds)
    interval: float = attrs.field(default=0.1, validator=_check_seconds)
    newest_first: bool = False


class Stamped(msgspec.Struct, Generic[T]):
    """An item with what it takes to judge it."""

    item: T
    arrived: float
    deadline: float


def bare(item: Any) -> Any:
    """What was sent, of an item that may be stamped."""
    return item.item if type(item) is Stamped else item


class Class(Protocol):
    """Flows that are overloaded together: the order they are in."""

    @property
    def servable(self) -> int: ...

    def drop(self, record: Flow[Any, Any]) -> Any: ...


class Served(Protocol):
    """The order items are taken from."""

    def head(self) -> Flow[Any, Any] | None: ...

    def take_items(self, max_items: int) -> list[Any]: ...

    def take(self, max_items: int) -> list[Delivery[Any, Any]]: ...


class Sojourn(Generic[F, T]):
    """Stands in front of an order and sheds.

    Args:
        order: The order.
        codel: What holds for a class; None: nothing.
        longest: What finds the longest flow of each class, the class that is served first first, where that gives way
            when the queue is full; empty: none does.
        on_drop: Called when an item has left the queue unserved.
        on_shed: Called with such an item and the reason: ``"deadline"``, ``"sojourn"`` or ``"evicted"``.
    """

    def __init__(
        self,
        order: Served,
        *,
        codel: Callable[[Any], CoDel | None],
        longest: dict[Any, Longest],
        on_drop: Callable[[], None],
        on_shed: OnShed | None,
    ) -> None:
        self._order = order
        self._codel = codel
        self._longest = longest
        self._on_drop = on_drop
        self._on_shed = on_shed
        self._busy_since: dict[Class, float] = {}

    def stamp(self, record: Flow[F, T], item: T, deadline: float) -> Stamped[T]:
        """Return the item as it is to be queued, at once, in its flow."""
        moment = now()
        if not record.order.servable or record.order not in self._busy_since:
            self._busy_since[record.order] = moment
        if self._longest:
            self._longest[record.order].grown(record)
        return Stamped(item, moment, deadline)

    def make_room(self, record: Flow[F, T]) -> bool:
        """Shed an item of the longest flow that gives way to the one that sends, if any does; tell whether one was."""
        for each in reversed(self._longest):
            mine = each is record.order
            longest = self._longest[each].find()
            if longest is not None and (not mine or len(longest) > len(record) + 1):
                self._shed(longest.pop_newest(), "evicted")
                return True
            if mine:
                break
        return False

    def _shed(self, item: Any, reason: str) -> None:
        self._on_drop()
        if self._on_shed is not None:
            self._on_shed(bare(item), reason)

    def clear(self, *, nothing_in_hand: bool = True) -> bool:
        """Shed what is not worth serving until what comes next is; tell whether something comes next.

        Where something is in hand already, tell False instead of shedding: ``on_shed`` may raise, and would lose it.
        """
        while True:
            record = self._order.head()
            if record is None:
                return False
            stamped: Any = record.first
            if type(stamped) is not Stamped:
                return True
            moment = now()
            codel = self._codel(record.order)
            overloaded = codel is not None and moment - self._busy_since[record.order] > codel.interval
            reason = "deadline" if stamped.deadline <= moment else None
            if codel is not None and reason is None:
                limit = codel.target if overloaded and not codel.newest_first else codel.interval
                if moment - stamped.arrived > limit and (record.rest or record.order.servable > 1):
                    reason = "sojourn"
            if reason is not None:
                if not nothing_in_hand:
                    return False
                self._shed(record.order.drop(record), reason)
                continue
            if codel is not None and codel.newest_first and overloaded and record.rest:
                record.newest_first()
                stamped = record.first
                if type(stamped) is Stamped and stamped.deadline <= moment:
                    continue
            return True

    def take_items(self, max_items: int) -> list[T]:
        """Like the order's, of what is worth serving."""
        taken: list[T] = []
        while len(taken) < max_items and self.clear(nothing_in_hand=not taken):
            taken.append(bare(self._order.take_items(1)[0]))
        return taken

    def take(self, max_items: int) -> list[Delivery[F, T]]:
        """Like the order's, of what is worth serving."""
        taken: list[Delivery[F, T]] = []
        while len(taken) < max_items and self.clear(nothing_in_hand=not taken):
            (delivery,) = self._order.take(1)
            delivery.item = bare(delivery.item)
            taken.append(delivery)
        return taken
