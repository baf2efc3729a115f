"""New connections go to the sockets of a group that are wanted. Real sockets, no processes."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

import pytest

from stagetrio.steering import Group

CONNECTIONS = 60


def listening(port: int = 0, *, shared: bool = True) -> socket.socket:
    """A socket that listens on a port of 127.0.0.1, which it shares with others."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shared)
    sock.bind(("127.0.0.1", port))
    sock.listen(CONNECTIONS)
    sock.setblocking(False)
    return sock


@pytest.fixture
def group() -> Iterator[Group[str]]:
    """Sockets a, b, c and d on one port."""
    group: Group[str] = Group()
    group.add("a", listening())
    for key in "bcd":
        group.add(key, listening(port_of(group)))
    yield group
    group.close_all()


def port_of(group: Group[str]) -> int:
    """Where a group listens."""
    port: int = group["a"].getsockname()[1]
    return port


def shares(group: Group[str]) -> dict[str, int]:
    """{key: new connections it got}, of those that got any."""
    with contextlib.ExitStack() as stack:
        for _ in range(CONNECTIONS):
            stack.enter_context(socket.create_connection(("127.0.0.1", port_of(group))))
        counts = {key: accept_all(group[key]) for key in "abcde" if key in group}
    assert sum(counts.values()) == CONNECTIONS
    return {key: count for key, count in counts.items() if count}


def accept_all(sock: socket.socket) -> int:
    """How many connections waited."""
    count = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.accept()[0].close()
            count += 1
    return count


def test_control_without_a_word_every_socket_gets_its_share(group: Group[str]) -> None:
    """Whoever serves it or not."""
    assert shares(group).keys() == set("abcd")


@pytest.mark.parametrize("wanted", ["a", "d", "bc", "ad", "abcd"])
def test_only_those_wanted_get_new_connections(group: Group[str], wanted: str) -> None:
    """Each its share."""
    group.steer(wanted)
    assert shares(group).keys() == set(wanted)


def test_the_last_word_counts_and_none_changes_nothing(group: Group[str]) -> None:
    """The next connection goes by it; keys that are not there are passed over."""
    group.steer("a")
    group.steer("cx")
    group.steer("")
    assert shares(group) == {"c": CONNECTIONS}


@pytest.mark.parametrize("gone", "bcd")
def test_the_others_stay_who_they_are_when_one_closes(group: Group[str], gone: str) -> None:
    """Also where somebody else still holds the socket, as a program does that a worker has forked."""
    group.steer("bcd")
    copy = os.dup(group[gone].fileno())
    try:
        group.close(gone)
        group.add("e", listening(port_of(group)))
        for key in {*"abcde"} - {gone}:
            group.steer(key)
            assert shares(group) == {key: CONNECTIONS}
    finally:
        os.close(copy)


def test_a_group_that_begins_anew_is_steered_anew(group: Group[str]) -> None:
    """The program goes with the last socket."""
    group.steer("a")
    group.close_all()
    group.add("a", listening())
    group.add("b", listening(port_of(group)))
    group.steer("a")
    assert shares(group) == {"a": CONNECTIONS}


def test_what_waits_in_a_queue_stays_there(group: Group[str]) -> None:
    """Neither refused nor reset when others are steered to."""
    group.steer("b")
    with socket.create_connection(("127.0.0.1", port_of(group))) as waiting:
        group.steer("c")
        accepted, _ = group["b"].accept()
        with accepted:
            accepted.sendall(b"!")
            assert waiting.recv(1) == b"!"


def test_a_kernel_that_takes_no_program_goes_on_as_before() -> None:
    """As for a socket that shares its address with nobody."""
    group: Group[str] = Group()
    group.add("a", listening(shared=False))
    group.steer("a")
    assert shares(group) == {"a": CONNECTIONS}
    group.close_all()
