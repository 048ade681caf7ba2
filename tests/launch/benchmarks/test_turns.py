"""Libraries in processes of their own: who is asked answers, and who can't is named with the reason."""

import pytest

from launch.benchmarks import timing, turns
from launch.benchmarks.timing import Row, Timing
from launch.benchmarks.turns import Peer, Turns


def peer(function, **options):
    return Peer(cases=f"support.peers:{function}", options=options)


def test_every_case_of_every_peer_answers_whatever_its_library_prints():
    calls = []
    peers = {"A": peer("chatty", word="answer"), "B": peer("single")}
    found = turns.take_turns(peers, repeats=2, ours={"mine": lambda: calls.append(1)})
    assert found.timings.keys() == {("A", "prints"), ("A", "prints more"), ("B", ""), "mine"} and found.absent == {}
    assert all(len(t.walls) == len(t.cpus) == 2 and t.best > 0 for t in found.timings.values())
    assert len(calls) == 3  # one is not timed


def test_cases_of_all_processes_take_turns(monkeypatch):
    asked = []
    monkeypatch.setattr(timing, "clocked", lambda case: (asked.append(case), (1.0, 1.0))[1])
    turns.take_turns({"A": peer("single"), "B": peer("single")}, repeats=5, ours={"mine": lambda: None})
    rounds = [{getattr(case, "peer", "mine") for case in asked[i : i + 3]} for i in range(0, 15, 3)]
    assert rounds == [{"A", "B", "mine"}] * 5


@pytest.mark.cases(2)
@pytest.mark.parametrize(
    ("function", "options", "why"),
    [
        ("no_library", {}, "OSError: no compiler is found"),
        ("fails", {}, "KeyError: 'no such module'"),
        ("dies", {"calls": 0}, "the process of A ended with status 3"),
        ("dies", {"calls": 2}, "the process of A ended with status 3"),
    ],
    ids=["cannot start", "cannot run", "dies at once", "dies later"],
)
def test_a_peer_that_fails_is_left_out_with_the_reason(function, options, why, capfd):
    found = turns.take_turns({"A": peer(function, **options), "B": peer("single")}, 2, ours={"mine": lambda: None})
    assert found.absent == {"A": why} and found.timings.keys() == {("B", ""), "mine"}
    row = Row(name="a", value=1.0)
    assert found.compared(row, "mine", "A", 1).skipped == f"A: {why}"
    assert found.compared(row, "mine", "B", 1).ratio > 0
    assert ("Traceback" in capfd.readouterr().err) == (function != "dies")


def test_a_peer_without_its_package_is_never_started():
    found = turns.take_turns({"A": Peer(cases="json:loads", packages=("no_such_package",))}, repeats=1)
    assert found.absent["A"].startswith("no_such_package not installed") and not found.timings


def test_a_missing_package_is_named_with_the_command_that_installs_it():
    assert turns.missing("json") == ""
    said = turns.missing("json", "no_such_package")
    assert said.startswith("no_such_package not installed") and "pip install" in said


def test_the_fastest_peer_is_one_that_was_measured():
    def timed(*walls):
        return Timing(walls=walls, cpus=walls)

    timings = {("A", ""): timed(3.0, 3.0, 3.0), ("B", ""): timed(9.0, 2.0, 2.0)}
    assert Turns(timings=timings, absent={"C": "not installed"}).fastest("CAB") == "B"
    assert Turns(timings={}, absent={"C": "not installed", "D": "not installed"}).fastest("CD") == "C"
