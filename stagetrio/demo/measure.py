"""What is measured: outcomes and latencies by the clients, stalls, memory and open connections by the servers.

Latencies go into buckets 2 % wide, so any percentile is within 1 % of the truth, and a million of them take no more
room than a thousand. They are counted per slot of the storm, which is what the plots show.
"""

from __future__ import annotations

import math
import os
import socket
import stat
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs
import trio

SLOT_SECONDS = 0.25
_WIDTH = math.log(1.02)
_FINEST = 1e-6


def bucket_of(seconds: float) -> int:
    """The bucket of a latency; those below 1 µs share one."""
    return int(math.log(max(seconds, _FINEST) / _FINEST) / _WIDTH)


def percentile(latencies: Counter[int], share: float) -> float | None:
    """The latency that ``share`` (0 to 1) of all do not exceed, in seconds; None where there are none."""
    rank = math.ceil(share * latencies.total())
    if not latencies:
        return None
    for bucket in sorted(latencies):
        rank -= latencies[bucket]
        if rank <= 0:
            break
    return _FINEST * math.exp((bucket + 0.5) * _WIDTH)


@attrs.define
class Slot:
    """What became of the messages which were meant to be sent in one slot of the storm.

    Args:
        offered: How many they are.
        served: Those that got their reply.
        refused: Those that were refused.
        failed: Those whose handler failed.
        replies: Replies that came *in* this slot, whenever their messages were sent.
        latencies: ``{bucket: count}`` of the served.
    """

    offered: int = 0
    served: int = 0
    refused: int = 0
    failed: int = 0
    replies: int = 0
    latencies: Counter[int] = attrs.field(factory=Counter)

    def add(self, other: Slot) -> None:
        """Count the other's messages too."""
        self.offered += other.offered
        self.served += other.served
        self.refused += other.refused
        self.failed += other.failed
        self.replies += other.replies
        self.latencies.update(other.latencies)


class Tally:
    """What became of messages of one kind, slot by slot; times are seconds after the start of the storm."""

    def __init__(self, slots: Iterable[Slot] = ()) -> None:
        self.slots = list(slots)

    def at(self, when: float) -> Slot:
        """The slot that ``when`` lies in."""
        index = max(0, int(when / SLOT_SECONDS))
        while index >= len(self.slots):
            self.slots.append(Slot())
        return self.slots[index]

    def served(self, sent: float, now: float) -> None:
        """Count a reply, which came ``now``, to a message that was meant to be sent at ``sent``."""
        slot = self.at(sent)
        slot.served += 1
        slot.latencies[bucket_of(now - sent)] += 1
        self.at(now).replies += 1

    def total(self, until: float = math.inf) -> Slot:
        """All slots that begin before ``until`` in one."""
        total = Slot()
        for index, slot in enumerate(self.slots):
            if index * SLOT_SECONDS < until:
                total.add(slot)
        return total

    def add(self, other: Tally) -> None:
        """Count the other's messages too."""
        for index, slot in enumerate(other.slots):
            self.at(index * SLOT_SECONDS).add(slot)

    def to_plain(self) -> list[dict[str, Any]]:
        """The tally as JSON can carry it."""
        return [attrs.asdict(slot) for slot in self.slots]

    @classmethod
    def from_plain(cls, slots: list[dict[str, Any]]) -> Tally:
        """Undo `to_plain`, whose integer keys JSON has made strings."""
        tally = cls()
        for fields in slots:
            latencies = Counter({int(bucket): count for bucket, count in fields["latencies"].items()})
            tally.slots.append(Slot(**{**fields, "latencies": latencies}))
        return tally


class StallClock:
    """How long the loop was held at worst: a task sleeps for 2 ms at a time and looks how late it wakes up."""

    def __init__(self) -> None:
        self.worst = 0.0

    def reset(self) -> None:
        """Forget what was, at the start of the storm."""
        self.worst = 0.0

    async def run(self) -> None:
        """Measure until cancelled."""
        while True:
            due = trio.current_time() + 0.002
            await trio.sleep_until(due)
            self.worst = max(self.worst, trio.current_time() - due)


def peak_memory() -> int:
    """The most memory this process has held so far (resident, bytes); 0 where the system does not say."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    try:
        import resource
    except ImportError:
        return 0
    # Only where /proc is missing: on Linux this figure is inherited from whoever started the process.
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def open_peer_ports() -> set[int]:
    """The remote ports of all TCP connections whose descriptors this process holds.

    This asks the system, not the server: a client is disposed of when nothing is held for it any more.
    """
    return set(_peer_ports())


def _peer_ports() -> Iterator[int]:
    for descriptor in range(3, 4096):
        try:
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            with socket.socket(fileno=os.dup(descriptor)) as duplicate:
                if duplicate.family in (socket.AF_INET, socket.AF_INET6):
                    yield duplicate.getpeername()[1]
        except OSError:
            continue
