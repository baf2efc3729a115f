"""What becomes of one message: decoded, handled and replied to, or refused, or failed.

Every message that was admitted ends in exactly one of these ways, and each is counted:

============= ===================================================== ==================================================
outcome       when                                                  the peer gets
============= ===================================================== ==================================================
replied       the handler returned a reply, or None to a message    the reply, or `Done`
              with an id
refused       there was no room, or the handler raised              `Refused`, or what ``on_refused`` says
              `Overloaded`
failed        the handler raised anything else                      `Failed`, or, without a codec, the end of the
                                                                    connection
a mistake     the payload is not a message                          `Closed`, and the end of the connection
discarded     the connection had ended before                       nothing
undeliverable the connection ended while the handler ran            nothing
============= ===================================================== ==================================================
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar, cast

import trio

from stagetrio.codec import Closed, Codec, Done, Failed, Refused
from stagetrio.framing import ProtocolError
from stagetrio.limiter import Overloaded
from stagetrio.peer import Peer
from stagetrio.rules import CloseReason
from stagetrio.watchdog import BudgetExceeded

M = TypeVar("M")

MAX_WORDS = 200  # characters of a reason or an error that are told to a peer
Handler = Callable[[Peer[M], M], Coroutine[Any, Any, M | None]]
Item = tuple[Peer[Any], bytes]  # a peer and the payload of one of its frames


_GONE = object()  # stands for the reply to a message whose connection had ended before


async def _gone() -> object:
    return _GONE


class Exchange(Generic[M]):
    """Turns payloads into calls of a handler, and what comes of them into frames.

    Args:
        handler: Called with a peer and a message.
        encode: Makes a frame of a payload.
        codec: What the messages are; None: the payloads themselves.
        on_error: Called with a peer and what its handler raised; None: it propagates.
        on_refused: Without a codec: what to answer to a refused message.
    """

    def __init__(
        self,
        handler: Handler[M],
        encode: Callable[[bytes], bytes],
        codec: Codec[M] | None,
        on_error: Callable[[Peer[M], Exception], None] | None,
        on_refused: Callable[[Peer[M], Overloaded], bytes | None] | None,
    ) -> None:
        self._handler = handler
        self._encode = encode
        self._codec = codec
        self._on_error = on_error
        self._on_refused = on_refused
        self.discarded = self.refused = self.failed = self.undeliverable = 0

    @property
    def serve(self) -> Callable[[Item], Coroutine[Any, Any, Any]]:
        """The async function that serves one item; what it returns is for `served`."""
        return self._call if self._codec is None else self._serve_message

    @property
    def served(self) -> Callable[[Item, Any], object] | None:
        """What is to be done with an item and what `serve` returned for it."""
        return self._reply if self._codec is None else None

    # Without a codec the handler's own coroutine is what serves, with no other around it.

    def _call(self, item: Item) -> Coroutine[Any, Any, Any]:
        peer, payload = item
        if peer.closed:
            return _gone()
        return self._handler(peer, payload)  # type: ignore[arg-type] # messages are the payloads here

    def _reply(self, item: Item, reply: Any) -> None:
        peer = item[0]
        if reply is None:
            peer.done()
        elif reply is _GONE:
            self.discarded += 1
        elif not peer.reply(self._encode(reply)):
            self.undeliverable += 1

    async def _serve_message(self, item: Item) -> None:
        peer, payload = item
        if peer.closed:
            self.discarded += 1
            return
        codec = cast("Codec[M]", self._codec)
        try:
            message, id = codec.decode(payload)
        except ProtocolError as error:
            peer.end(CloseReason.PROTOCOL, error.reason)
            return
        reply: Any = await self._handler(peer, message)
        if reply is None:
            if id is None:
                peer.done()
                return
            reply = Done()
        if not peer.reply(self._encode(codec.encode(reply, id))):
            self.undeliverable += 1

    def failed_with(self, item: Item, error: Exception) -> None:
        """Answer to an item whose handler raised, and tell the owner."""
        peer, payload = item
        if isinstance(error, Overloaded):
            self.refuse(peer, payload, error)
        elif isinstance(error, trio.ClosedResourceError) and peer.closed:
            self.undeliverable += 1  # the handler wanted to send, and its peer was gone: a stranger's doing, no mistake
        else:
            self.failed += 1
            if self._on_error is None:
                raise error
            self._on_error(peer, error)
            told = isinstance(error, trio.TooSlowError | BudgetExceeded)
            words = str(error) if told else "the handler failed"
            if self._codec is None:
                peer.end(CloseReason.FAILED, words)
            else:
                self._answer(peer, payload, Failed(words[:MAX_WORDS]))
        peer.done()

    def refuse(self, peer: Peer[M], payload: bytes, overloaded: Overloaded) -> None:
        """Answer to a message that is not going to be handled, as there is no room."""
        self.refused += 1
        if self._codec is not None:
            self._answer(peer, payload, Refused(overloaded.reason, overloaded.retry_after))
        elif self._on_refused is not None:
            words = self._on_refused(peer, overloaded)
            if words is not None:
                self._put(peer, self._encode(words))

    def _answer(self, peer: Peer[M], payload: bytes, answer: Refused | Failed) -> None:
        """Reply to a message that was not handled, under its id."""
        codec = cast("Codec[M]", self._codec)
        try:
            _message, id = codec.decode(payload)
        except ProtocolError as error:
            peer.end(CloseReason.PROTOCOL, error.reason)
        else:
            try:
                frame = self._encode(codec.encode(answer, id))
            except ValueError:  # this framing has no room for it
                peer.end(CloseReason.FAILED, "the answer does not fit into a frame")
            else:
                self._put(peer, frame)

    def _put(self, peer: Peer[M], frame: bytes) -> None:
        if peer.closed:
            self.undeliverable += 1
        else:
            peer.put(frame)

    def frame_of(self, message: M) -> bytes:
        """Return the bytes of a frame with a message that nobody asked for."""
        if self._codec is None:
            return self._encode(cast("bytes", message))
        return self._encode(self._codec.encode(message))

    def farewell(self, words: str, retry_after: float) -> bytes | None:
        """Return the frame that says why a connection ends, if this wire has one."""
        if self._codec is None:
            return None
        try:
            return self._encode(self._codec.encode(Closed(words[:MAX_WORDS], retry_after)))
        except ValueError:  # this framing has no room for it
            return None
