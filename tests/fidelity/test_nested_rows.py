"""Each operation of the recordings with nested guests is compared; nested_rows.toml says how exactly."""

from __future__ import annotations

from .nested_rows import compared, inexact_steps, rows, table


def test_each_recorded_operation_is_compared() -> None:
    recorded = rows()["operations"]
    assert {name: len(operations) for name, operations in compared().items()} == recorded
    assert sum(recorded.values()) == 612


def test_the_list_of_inexact_steps_is_complete() -> None:
    entries = rows()["inexact"]
    not_compared = {
        (recording, entry["step"])
        for entry in entries
        if "not compared" in entry["what"]
        for recording in entry["recordings"]
    }
    assert not_compared == inexact_steps()
    more = {entry["step"] for entry in entries if "more than was recorded" in entry["what"]}
    assert more == {"delete", "touch-resumed"}


def test_the_table_names_each_recording_and_reason() -> None:
    printed = table()
    for name in rows()["operations"]:
        assert f"\n{name} " in printed
    for entry in rows()["inexact"]:
        assert entry["why"] in printed
