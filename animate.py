"""Shows how a sequence is decoded, wave after wave: in the terminal as it happens, or state by state for a picture.

    python sample_simple.py --animate

A pass is a dict as sample_simple.py --save writes it. Colours and styles are rich's, which respects NO_COLOR:
https://rich.readthedocs.io
"""
import sys
import time
from itertools import groupby

from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

MASKED, GIVEN, FIRST, WAVE, REMASKED, CORRECTED = 'masked', 'given', 'first', 'wave', 'remasked', 'corrected'
# how a token was placed; each can be told without colour too
STYLES = {MASKED: 'dim', GIVEN: 'bold', FIRST: 'yellow italic', WAVE: 'cyan', CORRECTED: 'green italic underline',
          REMASKED: 'magenta underline'}
MEANINGS = {MASKED: 'masked', GIVEN: 'given', FIRST: 'by the language-model head', WAVE: 'by the sampler head',
            CORRECTED: 'corrected', REMASKED: 'written again'}
PLACEHOLDER = '░'    # of a mask


class Sequence:
    """The tokens of a sequence while it is decoded, and how each of them was placed.

    ids: the sequence before decoding, [MASK] where it is free.
    """

    def __init__(self, ids, mask_id):
        self.tokens, self.mask_id = list(ids), mask_id
        self.kinds = [MASKED if i == mask_id else GIVEN for i in ids]
        self.was_filled = set()

    def play(self, one):
        """Go through one pass, wave after wave; yields the positions that each wave fills."""
        start, waves, corrected = one['block_start'], {}, set(one.get('corrected_indices', ()))
        for at, (before, after) in enumerate(zip(one['input_masked'], one['output_unmasked'])):
            if before == self.mask_id:
                self.tokens[start + at], self.kinds[start + at] = self.mask_id, MASKED
                if after != self.mask_id:    # else a plan leaves it to a later pass
                    waves.setdefault(one['wave'][at], []).append(start + at)
        for wave in sorted(waves):
            for p in waves[wave]:
                self.tokens[p] = one['output_unmasked'][p - start]
                again = CORRECTED if p in corrected else REMASKED if p in self.was_filled else None
                self.kinds[p] = again or (WAVE if wave else FIRST)
                self.was_filled.add(p)
            yield waves[wave]

    @property
    def left(self):
        """How many tokens are masked."""
        return self.kinds.count(MASKED)


def before_decoding(sample):
    """A saved sample's ids with [MASK] where the first pass over a position has it."""
    ids = list(sample['tokens'])
    seen = set()
    for one in sample['iterations']:
        for p, token in enumerate(one['input_masked'], one['block_start']):
            if p not in seen:
                ids[p] = token
        seen |= set(range(one['block_start'], one['block_start'] + len(one['input_masked'])))
    return ids


def pieces_of(tokenizer):
    """A function from a token to the text that shows it: [MASK] as a shade, what has no picture as a question mark."""
    def piece(token):
        if token == tokenizer.mask_id:
            return PLACEHOLDER
        return ''.join(c if c.isprintable() or c == '\n' else ' ' if c == '\t' else '\ufffd'
                       for c in tokenizer.decode([token]))
    return piece


def lay_out(sequence, piece, width):
    """Lines of at most width cells, each a list of (text, kind, position); a line ends where the text says so."""
    lines, used = [[]], 0
    for p, (token, kind) in enumerate(zip(sequence.tokens, sequence.kinds)):
        for c in piece(token):
            if c == '\n' or used + cell_len(c) > width:
                lines.append([])
                used = 0
            if c != '\n':
                lines[-1].append((c, kind, p))
                used += cell_len(c)
    return lines


class Animation:
    """Plays the decoding of one sequence in the terminal, or prints it after each pass where there is none.

    Use it as a context; show(pass) takes as long as its waves at so many a second, which seconds adds up.
    """

    def __init__(self, ids, tokenizer, waves_per_second, console=None):
        self.sequence, self.piece = Sequence(ids, tokenizer.mask_id), pieces_of(tokenizer)
        self.delay, self.seconds, self.passes = 1 / waves_per_second, 0.0, 0
        self.console = console or Console(file=sys.stdout)
        self.live = None
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self.live = Live(console=self.console, auto_refresh=False)

    def __enter__(self):
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *error):
        if self.live:
            self.live.stop()

    def show(self, one):
        clock = time.perf_counter()
        self.passes += 1
        for number, filled in enumerate(self.sequence.play(one), 1):
            if self.live:
                self.live.update(self.picture(filled, number), refresh=True)
                time.sleep(self.delay)
        if not self.live:
            text = ''.join(map(self.piece, self.sequence.tokens))
            self.console.print(f'--- pass {self.passes}, {self.sequence.left} masked\n{text}', markup=False,
                               highlight=False, soft_wrap=True)
        self.seconds += time.perf_counter() - clock

    def picture(self, filled, wave):
        """What fits the window of the sequence, the tokens just filled within it, and a line that explains it."""
        fresh = set(filled)
        lines = lay_out(self.sequence, self.piece, self.console.width)
        kinds = [kind for kind in STYLES if kind in self.sequence.kinds]
        legend = in_rows([Text(MEANINGS[kind], style=STYLES[kind]) for kind in kinds], self.console.width)
        legend = legend[:max(1, self.console.height - 3)]
        height = max(1, self.console.height - 3 - len(legend))
        last = max((i for i, line in enumerate(lines) if any(p in fresh for _, _, p in line)), default=0)
        first = max(0, min(last - height // 2, len(lines) - height))
        shown = [Text.assemble(*((c, STYLES[kind] + (' reverse' if p in fresh else '')) for c, kind, p in line))
                 for line in lines[first:first + height]]
        status = f'pass {self.passes}, wave {wave}, {self.sequence.left} of {len(self.sequence.tokens)} masked'
        lines = [*shown, Text(status), *legend]
        for text in lines:
            text.no_wrap, text.overflow = True, 'crop'
        return Group(*lines)


def in_rows(texts, width, space='  '):
    """Texts side by side in as many rows as they need, none of them cut unless it is wider than a row."""
    rows = []
    for text in texts:
        if rows and rows[-1].cell_len + len(space) + text.cell_len <= width:
            rows[-1] = Text(space).join((rows[-1], text))
        else:
            rows.append(text)
    return rows


def runs_of(line):
    """A line's cells as (column, text, kind): neighbours of a kind together."""
    column = 0
    for kind, cells in groupby(line, key=lambda cell: cell[1]):
        text = ''.join(c for c, _, _ in cells)
        yield column, text, kind
        column += cell_len(text)
