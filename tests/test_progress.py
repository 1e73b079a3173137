"""progress.py: durations by hand, bars where there is a terminal alone; the time left in the training log."""
import re
import sys

import pytest

from progress import bar, duration


@pytest.mark.parametrize('seconds, text', [(0.2, '0 s'), (99, '99 s'), (99.6, '2 min'), (720, '12 min'),
                                           (5999, '1 h 40 min'), (11100, '3 h 05 min'), (90000, '25 h 00 min')])
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize('terminal, rank, drawn', [(True, '0', True), (True, '1', False), (False, '0', False)])
def test_a_bar_goes_to_a_terminal_alone_and_steps_are_kept(monkeypatch, capsys, terminal, rank, drawn):
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: terminal, raising=False)
    monkeypatch.setenv('RANK', rank)    # the first of several processes speaks
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert list(bar([1, 2, 3], 'evaluation')) == [1, 2, 3]
    out, err = capsys.readouterr()
    assert out == '' and ('evaluation' in err) == drawn


def test_a_log_line_ends_with_the_time_left(trained_once):
    lines = re.findall(r'^iter \d+: loss .*$', trained_once[1], re.M)
    number = r'\d+\.\d{4}'
    assert len(lines) == 12
    for line in lines:
        assert re.fullmatch(rf'iter \d+: loss {number} \((\w+ {number}(, )?)+\), time \d+\.\d\dms, [\d,]+ tokens/s, '
                            r'\d+ (s|min) left at this pace', line), line
