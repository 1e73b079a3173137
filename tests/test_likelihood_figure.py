"""likelihood_table.py: the table's words, and a figure that shows what is interesting and names the rest."""
import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import pytest

from likelihood_table import HIGHEST, compared, name_what_is_above, plot, table


def entry(decoder, plan, passes, bits, seconds=1.0):
    return {'decoder': decoder, 'plan': plan, 'passes': passes, 'passes_made': passes, 'waves': passes,
            'nats_per_token': bits * 0.6931, 'error': 0.01, 'minus_baseline': None, 'minus_baseline_error': None,
            'bits_per_character': bits, 'seconds': seconds, 'seconds_1': seconds}


ENTRIES = [entry('nelbo', 'random', 256, 2.3, None), entry('ar_baseline', 'left-to-right', 256, 2.0),
           entry('naive', 'random', 1, 4.83), entry('naive', 'interleaved', 1, 4.83), entry('naive', 'random', 16, 2.4),
           entry('sampler_head', 'blocks', 4, 2.2)]


@pytest.mark.parametrize('key', ['passes_made', 'seconds'])
def test_a_point_beyond_the_axis_is_named(key):
    """One pass of naive decoding took four fifths of the height."""
    figure, axis = plt.subplots()
    axis.plot([e[key] for e in ENTRIES[2:]], [e['bits_per_character'] for e in ENTRIES[2:]])
    name_what_is_above(axis, ENTRIES, key)
    assert axis.get_ylim()[1] == pytest.approx(HIGHEST * 2.0)
    assert [text.get_text() for text in axis.texts] == ['\u2191 naive, 1 pass: 4.83']
    name_what_is_above(axis, ENTRIES[4:], key)    # nothing is above: nothing more is said
    assert len(axis.texts) == 1
    plt.close(figure)


def test_the_table_says_decoders_in_plain_words():
    lines = table(ENTRIES).splitlines()[2:]
    assert [line.split(' | ')[0].strip('| ') for line in lines] == [
        'transformer alone (bound)', 'autoregressive, same-size trunk', 'naive', 'naive', 'naive', 'sampler head']


def test_differences_are_paired():
    """Sequences differ more than decoders do: their spread is in either mean, not in the difference."""
    values = {'nelbo': None, 'ar_baseline': [1.0, 3.0, 5.0], 'naive': [1.5, 3.5, 5.5], 'sampler_head': [0.5, 3.0, 4.0]}
    entries = [entry(decoder, 'x', 1, 2.0) | {'values': found} for decoder, found in values.items()]
    found = [(e['minus_baseline'], e['minus_baseline_error']) for e in compared(entries)]
    assert found[:3] == [(None, None), (None, None), (0.5, 0.0)]
    assert found[3] == pytest.approx((-0.5, 0.5 / 3 ** 0.5)) and not any('values' in e for e in entries)
    assert table(entries).splitlines()[-1].split(' | ')[5] == '-0.500 ±0.289'
    entries = compared([entry('sampler_head', 'x', 1, 2.0) | {'values': [1.0, 2.0]}])    # no baseline is so long
    assert entries[0]['minus_baseline'] is None


def test_the_figure_is_written_with_the_same_words(tmp_path):
    plot(ENTRIES, 'toy', str(tmp_path / 'x'))
    assert (tmp_path / 'x.png').read_bytes()[:4] == b'\x89PNG' and not plt.get_fignums()
    svg = (tmp_path / 'x.svg').read_text()
    for word in ('sampler head, blocks', 'naive, random', 'transformer alone (bound)'):
        assert f'<!-- {word} -->' in svg
