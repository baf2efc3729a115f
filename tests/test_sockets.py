"""Addresses are read strictly, listeners come all or none, and socket files are left as they should be."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest
import trio

from stagetrio.sockets import (
    SocketListener,
    TcpAddress,
    UnixAddress,
    address_of,
    connect,
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
        ("unix:///run/game.sock", UnixAddress("/run/game.sock")),
        ("unix://game.sock", UnixAddress("game.sock")),
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
        "unix://",
        "unix:///a\0b",
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
    with pytest.raises(ValueError, match="backlog must be at least 1, not 0"):
        await open_listeners("tcp://127.0.0.1:0", backlog=0)
    with pytest.raises(ValueError, match="unknown scheme 'http'"):
        await open_listeners("http://127.0.0.1:0")


async def test_connections_have_the_options_of_the_table() -> None:
    """Both ends send at once and notice a vanished peer; a Unix socket is left as it is."""
    (listener,) = await open_listeners("tcp://127.0.0.1:0")
    async with listener, await connect(str(address_of(listener.socket))) as client:
        assert client.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert client.socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert client.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 90_000
    one, other = socket.socketpair()
    with one, other:
        set_connection_options(one)
        assert not one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
