"""animate.py: states by hand, what fits a window, NO_COLOR, plain lines where there is no terminal."""
import io
import re

import pytest
from rich.console import Console
from rich.text import Text
from saved_runs import STATES, corrected, ids_of, one_pass, tiny

from animate import MEANINGS, STYLES, Animation, Sequence, before_decoding, in_rows, lay_out, pieces_of
from corpus import Tokenizer

SAVED = tiny()
TOKENIZER = Tokenizer(SAVED['vocabulary'])
SAMPLE = SAVED['samples'][0]


def text_of(sequence):
    return ''.join(map(pieces_of(TOKENIZER), sequence.tokens))


def test_the_states_are_those_of_the_page():
    """view.html shows the same file in the same steps, but for the one before each pass."""
    sequence = Sequence(before_decoding(SAMPLE), TOKENIZER.mask_id)
    states = [text_of(sequence)]
    for one in SAMPLE['iterations']:
        states += [text_of(sequence) for _ in sequence.play(one)]
    assert states == [STATES[i] for i in (0, 1, 2, 3, 5, 7, 8)]
    assert sequence.kinds == ['given', 'wave', 'wave', 'remasked', 'wave', 'wave', 'given']


def test_what_a_plan_leaves_to_later_passes_stays_masked():
    sequence = Sequence(ids_of('____'), TOKENIZER.mask_id)
    filled = [list(sequence.play(one)) for one in (
        one_pass(0, 0, '____', 'he__', [0, 1, 0, 0], [0] * 4, [2, 3]),
        one_pass(1, 0, 'he__', 'hell', [0, 1, 0, 1], [0] * 4))]
    assert filled == [[[0], [1]], [[2], [3]]] and sequence.kinds == ['first', 'wave', 'first', 'wave']
    assert text_of(sequence) == 'hell' and sequence.left == 0


def test_a_corrected_token_is_told_from_a_remasked_one():
    sample = corrected()['samples'][0]
    sequence, kinds = Sequence(before_decoding(sample), TOKENIZER.mask_id), []
    for one in sample['iterations']:
        list(sequence.play(one))
        kinds.append(sequence.kinds[1:4])
    assert kinds == [['corrected', 'wave', 'first'], *[['corrected', 'wave', 'remasked']] * 2]
    one = dict(sample['iterations'][0])
    del one['corrected_indices']    # a file of before
    old = Sequence(before_decoding(sample), TOKENIZER.mask_id)
    list(old.play(one))
    assert old.kinds[1] == 'wave'


def terminal(width=20, height=12):
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system='truecolor')


def played(console, passes=SAMPLE['iterations'], ids=None):
    ids = ids or before_decoding(SAMPLE)
    with Animation(ids, TOKENIZER, 1000, console) as animation:
        for one in passes:
            animation.show(one)
    return console.file.getvalue(), animation


def test_the_terminal_shows_every_wave_in_colour():
    out, animation = played(terminal(width=80))
    assert '\x1b[' in out and 'pass 1, wave 1, 4 of 7 masked' in out
    assert 'pass 3, wave 2, 0 of 7 masked' in out and 'by the sampler head' in out and animation.seconds > 0
    assert '\x1b[1mh' in out and '\x1b[2m░' in out and '\x1b[7;36me' in out    # given, masked, just filled


def test_no_color_is_respected(monkeypatch):
    monkeypatch.setenv('NO_COLOR', '1')
    out, _ = played(terminal(width=80))
    assert '\x1b[7me' in out and '36m' not in out and '35m' not in out and '4m' in out    # but underlined


def test_every_kind_can_be_told_without_colour(monkeypatch):
    monkeypatch.setenv('NO_COLOR', '1')
    shown = set()
    for style in STYLES.values():
        console = terminal()
        console.print(Text('x', style=style), end='')
        shown.add(console.file.getvalue())
    assert len(shown) == len(STYLES) == 6


@pytest.mark.parametrize('width', [30, 38, 80, 200])
def test_no_word_of_the_legend_is_cut(width):
    texts = [Text(meaning, style=STYLES[kind]) for kind, meaning in MEANINGS.items()]
    rows = in_rows(texts, width)
    assert all(row.cell_len <= width for row in rows) and (len(rows) == 1) == (width == 200)
    assert '  '.join(row.plain for row in rows) == '  '.join(MEANINGS.values())
    assert {span.style for row in rows for span in row.spans} | {row.style for row in rows} >= set(STYLES.values())
    console = terminal(width, 24)
    animation = Animation(ids_of('h_____'), TOKENIZER, 1000, console)
    animation.sequence.kinds = list(STYLES)
    console.print(animation.picture([], 1))
    assert all(meaning in console.file.getvalue() for meaning in MEANINGS.values())


@pytest.mark.parametrize('width, height', [(7, 6), (20, 5), (40, 24)])
def test_it_fits_the_window_and_follows_what_is_filled(width, height):
    n = 300
    passes = [{'iteration': 0, 'block_start': 0, 'input_masked': [TOKENIZER.mask_id] * n,
               'output_unmasked': [i % 5 for i in range(n)], 'wave': list(range(n)), 'remasked_indices': []}]
    animation = Animation([TOKENIZER.mask_id] * n, TOKENIZER, 1000, terminal(width, height))
    for number, filled in enumerate(animation.sequence.play(passes[0])):
        if number % 50 == 0 or number == n - 1:
            console = terminal(width, height)
            console.print(animation.picture(filled, number))
            shown = Console(file=io.StringIO(), width=width, height=height)
            shown.print(animation.picture(filled, number))
            lines = shown.file.getvalue().rstrip('\n').split('\n')
            assert len(lines) <= height and all(len(line.rstrip()) <= width for line in lines)
            assert re.search(r'\x1b\[(3;)?7[m;]', console.file.getvalue()), 'what was just filled is within the window'


def test_plain_lines_where_there_is_no_terminal():
    out, _ = played(Console(file=io.StringIO(), width=5))
    assert out == '--- pass 1, 2 masked\nhelx░░!\n--- pass 2, 2 masked\nhell░░!\n--- pass 3, 0 masked\nhello\n!\n'


def test_lines_end_where_the_text_says_so_and_wide_characters_take_two_cells():
    tokenizer = Tokenizer({'name': 'x', 'kind': 'char', 'chars': ['東', 'a', '\n', '\x1b', '\t'], 'vocab_size': 6})
    lines = lay_out(Sequence([0, 0, 1, 2, 3, 4, 5], 5), pieces_of(tokenizer), 4)
    assert [''.join(c for c, _, _ in line) for line in lines] == ['東東', 'a', '\ufffd ░']


def test_the_flag(script, trained_once):
    flags = ['--out-dir', trained_once[0], '--iterations', 2, '--num-samples', 3, '--no-progress', '--batch-size', 2,
             '--plan', 'blocks']
    status, out, err = script('sample_simple.py', *flags, '--animate', 50)
    assert status == 0, err
    assert out.count('--- pass') == 2 and out.count('--- sample') == 3 and '░' in out
    plain = script('sample_simple.py', *flags)[1]
    assert plain.split('--- sample 0')[1].split('samples of')[0] in out
    assert script('sample_simple.py', *flags, '--animate', 0)[0] == 2
