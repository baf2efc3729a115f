"""The rules that every connection must keep, and the reasons for which one ends."""

from __future__ import annotations

import enum
from math import inf
from typing import Any

import attrs

from stagetrio.outbox import WhenFull


class CloseReason(enum.Enum):
    """Why a connection ended."""

    ENDED = "ended"  #: the other side closed, after everything it sent was served
    RESET = "reset"  #: the connection was lost
    PROXY = "proxy"  #: it came through a proxy, and the header that says for whom was wrong or late
    HANDSHAKE = "handshake"  #: the connection was to be encrypted, and that failed or took too long
    PROTOCOL = "protocol"  #: the other side broke the rules of the wire
    SILENT = "silent"  #: no frame came within ``first_frame_within``
    IDLE = "idle"  #: no frame came within ``idle_within``
    VANISHED = "vanished"  #: nothing came within ``pong_within`` after it was pinged
    SLOW_FRAME = "slow frame"  #: a frame took longer than ``frame_within``, and came slower than ``min_receive_rate``
    SLOW_READER = "slow reader"  #: output was pending, and was read slower than ``min_send_rate``
    CLOSED = "closed"  #: `Peer.close` was called
    FAILED = "failed"  #: the handler failed, and the wire has no words to say so
    OUTBOX_FULL = "outbox full"  #: more was sent to it than it may have pending (`WhenFull.DISCONNECT`)
    FULL = "full"  #: the server has as many connections as it may
    REFUSED = "refused"  #: it was not admitted
    DRAINED = "drained"  #: the server shuts down


def _positive(instance: object, attribute: attrs.Attribute[Any], value: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{attribute.name} must be a number, not {value!r}")
    if not value > 0:
        raise ValueError(f"{attribute.name} must be positive, not {value!r}")


def _not_negative(instance: object, attribute: attrs.Attribute[Any], value: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{attribute.name} must be a number, not {value!r}")
    if not value >= 0:
        raise ValueError(f"{attribute.name} must not be negative, not {value!r}")


@attrs.frozen(kw_only=True)
class PeerLimits:
    """The rules for every peer of a server; ``math.inf`` (or a rate of 0) switches one off.

    Args:
        max_decoded: Messages queued or in hand, of one peer.
        max_input_bytes: Input held of one peer before its socket is left unread: what came since no message of it was
            queued or in hand. One read (64 KiB) and the frame that has begun may come on top.
        max_outbox_bytes: Output not yet taken by the kernel, of one peer.
        when_outbox_full: What becomes of messages sent (`Peer.send_nowait`, not replies) to a peer at that bound.
        first_frame_within: Seconds from the connection to its first complete frame.
        idle_within: Seconds without a complete frame.
        ping_after: Seconds without any input after which a peer is pinged (``ping`` of `stagetrio.server.serve_stage`);
            looked at once in that time, so that it is pinged after one to two times as long.
        pong_within: Seconds after a ping within which anything must come.
        frame_within: Seconds from the first byte of a frame to its last, for a peer slower than ``min_receive_rate``.
        min_receive_rate: Bytes per second at which a long frame may take longer than ``frame_within``.
        send_grace: Seconds over which the other side's reading is measured while output is pending.
        min_send_rate: Bytes per second the other side must read while output is pending.
        vanished_within: Seconds after which the other side of a TCP connection counts as lost if nothing at all comes
            from it, not even from its kernel, see `stagetrio.sockets.set_connection_options`.
        linger: Seconds from the end of a connection until it is closed without ceremony.
    """

    max_decoded: int = attrs.field(default=64, validator=_positive)
    max_input_bytes: float = attrs.field(default=262144, validator=_positive)
    max_outbox_bytes: float = attrs.field(default=262144, validator=_positive)
    when_outbox_full: WhenFull = attrs.field(default=WhenFull.REFUSE, validator=attrs.validators.instance_of(WhenFull))
    first_frame_within: float = attrs.field(default=30.0, validator=_positive)
    idle_within: float = attrs.field(default=inf, validator=_positive)
    ping_after: float = attrs.field(default=inf, validator=_positive)
    pong_within: float = attrs.field(default=10.0, validator=_positive)
    frame_within: float = attrs.field(default=10.0, validator=_positive)
    min_receive_rate: float = attrs.field(default=240.0, validator=_not_negative)
    send_grace: float = attrs.field(default=5.0, validator=_positive)
    min_send_rate: float = attrs.field(default=240.0, validator=_not_negative)
    vanished_within: float = attrs.field(default=90.0, validator=_positive)
    linger: float = attrs.field(default=5.0, validator=_positive)
