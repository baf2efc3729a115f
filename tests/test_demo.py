"""The parts of the demo that need no processes: who sends what, what is counted, what is said about it."""

from __future__ import annotations

import json
import math
import random
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
import trio

from stagetrio.demo import measure, plot, report, storm
from stagetrio.demo.measure import Slot, Tally
from stagetrio.demo.report import Row
from stagetrio.demo.runner import Figures
from stagetrio.demo.storm import CODEC, GROUPS, Ask, Database, Judge, Query, Storm


def test_there_are_200_clients() -> None:
    """The storm is the one that is announced."""
    assert sum(GROUPS.values()) == 200


def test_equal_storms_send_the_same_and_another_seed_does_not() -> None:
    """What is sent and when follows from the seed, the group and the client alone."""
    assert Storm(4, seed=7).schedule("polite", 3) == Storm(4, seed=7).schedule("polite", 3)
    assert Storm(4, seed=7).schedule("polite", 3) != Storm(4, seed=8).schedule("polite", 3)
    assert Storm(4, seed=7).schedule("polite", 3) != Storm(4, seed=7).schedule("polite", 4)


@pytest.mark.parametrize(("group", "rate"), [("polite", 5), ("burners", 1), ("slow", 5)])
def test_a_schedule_keeps_its_rate(group: str, rate: int) -> None:
    """Each period of the rate holds one message, in order, and none is due after the end."""
    sends = Storm(6, seed=1).schedule(group, 0)
    assert [math.floor(send.at * rate) for send in sends] == list(range(6 * rate))


def test_one_in_twenty_polite_messages_is_a_query() -> None:
    """Over all polite clients the share of queries is what it says, and the rest are small questions."""
    messages = [send.message for client in range(GROUPS["polite"]) for send in Storm(8).schedule("polite", client)]
    kinds = Counter(map(type, messages))
    assert set(kinds) == {Ask, Query}
    assert 0.04 < kinds[Query] / len(messages) < 0.06


def test_a_burner_burns_the_rounds_it_was_given() -> None:
    """The work of a burner is a fixed amount, the same for both servers."""
    assert {send.message for send in Storm(4, rounds=11).schedule("burners", 0)} == {Judge(11)}
    assert storm.judge(11) != storm.judge(12)


def test_twice_the_time_is_twice_the_rounds() -> None:
    """What is measured is how long a round takes; at least one is asked for."""
    assert storm.rounds_of(1e-12) == 1
    assert storm.rounds_of(10.0) > storm.rounds_of(0.01)


def test_every_message_survives_the_wire() -> None:
    """Both servers and the clients share one codec, and it knows what is sent."""
    for message in (Ask("a"), Query(1), Judge(2), storm.Fetch(3), storm.Answer("b"), storm.Page(b"c")):
        assert CODEC.decode(CODEC.encode(message, 4)) == (message, 4)
    assert len(storm.FRAMING.encode(CODEC.encode(storm.Page(bytes(storm.PAGE_BYTES)), 1))) < 65536


@pytest.mark.parametrize("seconds", [0, -1, 3600, math.inf, math.nan])
def test_a_storm_has_a_length(seconds: float) -> None:
    """A storm that would not begin or not end is refused, and the message says why."""
    with pytest.raises(ValueError, match=f"seconds must be above 0 and below 3600, not {seconds}"):
        Storm(seconds)


def test_the_database_is_slow_in_the_middle() -> None:
    """For 3 s, or for a third of a short storm."""
    assert Storm(20).database_slow == (8.5, 11.5)
    assert Storm(6).database_slow == (2, 4)


async def test_a_query_takes_5_ms_and_20_times_that_while_the_database_is_slow(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The time of a query is decided when it begins."""
    database = Database()
    began = trio.current_time()
    database.slow_between(began + 1, began + 2)
    for wait, takes in ((0, 0.005), (1, 0.1), (1, 0.005)):
        await trio.sleep(wait)
        asked = trio.current_time()
        assert await database.query(5) == "row 5"
        assert trio.current_time() - asked == pytest.approx(takes)
    assert (database.queries, database.most_at_once) == (3, 1)


async def test_the_database_takes_ten_queries_at_once(autojump_clock: trio.testing.MockClock) -> None:
    """The eleventh fails, and does not count; when one is done, or cancelled, there is room again."""
    database = Database()
    async with trio.open_nursery() as nursery:
        for key in range(10):
            nursery.start_soon(database.query, key)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(RuntimeError, match="too many queries at once: the database takes 10"):
            await database.query(10)
        nursery.cancel_scope.cancel()
    assert await database.query(11) == "row 11"
    assert (database.queries, database.most_at_once) == (11, 10)


def test_a_percentile_is_within_one_percent() -> None:
    """Buckets are 2 % wide, so what comes out is near the exact figure, from microseconds to seconds."""
    random_ = random.Random(5)
    values = sorted(10 ** random_.uniform(-5, 1) for _ in range(10_000))
    latencies = Counter(map(measure.bucket_of, values))
    for share in (0.01, 0.5, 0.9, 0.99, 1.0):
        exact = values[math.ceil(share * len(values)) - 1]
        assert measure.percentile(latencies, share) == pytest.approx(exact, rel=0.0101)


def test_the_median_of_two_is_the_lower() -> None:
    """A percentile is a latency that was measured, not one between two."""
    latencies = Counter(map(measure.bucket_of, (1.0, 2.0)))
    assert measure.percentile(latencies, 0.5) == pytest.approx(1.0, rel=0.0101)
    assert measure.percentile(latencies, 0.51) == pytest.approx(2.0, rel=0.0101)


def test_there_is_no_percentile_of_nothing() -> None:
    """Where nothing was served, no latency is made up."""
    assert measure.percentile(Counter(), 0.5) is None


def test_a_tally_counts_by_when_messages_were_due_and_replies_by_when_they_came() -> None:
    """A reply that comes late belongs to the slot of its message, and to the throughput of its own."""
    tally = Tally()
    tally.at(0.1).offered += 1
    tally.served(0.1, now=0.9)
    assert [(slot.offered, slot.served, slot.replies) for slot in tally.slots] == [
        (1, 1, 0),
        (0, 0, 0),
        (0, 0, 0),
        (0, 0, 1),
    ]
    assert measure.percentile(tally.slots[0].latencies, 0.5) == pytest.approx(0.8, rel=0.0101)
    assert tally.total(until=0.75).replies == 0
    assert tally.total().replies == 1


def test_a_tally_comes_back_from_json_as_it_was() -> None:
    """Processes send their tallies as JSON, which knows no integer keys."""
    tally = Tally()
    tally.at(0.3).offered += 2
    tally.served(0.3, now=0.31)
    tally.at(0.6).refused += 1
    tally.at(0.6).failed += 1
    assert Tally.from_plain(json.loads(json.dumps(tally.to_plain()))).slots == tally.slots


async def test_the_stall_clock_measures_how_late_a_sleeper_is(mock_clock: trio.testing.MockClock) -> None:
    """Time that passes while nobody is let run counts, less what the sleeper meant to sleep."""
    stalls = measure.StallClock()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stalls.run)
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(0.002)
        await trio.testing.wait_all_tasks_blocked()
        assert stalls.worst == pytest.approx(0, abs=1e-9)
        mock_clock.jump(0.302)
        await trio.testing.wait_all_tasks_blocked()
        assert stalls.worst == pytest.approx(0.3)
        stalls.reset()
        assert stalls.worst == 0
        nursery.cancel_scope.cancel()


async def test_memory_at_the_peak_is_remembered() -> None:
    """It is the most that was held, in bytes, also when it has been given back."""
    script = """
from stagetrio.demo.measure import peak_memory
before = peak_memory()
block = bytearray(30_000_000)
block[::1024] = bytes(len(block[::1024]))
del block
print(peak_memory() - before)
"""
    done = await trio.run_process([sys.executable, "-c", script], capture_stdout=True)
    assert 25_000_000 < int(done.stdout) < 40_000_000


async def test_open_connections_are_those_with_a_descriptor() -> None:
    """A peer's port is listed as long as its connection is held here, whoever holds it."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        client = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
        port = client.socket.getsockname()[1]
        async with client:
            server = await listener.accept()
            assert port in measure.open_peer_ports()
            await server.aclose()
            assert port not in measure.open_peer_ports()


def figures(side: str, *, latency: float, served: int = 98, stall: float = 0.1, disposed: int = 3) -> Figures:
    tallies = {name: Tally() for name in ("polite", "asks", "queries", "hogs", "burners")}
    for tally in tallies.values():
        tally.at(0.1).offered += 100
        for _ in range(served):
            tally.served(0.1, now=0.1 + latency)
        tally.at(0.1).refused += 1
    return Figures(
        side=side,
        seconds=4.0,
        tallies=tallies,
        worst_stall=stall,
        client_stalls=(0.001, 0.002),
        memory_before=20 << 20,
        memory_peak=30 << 20,
        disposed={"silent": 3, "slow": disposed},
        database_queries=5,
        database_most_at_once=2,
    )


SLOW = figures("control", latency=0.5, served=40, stall=0.8)
FAST = figures("staged", latency=0.05, stall=0.005, disposed=1)


def row(name: str) -> Row:
    return next(row for row in report.rows_of(SLOW, FAST) if row.name == name)


@pytest.mark.parametrize(
    ("name", "left", "right", "verdict", "mark"),
    [
        ("polite: served", "40.0 %", "98.0 %", "better", "better by 58 points"),
        ("polite: refused", "1.0 %", "1.0 %", "even", "even"),
        ("polite: latency p99", "498 ms", "50.1 ms", "better", "better 9.9x"),
        ("hogs: refused", "1.0 %", "1.0 %", None, ""),
        ("throughput", "30 /s", "74 /s", "better", "better 2.5x"),
        ("worst stall of the loop", "800 ms", "5 ms", "better", "better 160x"),
        ("memory, at the peak", "30.0 MiB", "30.0 MiB", "even", "even"),
        ("memory, grown in the storm", "10.0 MiB", "10.0 MiB", "even", "even"),
        ("silent clients disposed of", "3 of 3", "3 of 3", "even", "even"),
        ("slow clients disposed of", "3 of 3", "1 of 3", "worse", "worse"),
    ],
)
def test_a_row_says_who_won(name: str, left: str, right: str, verdict: str | None, mark: str) -> None:
    """Each row knows which way is better, and a loss is called one."""
    shown = row(name)
    assert (shown.verdict, shown.mark) == (verdict, mark)
    assert shown.text(shown.control) == left
    assert shown.text(shown.staged) == right


@pytest.mark.parametrize(
    ("better", "control", "staged", "verdict"),
    [
        ("lower", 1.0, 0.96, "even"),
        ("lower", 1.0, 0.94, "better"),
        ("lower", 0.94, 1.0, "worse"),
        ("higher", 0.94, 1.0, "better"),
        ("higher", 1.0, 0.94, "worse"),
        ("lower", None, 1.0, "better"),
        ("lower", 1.0, None, "worse"),
        ("lower", None, None, None),
        ("lower", 0.0, 0.0, "even"),
    ],
)
def test_closer_than_five_percent_is_even(
    better: str, control: float | None, staged: float | None, verdict: str | None
) -> None:
    """A difference that the noise of a machine makes is not called a win, and who has no value loses."""
    assert Row("x", "seconds", better, control, staged).verdict == verdict  # type: ignore[arg-type]


@pytest.mark.parametrize(("staged", "verdict"), [(0.996, "even"), (0.994, "worse")])
def test_shares_closer_than_half_a_point_are_even(staged: float, verdict: str) -> None:
    """Shares are near 1, where 5 % would hide a hundred lost messages in two thousand."""
    assert Row("x", "share", "higher", 1.0, staged).verdict == verdict


def test_the_summary_names_every_lost_row() -> None:
    """Who reads one line only is not misled."""
    assert report.summary(report.rows_of(SLOW, FAST)) == (
        "stagetrio is better in 12 of 17 rows and worse in 1: slow clients disposed of."
    )
    assert report.summary(report.rows_of(SLOW, figures("staged", latency=0.05))).endswith(" and worse in none.")


def test_what_nobody_served_has_no_latency() -> None:
    """A side that served nothing shows a dash, and that is a loss."""
    nothing = figures("staged", latency=0.05, served=0)
    rows = {shown.name: shown for shown in report.rows_of(SLOW, nothing)}
    assert rows["polite: latency p50"].text(rows["polite: latency p50"].staged) == "-"
    assert (rows["polite: latency p50"].verdict, rows["polite: latency p50"].mark) == ("worse", "worse")
    assert rows["polite: served"].verdict == "worse"


def test_json_holds_what_the_table_holds_and_its_counts_add_up() -> None:
    """Every message offered is served, refused, failed or unanswered."""
    plain = json.loads(json.dumps(report.as_plain(Storm(4, seed=3), SLOW, FAST)))
    polite = plain["control"]["groups"]["polite"]
    assert (polite["offered"], polite["served"], polite["refused"], polite["unanswered"]) == (100, 40, 1, 59)
    assert plain["storm"]["seed"] == 3
    assert len(plain["rows"]) == len(report.rows_of(SLOW, FAST))
    alone = report.as_plain(Storm(4), None, FAST)
    assert alone["control"] is None
    assert {shown["verdict"] for shown in alone["rows"]} == {None}


class _Page(HTMLParser):
    """What a page refers to, and what it draws."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.drawn: Counter[str] = Counter()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.drawn[tag] += 1
        self.references += [value or "" for name, value in attributes if name in ("src", "href")]


def test_an_html_plot_needs_nothing_but_itself(tmp_path: Path) -> None:
    """Both diagrams, all lines and the table are in one file that refers to no other."""
    target = tmp_path / "storm.html"
    plot.write(target, Storm(4), SLOW, FAST)
    text = target.read_text(encoding="utf-8")
    page = _Page(text)
    assert page.references == []
    assert "url(" not in text
    assert "@import" not in text
    assert page.drawn["svg"] == 2
    assert page.drawn["polyline"] == 6
    assert page.drawn["tr"] == 1 + len(report.rows_of(SLOW, FAST))
    assert "worse in 1: slow clients disposed of" in text


def test_an_html_plot_of_one_side_draws_that_side(tmp_path: Path) -> None:
    """Without the plain server there are half the lines and no verdict."""
    target = tmp_path / "storm.html"
    plot.write(target, Storm(4), None, FAST)
    assert _Page(target.read_text(encoding="utf-8")).drawn["polyline"] == 3
    assert "better in" not in target.read_text(encoding="utf-8")


def test_a_line_lies_where_its_values_are() -> None:
    """Each slot with a value is a point in its middle; slots without one are gaps, not zeros."""
    latency, replies = plot.panels_of(SLOW, FAST)
    (at, value) = latency.lines[0].points[0]
    assert at == measure.SLOT_SECONDS / 2
    assert value == pytest.approx(0.5, rel=0.0101)
    assert len(latency.lines[0].points) == 1
    assert [round(at, 3) for at, _ in replies.lines[0].points] == [0.625]
    assert replies.lines[0].points[0][1] == 3 * 40 / measure.SLOT_SECONDS


def test_a_png_plot_is_a_picture(tmp_path: Path) -> None:
    """With the extra installed, matplotlib draws it."""
    target = tmp_path / "storm.png"
    plot.write(target, Storm(4), SLOW, figures("staged", latency=0.05, served=0))
    assert target.read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("storm.pdf", "--plot writes .png or .html, not '.pdf'"),
        ("storm", "--plot writes .png or .html, not 'a file without an ending'"),
        ("no/such/storm.html", "there is no directory"),
        ("directory.html", "it is a directory"),
    ],
)
def test_a_plot_that_cannot_be_is_found_out_beforehand(tmp_path: Path, name: str, problem: str) -> None:
    """Nobody watches a storm for 20 s to hear that its picture cannot be written."""
    (tmp_path / "directory.html").mkdir()
    said = plot.check_target(tmp_path / name)
    assert said is not None
    assert problem in said
    assert "\n" not in said


def test_slots_add_up() -> None:
    """All counts of a slot are taken over, whichever they are."""
    one = Slot(1, 2, 3, 4, 5, Counter({6: 7}))
    one.add(Slot(10, 20, 30, 40, 50, Counter({6: 1, 8: 2})))
    assert one == Slot(11, 22, 33, 44, 55, Counter({6: 8, 8: 2}))
