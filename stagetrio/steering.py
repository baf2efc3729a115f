"""Which of the sockets that share a TCP address gets a new connection, where a hash of its addresses would say.

Theory of operation. Sockets that listen on one address by ``SO_REUSEPORT`` are a *group*, which the kernel keeps as an
array: a socket enters at the end when it begins to listen, and when one leaves, the last takes its place. A program
of classic BPF, which needs no privilege, may be given to the group; it is run for each new connection and returns an
index into the array. Ours draws one of the wanted indices at random. What has been given to a socket stays with it,
so a change of programs refuses and resets nothing, and takes effect with the next connection.

An index that does not exist makes the kernel fall back to its hash. A wrong one would give connections to nobody, so
`Group` follows the array step by step, and takes a socket out by ``shutdown``, not by ``close`` alone, which does
nothing while a process that a worker has forked still holds a copy.

Source: socket(7), ``SO_ATTACH_REUSEPORT_CBPF``; the kernel's ``net/core/sock_reuseport.c``.
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
import struct
from collections.abc import Collection, Hashable, Sequence
from typing import Generic, TypeVar

ATTACH_REUSEPORT_CBPF = 51  # as on every architecture but parisc and sparc; Python's socket has no name for it

# Linux: <linux/filter.h>, <linux/bpf_common.h>
LOAD_WORD, MODULO, JUMP_IF_EQUAL, RETURN = 0x20, 0x94, 0x15, 0x06
RANDOM = 0x1_0000_0000 - 0x1000 + 56  # SKF_AD_OFF + SKF_AD_RANDOM
MAX_CHOICES = 2000  # a program has 4096 instructions at most

K = TypeVar("K", bound=Hashable)


class Group(Generic[K]):
    """The sockets that listen on one address, each under a key, and which of them get new connections."""

    def __init__(self) -> None:
        self._socks: dict[K, socket.socket] = {}
        self._array: list[K] = []  # as the kernel has it
        self._wanted: list[int] = []  # what the program in force draws from

    def __contains__(self, key: K) -> bool:
        return key in self._socks

    def __getitem__(self, key: K) -> socket.socket:
        return self._socks[key]

    def add(self, key: K, sock: socket.socket) -> None:
        """Take in a socket that has just begun to listen. Until it is steered to, it gets nothing where others do."""
        self._socks[key] = sock
        self._array.append(key)

    def close(self, key: K) -> None:
        """Close a socket; what waits in its queue is reset."""
        sock = self._socks.pop(key)
        place, last = self._array.index(key), self._array.pop()
        if last != key:
            self._array[place] = last
        if not self._array:
            self._wanted = []  # the group goes with its last socket, and the program with it
        with sock, contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)

    def close_all(self) -> None:
        """Close all of them."""
        for key in tuple(self._socks):
            self.close(key)

    def steer(self, keys: Collection[K]) -> None:
        """Give new connections to these from now on, in equal shares.

        Where the kernel takes no such program, it spreads them over all sockets, as it does without one.
        """
        wanted = sorted(self._array.index(key) for key in keys if key in self._socks)[:MAX_CHOICES]
        if wanted and wanted != self._wanted:
            self._wanted = wanted
            with contextlib.suppress(OSError):
                _attach(next(iter(self._socks.values())), draw_one_of(wanted))


def draw_one_of(indices: Sequence[int]) -> bytes:
    """The program that returns one of ``indices``, 1 to `MAX_CHOICES` of them, at random."""
    program = [_instruction(LOAD_WORD, RANDOM), _instruction(MODULO, len(indices))]
    for place, index in enumerate(indices[:-1]):
        program += [_instruction(JUMP_IF_EQUAL, place, if_not=1), _instruction(RETURN, index)]
    return b"".join([*program, _instruction(RETURN, indices[-1])])


def _instruction(code: int, operand: int, *, if_not: int = 0) -> bytes:
    return struct.pack("=HBBI", code, 0, if_not, operand)


def _attach(sock: socket.socket, program: bytes) -> None:
    text = ctypes.create_string_buffer(program, len(program))  # alive until the kernel has copied it
    pointer = struct.pack("@HP", len(program) // 8, ctypes.addressof(text))
    sock.setsockopt(socket.SOL_SOCKET, ATTACH_REUSEPORT_CBPF, pointer)
