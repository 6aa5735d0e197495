"""How many pictures are drawn at once follows what was measured."""

from __future__ import annotations

import pytest

from runners.pace import Pace


def measured(seconds: dict[int, float], times: int = 8) -> Pace:
    pace = Pace()
    for pictures, each in seconds.items():
        for i in range(times):
            pace.note(pictures, each * (1 + i))  # only the fastest counts
    return pace


@pytest.mark.parametrize(
    ("seconds", "worth"),
    [
        ({}, 8),
        ({1: 1.0, 2: 1.2, 4: 1.6, 8: 2.4}, 8),  # a processor that is not full
        ({1: 1.0, 2: 2.0}, 1),  # full with one
        ({1: 1.0, 2: 1.5, 4: 2.99}, 2),  # full with two
        ({2: 1.0, 4: 1.5}, 8),  # still rising: more are tried
        ({1: 1.0, 2: 1.99, 8: 4.0}, 8),  # a plateau in between
    ],
)
def test_a_batch_grows_while_more_pictures_a_second_come_of_it(seconds: dict[int, float], worth: int) -> None:
    assert measured(seconds).worth(8) == worth
    assert measured(seconds).worth(1) == 1
    assert measured(seconds, times=2).worth(8) == 8  # too few to judge by


def test_what_was_measured_long_ago_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    pace = measured({1: 1.0, 2: 2.0})
    assert pace.worth(8) == 1
    monkeypatch.setattr("runners.pace._FRESH_S", 0)
    assert pace.worth(8) == 8
