"""Addresses are read strictly, listeners come all or none, and socket files are left as they should be."""

from __future__ import annotations

import errno
import os
import re
import socket
import sys
from pathlib import Path

import pytest
import trio

from stagetrio.sockets import (
    FdAddress,
    SocketListener,
    TcpAddress,
    UdpAddress,
    UnixAddress,
    address_of,
    connect,
    inherited_addresses,
    open_datagram_sockets,
    open_listeners,
    parse_address,
    set_connection_options,
)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("tcp://127.0.0.1:8800", TcpAddress("127.0.0.1", 8800)),
        ("tcp://localhost:0", TcpAddress("localhost", 0)),
        ("tcp://[::1]:80", TcpAddress("::1", 80)),
        ("tcp://:80", TcpAddress("", 80)),
        ("udp://127.0.0.1:53", UdpAddress("127.0.0.1", 53)),
        ("udp://[::1]:53", UdpAddress("::1", 53)),
        ("unix:///run/game.sock", UnixAddress("/run/game.sock")),
        ("unix://game.sock", UnixAddress("game.sock")),
        ("fd://3", FdAddress(3)),
    ],
)
def test_addresses_read_back_as_they_were_written(text: str, address: object) -> None:
    """Text and value stand for each other."""
    assert parse_address(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "8800",
        "localhost:8800",
        "http://localhost:80",
        "tcp://localhost",
        "tcp://localhost:x",
        "tcp://localhost:65536",
        "tcp://localhost:80/path",
        "tcp://user@localhost:80",
        "tcp://[::1:80",
        "udp://localhost",
        "udp://localhost:80/path",
        "unix://",
        "unix:///a\0b",
        "fd://",
        "fd://-1",
        "fd://x",
        "fd://²",
    ],
)
def test_wrong_addresses_are_named(text: str) -> None:
    """The error shows what was given."""
    with pytest.raises(ValueError, match="address") as caught:
        parse_address(text)
    assert repr(text) in str(caught.value)


def test_an_address_must_be_text() -> None:
    """A tuple in trio's manner is not guessed at."""
    with pytest.raises(TypeError, match=r"address must be a str, not \('localhost', 80\)"):
        parse_address(("localhost", 80))  # type: ignore[arg-type]


async def echo_once(listener: SocketListener, address: str) -> bytes:
    """Send five bytes through a listener and return what came back."""
    async with trio.open_nursery() as nursery:

        async def serve() -> None:
            async with await listener.accept() as stream:
                await stream.send_all(await stream.receive_some(5))

        nursery.start_soon(serve)
        async with await connect(address) as client:
            await client.send_all(b"hello")
            return bytes(await client.receive_some(5))
    raise AssertionError


async def test_tcp_listens_and_connects() -> None:
    """Port 0 is chosen by the system, and the address of the listener says which."""
    (listener,) = await open_listeners("tcp://127.0.0.1:0")
    async with listener:
        assert await echo_once(listener, str(address_of(listener.socket))) == b"hello"


async def test_a_unix_listener_takes_its_file_away(tmp_path: Path) -> None:
    """After closing, the path is free again."""
    address = f"unix://{tmp_path}/s.sock"
    (listener,) = await open_listeners(address)
    async with listener:
        assert address_of(listener.socket) == UnixAddress(f"{tmp_path}/s.sock")
        assert await echo_once(listener, address) == b"hello"
    assert list(tmp_path.iterdir()) == []


async def test_a_stale_socket_file_is_replaced(tmp_path: Path) -> None:
    """What a killed server left behind does not hinder the next one."""
    path = tmp_path / "s.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    (listener,) = await open_listeners(f"unix://{path}")
    async with listener:
        assert await echo_once(listener, f"unix://{path}") == b"hello"


async def test_a_live_server_is_not_replaced(tmp_path: Path) -> None:
    """A second server on the same path fails, and the first one goes on."""
    address = f"unix://{tmp_path}/s.sock"
    (listener,) = await open_listeners(address)
    async with listener:
        with pytest.raises(OSError, match=f"cannot listen on {address}") as caught:
            await open_listeners(address)
        assert caught.value.errno == errno.EADDRINUSE
        await (await listener.accept()).aclose()  # the probe's connection
        assert await echo_once(listener, address) == b"hello"


async def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    """A typing error does not cost a file."""
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(OSError, match="cannot listen on"):
        await open_listeners(f"unix://{path}")
    assert path.read_text() == "data"


async def test_a_successors_socket_file_is_left_alone(tmp_path: Path) -> None:
    """A server that ends does not remove the file which another one has put in its place."""
    path = tmp_path / "s.sock"
    (old,) = await open_listeners(f"unix://{path}")
    os.rename(path, tmp_path / "old.sock")
    (new,) = await open_listeners(f"unix://{path}")
    async with new:
        await old.aclose()
        assert await echo_once(new, f"unix://{path}") == b"hello"


async def test_listeners_come_all_or_none(tmp_path: Path) -> None:
    """When one address cannot be had, those opened before it are closed again."""
    (taken,) = await open_listeners("tcp://127.0.0.1:0")
    async with taken:
        with pytest.raises(OSError, match=r"cannot listen on tcp://127\.0\.0\.1:"):
            await open_listeners(f"unix://{tmp_path}/s.sock", str(address_of(taken.socket)))
    assert list(tmp_path.iterdir()) == []


async def test_wrong_arguments_are_named() -> None:
    """No address, or no backlog, is a mistake and not a server that nobody reaches."""
    with pytest.raises(ValueError, match="addresses"):
        await open_listeners()
    with pytest.raises(ValueError, match="backlog must be >= 1, not 0"):
        await open_listeners("tcp://127.0.0.1:0", backlog=0)
    with pytest.raises(TypeError, match="backlog must be an int, not 'a'"):
        await open_listeners("tcp://127.0.0.1:0", backlog="a")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="mode must be an int, not '0660'"):
        await open_listeners("tcp://127.0.0.1:0", mode="0660")  # type: ignore[arg-type]
    for wrong in (8800, ["tcp://127.0.0.1:0"]):
        with pytest.raises(TypeError, match=re.escape(f"address must be a str, not {wrong!r}")):
            await open_listeners(wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=re.escape(f"address must be a str, not {wrong!r}")):
            await connect(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown scheme 'http'"):
        await open_listeners("http://127.0.0.1:0")


async def test_connections_have_the_options_of_the_table() -> None:
    """Both ends send at once and notice a vanished peer; a Unix socket is left as it is."""
    (listener,) = await open_listeners("tcp://127.0.0.1:0")
    async with listener, await connect(str(address_of(listener.socket))) as client:
        assert client.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert client.socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert client.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 90_000
        assert client.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == 16_384
    one, other = socket.socketpair()
    with one, other:
        set_connection_options(one)
        assert not one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


async def test_one_socket_serves_both_families() -> None:
    """``tcp://[::]`` takes IPv6 and IPv4 on the same port, and tells the two apart."""
    (listener,) = await open_listeners("tcp://[::]:0")
    async with listener:
        address = address_of(listener.socket)
        assert isinstance(address, TcpAddress)
        for host in ("127.0.0.1", "[::1]"):
            assert await echo_once(listener, f"tcp://{host}:{address.port}") == b"hello"


async def test_a_listener_of_one_family_leaves_the_other_alone() -> None:
    """``tcp://[::1]`` does not take the port of IPv4."""
    (six,) = await open_listeners("tcp://[::1]:0")
    async with six:
        address = address_of(six.socket)
        assert isinstance(address, TcpAddress)
        (four,) = await open_listeners(TcpAddress("127.0.0.1", address.port))
        await four.aclose()


async def test_a_port_is_shared_only_by_those_who_both_say_so() -> None:
    """With ``reuse_port`` two listeners have the same port; without, the second fails."""
    (one,) = await open_listeners("tcp://127.0.0.1:0", reuse_port=True)
    async with one:
        address = address_of(one.socket)
        (two,) = await open_listeners(address, reuse_port=True)
        assert address_of(two.socket) == address
        await two.aclose()
        with pytest.raises(OSError, match="cannot listen on tcp://") as caught:
            await open_listeners(address)
        assert caught.value.errno == errno.EADDRINUSE


@pytest.mark.parametrize("mode", [0o600, 0o666])
async def test_a_unix_socket_has_the_permissions_it_was_given(tmp_path: Path, mode: int) -> None:
    """Whatever the umask says."""
    (listener,) = await open_listeners(f"unix://{tmp_path}/s.sock", mode=mode)
    async with listener:
        assert (tmp_path / "s.sock").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("mode", [-1, 0o1777])
async def test_permissions_must_be_permissions(mode: int) -> None:
    """Before anything is opened."""
    with pytest.raises(ValueError, match=r"mode must be .*, not "):
        await open_listeners("tcp://127.0.0.1:0", mode=mode)


async def test_an_inherited_socket_is_served_and_closed() -> None:
    """What the process before us listened on is ours, with its address, and is not passed on to children."""
    sock = socket.create_server(("127.0.0.1", 0))
    sock.set_inheritable(True)
    port = sock.getsockname()[1]
    (listener,) = await open_listeners(f"fd://{sock.detach()}")
    fd = listener.socket.fileno()
    assert not os.get_inheritable(fd)
    async with listener:
        assert await echo_once(listener, f"tcp://127.0.0.1:{port}") == b"hello"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


async def test_a_descriptor_that_is_no_listening_socket_is_left_open(tmp_path: Path) -> None:
    """The error names the address; the descriptor stays its owner's."""
    with socket.socket() as unbound, (tmp_path / "file").open("w") as file:
        for fd in (unbound.fileno(), file.fileno()):
            with pytest.raises(OSError, match=f"cannot listen on fd://{fd}: "):
                await open_listeners(f"fd://{fd}")
            os.fstat(fd)


def test_sockets_of_the_service_manager_are_taken_once() -> None:
    """They are meant for this very process, and for no child of it."""
    ours = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b", "HOME": "/"}
    assert inherited_addresses(ours) == [FdAddress(3), FdAddress(4)]
    assert ours == {"HOME": "/"}
    theirs = {"LISTEN_PID": "1", "LISTEN_FDS": "2"}
    assert inherited_addresses(theirs) == []
    assert theirs == {"LISTEN_PID": "1", "LISTEN_FDS": "2"}
    with pytest.raises(ValueError, match="LISTEN_FDS must be a number, not 'x'"):
        inherited_addresses({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "x"})


async def test_an_inherited_socket_is_no_place_to_connect_to() -> None:
    """Only to listen on."""
    with pytest.raises(ValueError, match="address must be one to connect to, not fd://3"):
        await connect("fd://3")


async def test_datagram_sockets_are_bound_and_know_where() -> None:
    """With room for a burst, each family by itself; both by one socket where it says so."""
    (sock,) = await open_datagram_sockets("udp://127.0.0.1:0")
    with sock, socket.socket(type=socket.SOCK_DGRAM) as plain:
        address = address_of(sock)
        assert isinstance(address, UdpAddress)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) >= plain.getsockopt(
            socket.SOL_SOCKET, socket.SO_RCVBUF
        )
        assert not sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
        (six,) = await open_datagram_sockets(f"udp://[::1]:{address.port}")
        six.close()
        with pytest.raises(OSError, match=f"cannot listen on {address}: Address already in use"):
            await open_datagram_sockets(address)
    (both,) = await open_datagram_sockets("udp://[::]:0")
    with both:
        assert not both.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)


async def test_a_datagram_port_is_shared_only_by_those_who_both_say_so() -> None:
    """As a listener's is."""
    (one,) = await open_datagram_sockets("udp://127.0.0.1:0", reuse_port=True)
    with one:
        (two,) = await open_datagram_sockets(address_of(one), reuse_port=True)
        assert address_of(two) == address_of(one)
        two.close()
        with pytest.raises(OSError, match="cannot listen on udp://"):
            await open_datagram_sockets(address_of(one))


async def test_datagram_sockets_come_all_or_none() -> None:
    """When one cannot be had, those opened before it are closed."""
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match=r"cannot listen on udp://192\.0\.2\.1:1: "):
        await open_datagram_sockets("udp://127.0.0.1:0", "udp://192.0.2.1:1")
    assert len(os.listdir("/proc/self/fd")) == before


async def test_an_inherited_datagram_socket_is_taken() -> None:
    """A socket of another kind is left open, whichever of the two it was asked for."""
    with socket.socket(type=socket.SOCK_DGRAM) as sock, socket.create_server(("127.0.0.1", 0)) as listening:
        sock.bind(("127.0.0.1", 0))
        with pytest.raises(OSError, match="the descriptor is no datagram socket"):
            await open_datagram_sockets(f"fd://{listening.fileno()}")
        with pytest.raises(OSError, match="the descriptor is no listening socket"):
            await open_listeners(f"fd://{sock.fileno()}")
        os.fstat(listening.fileno())
        name = sock.getsockname()
        (taken,) = await open_datagram_sockets(f"fd://{sock.detach()}")
        with taken:
            assert taken.getsockname() == name
            assert not os.get_inheritable(taken.fileno())


async def test_each_kind_of_socket_has_its_own_addresses() -> None:
    """Datagrams are not accepted, and connections are no datagrams."""
    with pytest.raises(ValueError, match="addresses must be ones to accept connections on, not udp://h:1"):
        await open_listeners("udp://h:1")
    with pytest.raises(ValueError, match="address must be one to connect to, not udp://h:1"):
        await connect("udp://h:1")
    with pytest.raises(ValueError, match="addresses must be ones for datagrams, not tcp://h:1"):
        await open_datagram_sockets("tcp://h:1")
    with pytest.raises(ValueError, match="addresses must name at least one place to receive datagrams"):
        await open_datagram_sockets()


SERVICE = """
import sys, trio
from stagetrio import open_datagram_sockets, open_listeners
from stagetrio.sockets import inherited_addresses

async def main():
    stream, datagrams = inherited_addresses()
    (listener,) = await open_listeners(stream)
    (sock,) = await open_datagram_sockets(datagrams)
    async with await listener.accept() as client:
        await client.send_all(await client.receive_some(5))
    data, name = await sock.recvfrom(5)
    await sock.sendto(data, name)
    assert inherited_addresses() == []

trio.run(main)
"""

# What a service manager does: sockets from descriptor 3 on, and the number of the process they are meant for.
ACTIVATE = """
import fcntl, os, sys
kept = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3]]  # out of the way of 3 and 4
for number, fd in enumerate(kept):
    os.dup2(fd, 3 + number, inheritable=True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="2")
os.execv(sys.executable, [sys.executable, "-c", sys.argv[3]])
"""


async def test_a_service_is_started_with_its_sockets_in_hand() -> None:
    """Who connects or sends before it runs is served when it does."""
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket(type=socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        with (
            socket.create_connection(listening.getsockname()) as early,
            socket.socket(type=socket.SOCK_DGRAM) as client,
        ):
            early.sendall(b"early")
            client.connect(sock.getsockname())
            client.send(b"datag")
            fds = [listening.fileno(), sock.fileno()]
            command = [sys.executable, "-W", "error", "-c", ACTIVATE, *map(str, fds), SERVICE]
            with trio.fail_after(60):
                await trio.run_process(command, pass_fds=fds)
            assert early.recv(5) == b"early"
            assert client.recv(5) == b"datag"
