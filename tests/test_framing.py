"""Frames come out whole or the peer hears why."""

from __future__ import annotations

import pytest
from fuzzed import TRIED
from hypothesis import given
from hypothesis import strategies as st

from stagetrio.framing import Framing, LengthPrefixed, Lines, ProtocolError

FRAMINGS: list[Framing] = [LengthPrefixed(50), Lines(50)]
payloads = st.lists(st.binary(max_size=50).filter(lambda b: b"\n" not in b and not b.endswith(b"\r")), max_size=20)


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    """Cut data into segments of the given sizes, the last one taking the rest."""
    segments = []
    for size in sizes:
        segments.append(data[:size])
        data = data[size:]
    return [*segments, data]


@pytest.mark.parametrize("framing", FRAMINGS, ids=repr)
@given(payloads=payloads, sizes=st.lists(st.integers(1, 70), max_size=30))
def test_frames_survive_any_segmentation(framing: Framing, payloads: list[bytes], sizes: list[int]) -> None:
    """However the network cuts the bytes, the same frames come out in the same order."""
    decoder = framing.decoder()
    wire = b"".join(framing.encode(payload) for payload in payloads)
    received = [frame for segment in cut(wire, sizes) for frame in decoder.receive_data(segment)]
    assert received == payloads
    assert decoder.buffered == 0
    decoder.receive_eof()


@pytest.mark.parametrize("framing", FRAMINGS, ids=repr)
@given(data=st.binary(max_size=400), sizes=st.lists(st.integers(1, 70), max_size=30))
def test_any_bytes_give_the_same_outcome_in_any_segmentation(framing: Framing, data: bytes, sizes: list[int]) -> None:
    """Frames, the mistake and its reason depend on the bytes alone; less than a frame and a segment is held."""
    TRIED["framing"] += 1

    def outcome(segments: list[bytes]) -> tuple[list[bytes], str]:
        decoder, frames = framing.decoder(), []
        try:
            for segment in segments:
                frames += decoder.receive_data(segment)
                assert decoder.buffered <= 54
            decoder.receive_eof()
        except ProtocolError as error:
            return frames + error.frames, error.reason
        return frames, ""

    assert outcome(cut(data, sizes)) == outcome([data])


def test_too_long_a_frame_is_found_by_its_prefix_alone() -> None:
    """Four bytes are enough to refuse a frame, and the frames in front of it are handed over."""
    decoder = LengthPrefixed(10).decoder()
    with pytest.raises(ProtocolError, match="frame of 11 bytes exceeds the limit of 10 bytes") as caught:
        decoder.receive_data(LengthPrefixed(10).encode(b"good") + b"\0\0\0\x0b")
    assert caught.value.frames == [b"good"]
    with pytest.raises(ProtocolError, match="after the end"):
        decoder.receive_data(b"")


def test_a_line_without_end_is_refused_at_the_bound() -> None:
    """A line is refused as soon as it is longer than the bound, without waiting for its end."""
    decoder = Lines(10).decoder()
    assert decoder.receive_data(b"0123456789\r") == []
    with pytest.raises(ProtocolError, match="line exceeds the limit of 10 bytes"):
        decoder.receive_data(b"x")
    with pytest.raises(ProtocolError, match="after the end"):
        decoder.receive_data(b"\n")


def test_a_line_of_the_longest_size_may_end_either_way() -> None:
    """The ending does not count: ten bytes fit into ten bytes with LF and with CRLF."""
    assert Lines(10).decoder().receive_data(b"0123456789\r\n0123456789\n") == [b"0123456789"] * 2


@pytest.mark.parametrize(("framing", "wire"), [(LengthPrefixed(10), b"\0\0\0\x05abc"), (Lines(10), b"abc")])
def test_the_end_inside_a_frame_is_a_mistake(framing: Framing, wire: bytes) -> None:
    """A connection closed in mid-frame has lost something, and says so."""
    decoder = framing.decoder()
    assert decoder.receive_data(wire) == []
    assert decoder.buffered == len(wire)
    with pytest.raises(ProtocolError, match="closed in mid-"):
        decoder.receive_eof()
    with pytest.raises(ProtocolError, match="after the end"):
        decoder.receive_data(b"more")


@pytest.mark.parametrize("framing", FRAMINGS, ids=repr)
def test_our_own_frame_that_is_too_long_is_our_error(framing: Framing) -> None:
    """Encoding checks the same bound, before anything is sent."""
    assert framing.encode(b"x" * 50)
    with pytest.raises(ValueError, match="payload of 51 bytes exceeds the limit of 50 bytes"):
        framing.encode(b"x" * 51)


@pytest.mark.parametrize("payload", [b"a\nb", b"a\r"])
def test_a_payload_that_is_not_one_line_is_our_error(payload: bytes) -> None:
    """What the other side would read as something else is not sent."""
    with pytest.raises(ValueError, match="one line"):
        Lines(50).encode(payload)


@pytest.mark.parametrize("cls", [LengthPrefixed, Lines])
@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-1, ValueError), (2**32, ValueError), (1.5, TypeError), (True, TypeError)]
)
def test_a_wrong_bound_is_named(cls: type, value: object, error: type[Exception]) -> None:
    """The message says which argument was wrong and what it was."""
    with pytest.raises(error, match=rf"max_bytes.*{value!r}"):
        cls(value)
