"""What is to be written to one peer, and what may be left out when it does not read.

Frames leave in the order in which they came, all that are there in one write. What the socket did not take stays here
frame by frame, so that whole frames can still be dropped or replaced; one that has been written in part cannot.

Two kinds of frame go in. *Replies* are never dropped: the other side counts on them, and the messages in hand bound
them. *Pushed* frames, those of `stagetrio.peer.Peer.send_nowait`, are subject to the policy at the bound (`WhenFull`).
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Hashable

PIECE = 262144  # bytes joined for one write; as many as an outbox holds by default


class WhenFull(enum.Enum):
    """What becomes of a pushed frame when the outbox is full."""

    REFUSE = "refuse"  #: the sender gets `Overloaded`
    DROP_NEWEST = "drop newest"  #: it is left out
    DROP_OLDEST = "drop oldest"  #: the oldest pushed frames make room for it; if there are none, it is left out
    DISCONNECT = "disconnect"  #: the connection is closed, with `CloseReason.OUTBOX_FULL`


class Outbox:
    """The output of one peer.

    Attributes:
        size: Bytes not yet taken by the socket.
        dropped: Frames left out so far.
        coalesced: Frames replaced by a later one of the same key so far.

    Cost: of `put`, 0.1 µs.
    """

    __slots__ = ("_begun", "_frames", "_keys", "_next", "_pushed", "coalesced", "dropped", "size")

    def __init__(self) -> None:
        self.size = 0
        self.dropped = 0
        self.coalesced = 0
        self._frames: dict[int, bytes] = {}  # {serial number: frame}, in order
        self._next = 0
        self._begun = -1  # the serial number of the frame that has been written in part
        self._pushed: deque[int] = deque()  # serial numbers of those that may be dropped, and of some that are gone
        self._keys: dict[Hashable, int] = {}  # {key: serial number of its frame}, likewise

    def put(self, frame: bytes) -> None:
        """Append a frame that is never dropped."""
        self._frames[self._next] = frame
        self._next += 1
        self.size += len(frame)

    def push(self, frame: bytes, key: Hashable = None) -> None:
        """Append a frame that may be dropped, or, if it has a key, replaced."""
        self._pushed.append(self._next)
        if key is not None:
            self._keys[key] = self._next
        self.put(frame)
        if len(self._pushed) > 2 * len(self._frames) + 16 or len(self._keys) > 2 * len(self._frames) + 16:
            self._pushed = deque(serial for serial in self._pushed if serial in self._frames)
            self._keys = {key: serial for key, serial in self._keys.items() if serial in self._frames}

    def replace(self, key: Hashable, frame: bytes) -> bool:
        """Put a frame in the place of the one with the same key, if there is one of which nothing has been written."""
        serial = self._keys.get(key, self._begun)
        old = self._frames.get(serial)
        if old is None or serial == self._begun:
            return False
        self._frames[serial] = frame
        self.size += len(frame) - len(old)
        self.coalesced += 1
        return True

    def drop_oldest(self, max_bytes: float) -> bool:
        """Drop pushed frames, the oldest first, until less than ``max_bytes`` are left; False if that is not enough."""
        while self.size >= max_bytes and self._pushed:
            serial = self._pushed.popleft()
            if serial in self._frames and serial != self._begun:
                self.size -= len(self._frames.pop(serial))
                self.dropped += 1
        return self.size < max_bytes

    def joined(self) -> bytes:
        """Return what is to be written next: all there is, or whole frames of at least `PIECE` bytes.

        A socket with little room takes little of it each time, so all of much would be copied again and again.
        """
        if self.size <= PIECE:
            return b"".join(self._frames.values())
        frames: list[bytes] = []
        size = 0
        for frame in self._frames.values():
            frames.append(frame)
            size += len(frame)
            if size >= PIECE:
                break
        return b"".join(frames)

    def written(self, size: int) -> None:
        """Forget that many bytes from the front."""
        if size == self.size:
            self.clear()
            return
        self.size -= size
        gone: list[int] = []
        for serial, frame in self._frames.items():
            if size < len(frame):
                break
            gone.append(serial)
            size -= len(frame)
        for of in gone:
            del self._frames[of]
        if size:
            self._frames[serial] = frame[size:]
            self._begun = serial

    def clear(self) -> None:
        """Forget everything that is to be written."""
        self.size = 0
        self._frames.clear()
        if self._pushed:
            self._pushed.clear()
            self._keys.clear()
