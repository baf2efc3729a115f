"""A small game: players log in, move on a board, and strike each other; a judge in a process of its own decides.

    stagetrio run examples/arena.py
    python examples/arena_client.py --name ada

What it shows: a login that needs a ticket, because the accounts' database takes only a few at once; work that would
hold the loop, done elsewhere by a remote call; a periodic job that sends the board to everyone, encoded once.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import trio
from arena_judge import verdict

from stagetrio.app import App
from stagetrio.peer import Peer
from stagetrio.remote import Remote, open_remote_stream

SIZE = 20  # fields along each side of the board


@attrs.frozen
class Login:
    name: str = attrs.field(validator=[attrs.validators.min_len(1), attrs.validators.max_len(40)])


@attrs.frozen
class Welcome:
    x: int
    y: int


@attrs.frozen
class Move:
    dx: int = attrs.field(validator=attrs.validators.in_([-1, 0, 1]))
    dy: int = attrs.field(validator=attrs.validators.in_([-1, 0, 1]))


@attrs.frozen
class Position:
    x: int
    y: int


@attrs.frozen
class Strike:
    name: str


@attrs.frozen
class Verdict:
    hit: bool
    reason: str


@attrs.frozen
class Board:
    positions: dict[str, Position]


@attrs.define
class Player:
    name: str
    position: Position


app = App("arena", sends=[Board])
login_tickets = app.ticket("login", 5, lease=2.0, max_waiting=500)
players: dict[str, Player] = {}
judge: Remote  # connected while the app is served


@app.lifespan
@asynccontextmanager
async def judging() -> AsyncIterator[None]:
    """Have the judge's process for as long as the app is served; it ends when our end of the socket is closed."""
    global judge
    ours, theirs = socket.socketpair()
    script = str(Path(__file__).with_name("arena_judge.py"))
    async with trio.open_nursery() as nursery:
        with theirs:
            command = [sys.executable, script, str(theirs.fileno())]
            # In a session of its own, a Ctrl-C at the terminal reaches the server only, which then drains.
            run = partial(trio.run_process, command, pass_fds=[theirs.fileno()], start_new_session=True)
            await nursery.start(run)
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        async with open_remote_stream(stream) as judge:
            yield
        nursery.cancel_scope.deadline = trio.current_time() + 2


@app.on(Login, ticket=login_tickets)
async def login(peer: Peer[Any], message: Login) -> Welcome:
    await trio.sleep(0.02)  # the accounts' database
    if message.name in players:
        peer.close(f"there is a player called {message.name} already")
    player = Player(message.name, Position(len(players) % SIZE, 0))
    players[message.name] = peer.data = player
    peer.flow = ("player", message.name)  # from now on the share is the player's, not the connection's
    return Welcome(player.position.x, player.position.y)


@app.on(Move)
async def move(peer: Peer[Any], message: Move) -> Position:
    player = player_of(peer)
    position = player.position
    player.position = Position((position.x + message.dx) % SIZE, (position.y + message.dy) % SIZE)
    return player.position


@app.on(Strike)
async def strike(peer: Peer[Any], message: Strike) -> Verdict:
    player, other = player_of(peer), players.get(message.name)
    if other is None:
        return Verdict(False, f"nobody is called {message.name}")
    here, there = player.position, other.position
    hit = await judge.call(verdict, here.x, here.y, there.x, there.y)
    return Verdict(hit, "close enough" if hit else "too far away")


@app.every(0.5)
async def show_board() -> None:
    app.broadcast(Board({player.name: player.position for player in players.values()}))


@app.on_disconnect
async def disconnected(peer: Peer[Any]) -> None:
    if peer.data is not None:
        players.pop(peer.data.name, None)


def player_of(peer: Peer[Any]) -> Player:
    if peer.data is None:
        peer.close("log in first")
        raise PermissionError("a move before the login")
    return peer.data
