"""Pings over UDP, answered at length only to those who are where they say they are.

Run the server, then as many clients as you like::

    python examples/datagrams.py udp://127.0.0.1:8801
    python examples/datagrams.py udp://127.0.0.1:8801 --ping anna

The first answer to a stranger is a token, no longer than what it sent; only with the token sent back does it get more.
"""

from __future__ import annotations

import argparse
import signal
import socket
from functools import partial

import attrs
import trio

from stagetrio import Codec, DatagramServer, Source, open_datagram_sockets, serve_datagrams
from stagetrio.addresses import UdpAddress, parse_address


@attrs.frozen
class Ping:
    """Who asks, and the token it was sent; zeros in its place the first time."""

    name: str
    token: bytes = bytes(16)


@attrs.frozen
class Token:
    """What to send back."""

    token: bytes


@attrs.frozen
class Pong:
    """The answer, longer than the question."""

    words: str
    pings: int


Message = Ping | Token | Pong
CODEC: Codec[Message] = Codec([Ping, Token, Pong])
STRANGERS = "strangers"


async def answer(source: Source[Message], message: Message) -> Message | None:
    """Answer a verified source, and let others verify themselves; these share one share, as anybody can forge them."""
    if not isinstance(message, Ping):
        return None
    if not source.verified:
        if not source.verify(message.token):
            return Token(source.token())
        source.flow = source.address
    source.data = (source.data or 0) + 1
    return Pong(f"Hello {message.name[:100]}, you are at {source.address}, and I have heard you.", source.data)


async def serve(address: str) -> None:
    """Serve until SIGTERM or Ctrl-C, then drain."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            sockets = await open_datagram_sockets(address)
            server: DatagramServer[Message] = await nursery.start(
                partial(serve_datagrams, answer, sockets, codec=CODEC, flow=lambda source: STRANGERS)
            )
            host, port = sockets[0].getsockname()[:2]
            print(f"receiving at {UdpAddress(host, port)}", flush=True)
            async for _ in signals:
                await server.drain(5)
                return


async def ping(address: str, name: str) -> None:
    """Ask until there is an answer; a datagram may be lost on its way, so each is sent again after a second."""
    target = parse_address(address)
    if not isinstance(target, UdpAddress):
        raise SystemExit(f"{address} is no address for datagrams; write for instance udp://127.0.0.1:8801")
    token = bytes(16)
    with trio.socket.socket(type=socket.SOCK_DGRAM) as sock:
        await sock.connect((target.host, target.port))
        while True:
            try:
                await sock.send(CODEC.encode(Ping(name, token), 1))
                with trio.move_on_after(1):
                    reply, _id = CODEC.decode(await sock.recv(1200))
                    if isinstance(reply, Pong):
                        print(f"{reply.words} ({reply.pings})")
                        return
                    token = reply.token
            except ConnectionRefusedError:
                raise SystemExit(f"nobody is at {address}: python examples/datagrams.py {address}") from None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Pings over UDP.")
    parser.add_argument("address")
    parser.add_argument("--ping", metavar="NAME")
    arguments = parser.parse_args()
    if arguments.ping is None:
        trio.run(serve, arguments.address)
    else:
        trio.run(ping, arguments.address, arguments.ping)
