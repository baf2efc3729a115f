"""Keeps a number of worker processes alive, one in each slot, and replaces them without a gap.

Theory of operation. Each slot has a task (`Arbiter._keep`) that owns whoever works in it, so a slot has at most one
worker that takes traffic, and one more while it is being replaced: the successor is started first, on the same
listening sockets, and only when it is ready the predecessor is told to drain. Everything that can happen to a slot
(its worker died, or is too old; a reload; fewer slots wanted) sets a flag or an event and wakes this task, which then
looks at the state as it is. So two causes at once are one replacement, and none is lost.

A worker that ends unasked is replaced at once, if it has been ready for `STABLE_SECONDS` (no longer: workers that are
killed from outside again and again must come back as fast). One that ends sooner makes its slot wait, from the second
in a row on, twice as long each time (`stagetrio.backoff`), give or take a quarter, so that slots which fail for one
reason do not retry together. The very first worker is started alone, and the others when it is ready: if it exits by
itself before that, what it was to serve is broken, which is said once, and ends the arbiter's task: `CannotStart`.

New connections go to the slots whose worker is ready (`Arbiter._steer`), from the moment at which a worker's end of the
channel is found closed, which is before its process is gone. A slot that is given up is passed over for
`SETTLE_SECONDS` before its worker is told to drain, and meanwhile that one accepts what it has been given.

A reload replaces the workers slot by slot. When a successor does not become ready, the reload stops there, and those
not yet replaced stay: a broken version does not take the place of a working one.
"""

from __future__ import annotations

import logging
import math
import random
from typing import Any

import attrs
import trio

from stagetrio.backoff import backoff
from stagetrio.calls import Wakeup
from stagetrio.prefork_sockets import WorkerSockets
from stagetrio.sockets import Address
from stagetrio.worker_process import Timing, WorkerProcess

logger = logging.getLogger("stagetrio.prefork")

STABLE_SECONDS = 1.0
SETTLE_SECONDS = 0.5  # for connections on their way to a slot that gets no more
CHECK_SECONDS = 5.0  # between two looks at the workers' age and memory


class CannotStart(Exception):
    """The first worker exited before it was ready: what it should serve is not as it must be.

    Args:
        status: its exit status.
    """

    def __init__(self, status: int) -> None:
        super().__init__(f"the first worker exited with status {status} before it was ready")
        self.status = status


@attrs.frozen
class WorkerStatistics:
    """One worker process.

    Args:
        number: its slot.
        pid: its process id.
        age: seconds since it was started.
        state: ``"starting"``, ``"ready"`` or ``"draining"``.
        resident_bytes: its memory in RAM; 0 where that cannot be known.
    """

    number: int
    pid: int | None
    age: float
    state: str
    resident_bytes: float


@attrs.frozen
class ArbiterStatistics:
    """The worker processes now, and what happened to those before them.

    Args:
        processes: slots that are to have a worker.
        workers: the processes there are, those that drain included.
        started: processes started so far.
        crashed: those that ended unasked.
        hung: those that were killed since nothing was heard of them.
        recycled: those replaced for their age, their memory, or because they asked for it.
        reloads: reloads completed.
        backing_off: slots that wait before they try again.
    """

    processes: int
    workers: tuple[WorkerStatistics, ...]
    started: int
    crashed: int
    hung: int
    recycled: int
    reloads: int
    backing_off: int


class _Slot:
    """The place of one worker, and what is to happen to it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.wakeup = Wakeup()
        self.current: WorkerProcess | None = None
        self.replace = False
        self.retired = False
        self.failures = 0  # in a row
        self.backing_off = False
        self.settled = trio.Event()  # the last replacement asked for has been made, or given up
        self.reload_failed = False

    @property
    def served(self) -> bool:
        """Whether there is a worker in it that is ready."""
        return self.current is not None and self.current.ready and not self.current.lost


class Arbiter:
    """Worker processes in slots; made by `stagetrio.prefork.open_arbiter`.

    Args:
        config: what the workers are told.
        sockets: what they listen on.
        timing: see `Timing`.
        max_age: seconds after which a worker is replaced, give or take ``jitter``.
        max_memory_bytes: of RAM, from which on a worker is replaced, give or take ``jitter``.
        jitter: a share, 0 to 1, so that workers which were started together are not replaced together.
    """

    def __init__(
        self,
        config: dict[str, Any],
        sockets: WorkerSockets,
        timing: Timing,
        max_age: float,
        max_memory_bytes: float,
        jitter: float,
    ) -> None:
        self._config = config
        self._sockets = sockets
        self._timing = timing
        self._max_age = max_age
        self._max_memory = max_memory_bytes
        self._jitter = jitter
        self._random = random.Random()
        self._nursery: trio.Nursery
        self._slots: dict[int, _Slot] = {}  # the highest number is the first to go
        self._processes: dict[WorkerProcess, float] = {}  # {process: its share of jitter}
        self._reload_lock = trio.Lock()
        self._reloads_asked = self._reloads_served = 0
        self._reload_went_well = True
        self._any_ready = False
        self._changed = trio.Event()
        self._started = self._crashed = self._hung = self._recycled = self._reloads = 0

    @property
    def addresses(self) -> list[Address]:
        """Where the workers listen."""
        return self._sockets.addresses

    @property
    def processes(self) -> int:
        """Slots that are to have a worker."""
        return len(self._slots)

    def scale(self, processes: int) -> None:
        """Have so many workers from now on: more are started, or the youngest slots drain and close.

        Args:
            processes: ≥ 1.

        Raises:
            OSError: A listening socket for a new one cannot be had.
        """
        if processes < 1:
            raise ValueError(f"processes must be 1 or more, not {processes!r}")
        while len(self._slots) < processes:
            slot = _Slot(len(self._slots))
            self._sockets.of_slot(slot.number)
            self._slots[slot.number] = slot
            self._nursery.start_soon(self._keep, slot)
        while len(self._slots) > processes:
            _, slot = self._slots.popitem()
            slot.retired = True
            slot.wakeup.wake()
        self._steer()

    async def reload(self) -> bool:
        """Replace all workers, one after the other, each by a successor that is ready before it drains.

        Those who ask during a reload share the next one.

        Returns:
            Whether all were replaced; False: a successor failed, and its predecessor and those after it stay.

        Checkpoints: always; cancelled, the reload stops after the worker it is at.
        """
        self._reloads_asked += 1
        mine = self._reloads_asked
        async with self._reload_lock:
            if self._reloads_served < mine:
                self._reloads_served = self._reloads_asked
                self._reload_went_well = await self._replace_all()
                self._reloads += self._reload_went_well
            return self._reload_went_well

    async def wait_ready(self) -> None:
        """Wait until there is a ready worker in every slot.

        Checkpoints: always; a cancelled wait changes nothing.
        """
        await trio.lowlevel.checkpoint()
        while not all(slot.served for slot in self._slots.values()):
            await self._changed.wait()

    async def stop(self) -> None:
        """Have every worker drain, and wait until all are gone; those that outlast the grace are killed.

        Checkpoints: always; cancelled, the workers go on draining.
        """
        for slot in self._slots.values():
            slot.retired = True
            slot.wakeup.wake()
        self._slots.clear()
        await trio.lowlevel.checkpoint()
        while self._processes:
            await self._changed.wait()

    def statistics(self) -> ArbiterStatistics:
        """The workers now, and what happened to those before them."""
        now = trio.current_time()
        return ArbiterStatistics(
            processes=len(self._slots),
            workers=tuple(
                WorkerStatistics(
                    number=process.number,
                    pid=process.pid,
                    age=now - process.born,
                    state="draining" if process.draining else "ready" if process.ready else "starting",
                    resident_bytes=process.resident_bytes(),
                )
                for process in self._processes
            ),
            started=self._started,
            crashed=self._crashed,
            hung=self._hung,
            recycled=self._recycled,
            reloads=self._reloads,
            backing_off=sum(slot.backing_off for slot in self._slots.values()),
        )

    # A slot.

    async def _keep(self, slot: _Slot) -> None:
        while slot.number > 0 and not self._any_ready and not slot.retired:
            await self._changed.wait()
        while not slot.retired:
            worker = slot.current
            if worker is not None and worker.gone.is_set():
                slot.current = None
                self._note_end(slot, worker)
                await self._back_off(slot)
            elif worker is None or slot.replace or worker.wants_replacement:
                await self._succeed(slot, worker)
            else:
                await slot.wakeup.wait()
        slot.settled.set()
        if slot.current is not None:
            if self._slots:  # others serve
                await trio.sleep(SETTLE_SECONDS)
            await slot.current.drain()
        if slot.number not in self._slots:  # nor has another one its sockets
            self._sockets.close_slot(slot.number)

    async def _begin(self, slot: _Slot) -> WorkerProcess | None:
        """Start a worker and wait until it is ready; None: it was not to be, and the slot has waited."""

        def heed() -> None:
            self._steer()
            slot.wakeup.wake()

        worker = WorkerProcess(slot.number, self._config, self._sockets.of_slot(slot.number), self._timing, heed)
        self._started += 1
        self._processes[worker] = self._random.uniform(1 - self._jitter, 1 + self._jitter)
        self._nursery.start_soon(self._accompany, worker)
        while not (worker.ready or worker.gone.is_set() or slot.retired):
            await slot.wakeup.wait()
        if slot.retired:
            return worker
        if worker.gone.is_set():
            self._note_end(slot, worker)
            await self._back_off(slot)
            return None
        logger.info("%s is ready", worker)
        self._any_ready = True
        return worker

    async def _accompany(self, worker: WorkerProcess) -> None:
        try:
            await worker.run()
        finally:
            del self._processes[worker]
            self._tell_change()

    async def _succeed(self, slot: _Slot, worker: WorkerProcess | None) -> None:
        """Put a successor in the place of a worker, if there is one, unless the successor fails."""
        asked, slot.replace = slot.replace, False  # asked for from now on, it is for a successor begun from now on
        if worker is not None and worker.wants_replacement:
            self._recycled += 1
            worker.wants_replacement = False
        successor = await self._begin(slot)
        if successor is not None:
            slot.current = successor
            self._steer()
            if worker is not None:
                self._nursery.start_soon(worker.drain)
        if asked:
            slot.reload_failed = successor is None
            slot.settled.set()
        self._tell_change()

    def _note_end(self, slot: _Slot, worker: WorkerProcess) -> None:
        if worker.draining:
            return
        if worker.hung:
            self._hung += 1
        else:
            self._crashed += 1
        if not self._any_ready and not worker.ready and worker.status is not None and worker.status > 0:
            raise CannotStart(worker.status)
        age = trio.current_time() - worker.born
        before = "" if worker.ready else " before it was ready"
        logger.error("%s %s%s, %.3g s old", worker, worker.described_end(), before, age)
        slot.failures = 0 if worker.ready_seconds >= STABLE_SECONDS else slot.failures + 1

    async def _back_off(self, slot: _Slot) -> None:
        if slot.failures <= 1 and self._any_ready:
            return  # once is no pattern
        seconds = backoff(slot.failures) * self._random.uniform(0.75, 1.25)
        logger.warning(
            "worker %d has failed %d times in a row: next try in %.2g s", slot.number, slot.failures, seconds
        )
        slot.backing_off = True
        until = trio.current_time() + seconds
        while not slot.retired and trio.current_time() < until:
            with trio.move_on_at(until):
                await slot.wakeup.wait()
        slot.backing_off = False

    def _steer(self) -> None:
        """Have new connections go where somebody takes them; to all slots while that is nowhere."""
        served = [number for number, slot in self._slots.items() if slot.served]
        self._sockets.steer(served or self._slots)

    def _tell_change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    # All slots.

    async def _replace_all(self) -> bool:
        for slot in tuple(self._slots.values()):
            if slot.retired:  # meanwhile
                continue
            slot.settled = trio.Event()
            slot.reload_failed = False
            slot.replace = True
            slot.wakeup.wake()
            await slot.settled.wait()
            if slot.reload_failed:
                logger.error(
                    "the reload stops: the successor of worker %d failed, and its predecessor stays", slot.number
                )
                return False
        logger.info("reload complete")
        return True

    async def watch_age_and_memory(self) -> None:
        """Have workers replaced that have grown too old or too big, until cancelled."""
        while True:
            await trio.sleep(min(CHECK_SECONDS, self._max_age / 4))
            for worker, share in self._processes.items():
                age = trio.current_time() - worker.born
                grown = self._max_memory < math.inf and worker.resident_bytes() > self._max_memory * share
                if worker.ready and not worker.draining and (age > self._max_age * share or grown):
                    worker.wants_replacement = True
                    slot = self._slots.get(worker.number)
                    if slot is not None:
                        slot.wakeup.wake()

    def kill(self) -> None:
        """End every worker at once."""
        for worker in self._processes:
            worker.kill()
