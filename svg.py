"""An animated SVG of how samples were decoded: view.py FILE -o x.svg writes it, a README can show it.

Every stretch of text is drawn once and shown from one frame to another by CSS, which browsers play in an <img> too.
Whoever asks for reduced motion sees the finished text.
"""
from html import escape
from itertools import chain

from animate import (CORRECTED, FIRST, GIVEN, MASKED, MEANINGS, REMASKED, WAVE, Sequence, before_decoding, lay_out,
                     pieces_of, runs_of)
from corpus import Tokenizer
from errors import InputError

CELL, LINE, MARGIN, GAP = 8.4, 18, 14, 28    # pixels: width of a character, height of a line, around, between panels
PER_SECOND, HOLD = 20, 40    # frames: waves in a second; how many the finished text stands
COLUMNS = (72, 48)           # characters in a line, of one run and of two
# Okabe and Ito's colours, which the colour-blind can tell apart, on white and on black: https://jfly.uni-koeln.de/color
COLOURS = {MASKED: ('#8a8a84', '#77776f'), GIVEN: ('#1d1d1b', '#f2f0ea'), FIRST: ('#b35900', '#e69f00'),
           WAVE: ('#0060a0', '#56b4e9'), CORRECTED: ('#007556', '#2fc79a'), REMASKED: ('#a03c78', '#e18fc0')}
# told apart without colour, as in the terminal
MARKS = {GIVEN: 'font-weight:bold', FIRST: 'font-style:italic', REMASKED: 'text-decoration:underline',
         CORRECTED: 'font-style:italic;text-decoration:underline'}


def animated(saves, sample=0):
    """The SVG: saves is one or two of (title, what --save wrote), played pass by pass in step, side by side.

    sample: which of each file's. InputError where there is no such sample.
    """
    panels, columns = [], COLUMNS[len(saves) - 1]
    for title, saved in saves:
        if not 0 <= sample < len(saved['samples']):
            raise InputError(f'--sample is {sample}, {title!r} has samples 0 to {len(saved["samples"]) - 1}')
        panels.append((title, passes_of(saved, sample, columns)))
    lengths = [max(len(passes[r]) for _, passes in panels if r < len(passes))
               for r in range(max(len(passes) for _, passes in panels))]
    n = sum(lengths)
    drawn = [in_step(passes, lengths) for _, passes in panels]
    rows = max(len(lines) for frames in drawn for lines in frames)
    width = 2 * MARGIN + len(panels) * columns * CELL + (len(panels) - 1) * GAP
    stretches = {}    # {(first frame, frame after the last): [element]}
    for k, ((title, _), frames) in enumerate(zip(panels, drawn)):
        x = MARGIN + k * (columns * CELL + GAP)
        stretches.setdefault((0, n), []).append(text_element(x, 0, title, 'title', columns))
        for (row, column, text, kind), span in stretches_of(frames):
            stretches.setdefault(span, []).append(text_element(x + column * CELL, row + 1.5, text, kind))
    kinds = [kind for kind in COLOURS if any(f'class="{kind}"' in one for one in chain(*stretches.values()))]
    x, row = MARGIN, rows + 2
    for kind in kinds:
        if x > MARGIN and x + len(MEANINGS[kind]) * CELL > width - MARGIN:
            x, row = MARGIN, row + 1
        stretches[0, n].append(text_element(x, row, MEANINGS[kind], kind))
        x += (len(MEANINGS[kind]) + 2) * CELL
    height = 2 * MARGIN + (row + 1) * LINE
    spans = sorted(stretches)
    body = '\n'.join(f'<g class="{class_of(span, n)}">{"".join(stretches[span])}</g>' for span in spans)
    return f'''<!-- made by view.py -->
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img">
<title>{escape(", ".join(title for title, _ in saves))}</title>
<style>
{style(spans, n)}
</style>
<rect class="page" width="100%" height="100%" rx="6"/>
{body}
</svg>
'''


def passes_of(saved, sample, columns):
    """The lines of a sample after every wave: [[lines of a wave] of a pass], the first pass begins with the start."""
    tokenizer, chosen = Tokenizer(saved['vocabulary']), saved['samples'][sample]
    sequence, piece = Sequence(before_decoding(chosen), tokenizer.mask_id), pieces_of(tokenizer)
    passes = [[lay_out(sequence, piece, columns)]]
    for one in chosen['iterations']:
        passes.append([lay_out(sequence, piece, columns) for _ in sequence.play(one)] or [passes[-1][-1]])
    return passes


def in_step(passes, lengths):
    """Frames of a run in which pass r takes lengths[r] of them; what is through waits for the others."""
    frames = []
    for r, length in enumerate(lengths):
        made = passes[r] if r < len(passes) else [passes[-1][-1]]
        frames += made + [made[-1]] * (length - len(made))
    return frames


def stretches_of(frames):
    """Runs of text, (row, column, text, kind), and the frames [first, after the last) in which they stand so."""
    standing = {}
    for number, lines in enumerate([*frames, []]):
        now = {(row, *run) for row, line in enumerate(lines) for run in runs_of(line)}
        for gone in [run for run in standing if run not in now]:
            yield gone, (standing.pop(gone), number)
        for run in sorted(now):    # a set has another order in every process
            standing.setdefault(run, number)


def text_element(x, row, text, kind, columns=None):
    """A line of text whose characters stand in cells whatever the font is."""
    y, text = MARGIN + (row + 0.75) * LINE, text[:columns]
    length = f' textLength="{len(text) * CELL:g}"' if columns is None else ''
    return f'<text class="{kind}" x="{x:g}" y="{y:g}"{length}>{escape(text)}</text>'


def class_of(span, n):
    return 'always' if span == (0, n) else f'a{span[0]}-{span[1]}' + (' end' if span[1] == n else '')


def style(spans, n):
    """Colours, and when each group of stretches is seen."""
    lines = ['text{font:14px ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;white-space:pre}',
             '.title{font-weight:bold}', *(f'.{kind}{{{mark}}}' for kind, mark in MARKS.items())]
    colours = COLOURS | {'page': ('#fff', '#16171a'), 'title': COLOURS[GIVEN]}
    light, dark = (''.join(f'.{name}{{fill:{pair[i]}}}' for name, pair in colours.items()) for i in (0, 1))
    lines += [light, f'@media(prefers-color-scheme:dark){{{dark}}}',
              f'g:not(.always){{animation:{(n + HOLD) / PER_SECOND:g}s step-end infinite}}']
    for span in spans:
        if span != (0, n):
            name, (start, end) = f'a{span[0]}-{span[1]}', (f'{100 * frame / (n + HOLD):.4g}%' for frame in span)
            seen = '0%{opacity:1}' if span[0] == 0 else f'0%{{opacity:0}}{start}{{opacity:1}}'
            seen += '' if span[1] == n else f'{end}{{opacity:0}}100%{{opacity:0}}'
            lines += [f'@keyframes {name}{{{seen}}}', f'g.{name}{{animation-name:{name}}}']
    lines.append('@media(prefers-reduced-motion:reduce){g:not(.always){animation:none;opacity:0}g.end{opacity:1}}')
    return '\n'.join(lines)
