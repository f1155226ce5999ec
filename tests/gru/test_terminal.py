import pytest

from gru import terminal


def test_nothing_that_a_model_writes_controls_a_terminal() -> None:
    assert terminal.printable("a\x1b[2J\x07\tb\u202e\ud800\nç 狐") == "a\ufffd[2J\ufffd\tb\ufffd\ufffd\nç 狐"


def test_a_text_becomes_one_line() -> None:
    assert terminal.one_line("\n def f():\r\n\treturn  1\x1b[0m\n") == "def f(): return 1\ufffd[0m"
    assert terminal.one_line("x" * 11, most=10) == "x" * 9 + "…"
    assert terminal.one_line("x" * 10, most=10) == "x" * 10


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0:00"), (59.9, "0:59"), (61, "1:01"), (3599, "59:59"), (3600, "1:00:00"), (1e5, "27:46:40")],
)
def test_a_duration_has_hours_only_if_it_lasts_one(seconds: float, shown: str) -> None:
    assert terminal.duration(seconds) == shown


@pytest.mark.parametrize(
    ("values", "shown"),
    [([], ""), ([3.0], "▁"), ([2, 2], "▁▁"), ([9.0, 5.5, 2.0], "█▅▁"), ([3.5, 3.0, 3.25], "█▁▅")],
)
def test_a_sparkline_reaches_from_the_lowest_to_the_highest_bar(values: list[float], shown: str) -> None:
    assert terminal.sparkline(values) == shown


def test_a_long_sparkline_keeps_its_ends() -> None:
    values = [1.0, *[5.0] * 500, 9.0]
    assert terminal.sparkline(values, most=12) == "▁" + "▅" * 10 + "█"
