"""Bars of long steps."""

import pytest

from feature_repo.progress import BarLine, part_of


@pytest.fixture
def lines(capsys):
    """What a bar wrote last, by its title."""

    def read() -> dict[str, str]:
        written = capsys.readouterr().err.replace("\r", "\n").split("\n")
        return {line.split(":")[0]: line for line in written if ":" in line}

    return read


def test_a_bar_appears_with_its_first_news_and_ends_the_one_before(lines, capsys):
    with BarLine() as bars:
        read, learn = bars.bar("read", "rows"), bars.bar("learn", "steps")
        assert capsys.readouterr().err == ""
        read(5, 10)
        learn(1, 4, loss=0.25)
        assert "5/10" in lines()["read"]  # its last line: it has ended
        learn(3, 4, loss=0.125)
    found = lines()
    assert list(found) == ["learn"]
    assert "4/4" in found["learn"]
    assert "loss=0.1250" in found["learn"]


def test_a_bar_that_has_news_again_goes_on(lines):
    with BarLine() as bars:
        read, learn = bars.bar("read", "rows"), bars.bar("learn", "steps")
        read(5, 10)
        learn(4, 4)
        read(5, 10)
    assert "10/10" in lines()["read"]


def test_a_part_tells_of_the_whole():
    told = []
    part = part_of(lambda advance, total, **figures: told.append((advance, total, figures)), 30)
    part(2, 10, loss=0.5)
    assert told == [(2, 30, {"loss": 0.5})]
