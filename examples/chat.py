"""A chat with rooms: what is said in a room reaches everyone else in it.

    stagetrio run examples/chat.py
    python examples/chat_client.py --room tea --name ada
"""

from __future__ import annotations

from typing import Any

import attrs

from stagetrio.app import App
from stagetrio.peer import Peer


@attrs.frozen
class Join:
    room: str = attrs.field(validator=[attrs.validators.min_len(1), attrs.validators.max_len(40)])
    name: str = attrs.field(validator=[attrs.validators.min_len(1), attrs.validators.max_len(40)])


@attrs.frozen
class Members:
    names: list[str]


@attrs.frozen
class Say:
    text: str = attrs.field(validator=attrs.validators.max_len(1000))


@attrs.frozen
class Said:
    name: str
    text: str


@attrs.frozen
class Member:
    """What the server keeps of a connection that has joined."""

    room: str
    name: str


app = App("chat", sends=[Said])
rooms: dict[str, set[Peer[Any]]] = {}  # {room: everyone in it}


def tell(room: str, said: Said, but: Peer[Any]) -> None:
    """Tell everyone in a room but one; who does not keep up is disconnected instead of slowing down the room."""
    for peer in app.broadcast(said, rooms.get(room, set()) - {but}):
        peer.close("too slow for this room")


@app.on(Join)
async def join(peer: Peer[Any], message: Join) -> Members:
    leave(peer)
    peer.data = Member(message.room, message.name)
    room = rooms.setdefault(message.room, set())
    room.add(peer)
    tell(message.room, Said(message.name, "(joins)"), but=peer)
    return Members(sorted(member.data.name for member in room))


@app.on(Say)
async def say(peer: Peer[Any], message: Say) -> None:
    if peer.data is None:
        peer.close("join a room first")
    else:
        tell(peer.data.room, Said(peer.data.name, message.text), but=peer)


@app.on_disconnect
async def disconnected(peer: Peer[Any]) -> None:
    leave(peer)


def leave(peer: Peer[Any]) -> None:
    if peer.data is None:
        return
    member, peer.data = peer.data, None
    room = rooms[member.room]
    room.discard(peer)
    if room:
        tell(member.room, Said(member.name, "(leaves)"), but=peer)
    else:
        del rooms[member.room]
