"""A shared value that changes in versions: read without a lock, written atomically, awaited without a poll.

State that many tasks read and few write (a routing table, a configuration, the players in an arena) needs neither a
lock around every read nor a copy for every reader, if it is a value that is replaced and never altered in place.

Theory of operation. The whole state is one frozen `View`, and a change replaces it in one assignment: whoever holds a
view holds a value and a version that belong together, forever. Writers compute the next value *outside* any lock and
then replace the view they started from, if it still is the current one; otherwise they start over with the newer
one. So no lock is ever held while a caller's code runs: a thread that takes its time cannot hold up the event loop,
one that raises changes nothing, and at every moment one of the contending writers succeeds. The price is that a
writer's function may be called more than once. (A writer that kept a lock around it would run it once, and stop the
loop for as long as a thread's function takes.)

Waiting. Tasks that wait stand in one parking lot per Trio run, and the lot is entered into ``_lots`` under the lock
that writers take to replace the view. Hence a change either precedes the waiter's look at the version or finds its
lot. A change in the waiter's own run unparks the lot at once; one made in another thread asks that run to unpark it by
an idempotent ``run_sync_soon``, so any number of changes by threads costs one wake-up of the loop until it has run.
A lot is dropped with its last waiter, by the waiter itself; nothing is left behind for a run that has ended.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import attrs
import trio

from stagetrio.amounts import check_count

T = TypeVar("T")


@attrs.frozen
class View(Generic[T]):
    """A value with the version it has: one consistent reading of a `Snapshot`.

    Args:
        version: 0 for the value the snapshot was made with, one more with each change.
        value: the value; not to be altered in place.
    """

    version: int
    value: T


@attrs.frozen
class SnapshotStatistics:
    """What a snapshot has seen.

    Args:
        version: changes so far.
        waiting: tasks in `Snapshot.wait_changed`.
        conflicts: times a writer found, when about to replace the view, that another had come first.
    """

    version: int
    waiting: int
    conflicts: int


class Snapshot(Generic[T]):
    """A value shared by tasks and threads, replaced as a whole.

    Every method but `wait_changed` may be called from any thread, inside Trio or not.

    Args:
        value: the first value, version 0. Use immutable ones (frozen attrs classes, tuples, frozensets): what is
            altered in place is altered for everyone, without a version.

    Cost: reading is an attribute access; an update is its function plus about half a microsecond.
    Source: Clojure's atoms (``swap!``, ``compare-and-set!``).
    """

    def __init__(self, value: T) -> None:
        self._view = View(0, value)
        self._lock = threading.Lock()  # held for a few assignments, never while a caller's code runs
        self._lots: dict[trio.lowlevel.TrioToken, trio.lowlevel.ParkingLot] = {}
        self._conflicts = 0

    @property
    def value(self) -> T:
        """The current value."""
        return self._view.value

    @property
    def version(self) -> int:
        """The current version."""
        return self._view.version

    @property
    def view(self) -> View[T]:
        """The current value and version, of the same moment."""
        return self._view

    def update(self, fn: Callable[[T], T]) -> View[T]:
        """Replace the value by ``fn(value)``, as one step: no other writer comes in between.

        Args:
            fn: makes the next value of the current one. It is called again, with the newer value, when another writer
                came first: it must have no effects, and should be short beside the time between other writers' changes.
                What it raises is raised here, and nothing has changed.

        Returns:
            What is current now: the new value and its version.
        """
        while True:
            seen = self._view
            made = View(seen.version + 1, fn(seen.value))
            if self._replace(seen, made):
                return made

    def compare_and_set(self, version: int, value: T) -> bool:
        """Set the value if the version still is ``version``.

        Returns:
            Whether it was, and the value is set.
        """
        seen = self._view
        return seen.version == version and self._replace(seen, View(version + 1, value))

    async def wait_changed(self, version: int) -> View[T]:
        """Wait until the version is past ``version``, and return what is current then.

        Several changes may have been made by then; the newest is what counts. To follow a snapshot::

            view = snapshot.view
            while True:
                use(view.value)
                view = await snapshot.wait_changed(view.version)

        Args:
            version: one that this snapshot has had.

        Raises:
            ValueError, TypeError: The snapshot has never had that version.

        Checkpoints: always; a cancelled wait leaves nothing behind.
        Cost: a waiting task costs a change one rescheduling, at most once per call of this method.
        """
        check_count("version", version, 0)
        if version > self._view.version:
            raise ValueError(f"version must be one this snapshot has had, 0 to {self._view.version}, not {version!r}")
        await trio.lowlevel.checkpoint()
        token = trio.lowlevel.current_trio_token()
        while (lot := self._enter(token, version)) is not None:
            try:
                await lot.park()
            finally:
                self._leave(token, lot)
        return self._view

    def statistics(self) -> SnapshotStatistics:
        """What the snapshot has seen."""
        with self._lock:
            waiting = sum(len(lot) for lot in self._lots.values())
            return SnapshotStatistics(self._view.version, waiting, self._conflicts)

    @trio.lowlevel.enable_ki_protection
    def _replace(self, seen: View[T], made: View[T]) -> bool:
        with self._lock:
            if self._view is not seen:
                self._conflicts += 1
                return False
            self._view = made
            if not self._lots:
                return True
            lots = tuple(self._lots.items())
        for token, lot in lots:
            _wake(token, lot)
        return True

    @trio.lowlevel.enable_ki_protection
    def _enter(self, token: trio.lowlevel.TrioToken, version: int) -> trio.lowlevel.ParkingLot | None:
        with self._lock:
            if self._view.version > version:
                return None
            return self._lots.setdefault(token, trio.lowlevel.ParkingLot())

    @trio.lowlevel.enable_ki_protection
    def _leave(self, token: trio.lowlevel.TrioToken, lot: trio.lowlevel.ParkingLot) -> None:
        with self._lock:
            if not lot and self._lots.get(token) is lot:
                del self._lots[token]


def _wake(token: trio.lowlevel.TrioToken, lot: trio.lowlevel.ParkingLot) -> None:
    try:
        here = trio.lowlevel.current_trio_token()
    except RuntimeError:
        here = None  # a thread, or a run that has ended
    if here is token:
        lot.unpark_all()
    else:
        with contextlib.suppress(trio.RunFinishedError):  # then its tasks are gone, too
            token.run_sync_soon(lot.unpark_all, idempotent=True)
