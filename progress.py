"""How far a long step is: bars on standard error, none where that is no terminal; times and passes in words."""
import sys

from tqdm import tqdm

from environment import rank_and_world


def bar(steps, what):
    """Go through steps, with a bar that is gone when they are done."""
    return tqdm(steps, what, leave=False, disable=bool(rank_and_world()[0]) or not sys.stderr.isatty())


def duration(seconds):
    """'50 s', '12 min', '3 h 05 min': as exact as an estimate deserves."""
    if seconds < 99.5:
        return f'{seconds:.0f} s'
    minutes = round(seconds / 60)
    return f'{minutes} min' if minutes < 100 else f'{minutes // 60} h {minutes % 60:02} min'


def passes_text(n):
    return f'{n} forward pass' + ('es' if n > 1 else '')
