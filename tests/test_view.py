"""view.py: what it encodes and what it refuses; the page itself is in test_view_browser.py."""
import base64
import copy
import json
import os
import re
import zlib
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import ROOT
from saved_runs import data_of, hostile, large, tiny
from view import page, read, setting_text


# -----------------------------------------------------------------------------
# the data

def test_the_blob_holds_every_position_of_every_pass():
    data = data_of(page([('a.json', tiny())]))
    packed = data['runs'][0]
    raw = zlib.decompress(base64.b64decode(packed['blob']))
    n = 12
    tokens, waves = np.frombuffer(raw[:2 * n], '<u2'), np.frombuffer(raw[2 * n:4 * n], '<u2')
    scores, flags = np.frombuffer(raw[4 * n:5 * n], np.uint8), np.frombuffer(raw[5 * n:], np.uint8)
    assert ''.join(packed['pieces'][i] for i in tokens) == 'helxhellllo\n'
    assert waves.tolist() == [0, 1, 2, 3, 0, 0, 0, 1, 0, 0, 1, 2]
    assert scores.tolist() == [0, 26, 51, 230, 0, 26, 51, 76, 0, 0, 128, 255]
    assert flags.tolist() == [0, 1, 1, 3, 0, 0, 0, 1, 0, 0, 1, 1]
    assert packed['samples'][0]['passes'] == [[0, 0, 4], [1, 0, 4], [0, 2, 4]]
    assert packed['facts'][0] == 'mean quality 0.250 by the critic'


def test_text_never_becomes_part_of_the_page():
    html = page([('</script>', hostile())])
    plain = page([('a.json', tiny())])
    assert [html.count(word) for word in ('<', '<script', '</script')] == \
        [plain.count(word) for word in ('<', '<script', '</script')]
    assert set(hostile()['vocabulary']['chars'][:4]) <= set(data_of(html)['runs'][0]['pieces'])


def test_the_page_names_no_address():
    """Nothing is fetched: the only addresses are those of papers, in comments."""
    with open(os.path.join(ROOT, 'view.html'), encoding='utf-8') as f:
        code = [line for line in f if not line.lstrip().startswith('//')]
    assert not any(re.search(r'https?:|\bsrc=|\bhref=|@import|url\(', line) for line in code)


def test_two_runs_of_16_samples_of_1024_tokens_in_15_passes_are_under_2_mb():
    assert len(page([('a.json', large(1024, 15, 16)), ('b.json', large(1024, 15, 16, seed=1))])) < 2e6


def test_byte_pairs_show_as_their_texts(monkeypatch):
    monkeypatch.setattr('corpus.gpt2_encoding', lambda: SimpleNamespace(decode=lambda ids: f' w{ids[0]}'))
    saved = tiny()
    saved['vocabulary'] |= {'kind': 'gpt2', 'chars': []}
    packed = data_of(page([('a.json', saved)]))['runs'][0]
    assert packed['pieces'] == [' w0', ' w1', ' w2', ' w3', ' w4', ' w5', ' w6'] and packed['placeholder'] == '░░░'


def test_settings_that_differ():
    rows = data_of(page([('a', tiny(iterations=4, top_p=1.0)), ('b', tiny(save='b.json'))]))['settings']
    assert {row['cells'][0]: row['differs'] for row in rows} == {
        'iterations': True, 'use_sampler': False, 'seed_text': False, 'top_p': True}
    assert rows[0]['cells'] == ['iterations', '4', '2']
    naive = data_of(page([('a', tiny(plan='blocks')), ('b', tiny(plan='wavefront', use_sampler=False))]))
    assert {'cells': ['plan', 'blocks', '-'], 'differs': True} in naive['settings']    # it has no plan to speak of
    decoders = [run['facts'][1:3] for run in naive['runs']]
    assert decoders == [['sampler head, blocks', '3 forward passes'], ['naive', '3 forward passes']]
    texts = {0.30000001: '0.3', True: 'true', None: '-', 'a b': 'a b', (1.0, 0.5): '[1.0, 0.5]'}
    assert [setting_text(value) for value in texts] == list(texts.values()) and setting_text([1.0, 0.5]) == '1, 0.5'
    assert setting_text([0.9, 0.8, 0.7, 0.6, 0.5]) == '0.9, 0.8 … 0.5 (5 values)'


# -----------------------------------------------------------------------------
# the command

def view(script, *args):
    return script('view.py', *args)


def test_a_real_file_of_several_blocks(script, trained, tmp_path):
    flags = ['--out-dir', trained, '--iterations', 3, '--num-samples', 2, '--sequence-length', 64, '--no-progress']
    for name, more in (('a', []), ('b', ['--disable-sampler'])):
        status, _, err = script('sample_simple.py', *flags, *more, '--save', tmp_path / f'{name}.json')
        assert status == 0, err
    status, out, err = view(script, tmp_path / 'a.json', tmp_path / 'b.json', '-o', tmp_path / 'c.html')
    assert status == 0 and 'MB' in out and err == ''
    runs = data_of((tmp_path / 'c.html').read_text())['runs']
    saved = read(tmp_path / 'a.json')
    assert [''.join(runs[0]['pieces'][i] for i in s['tokens']) for s in runs[0]['samples']] == \
        [s['text'] for s in saved['samples']]
    assert len(runs[0]['samples'][0]['passes']) == len(saved['samples'][0]['iterations']) > 3


def damage(change):
    saved = copy.deepcopy(tiny())
    change(saved, saved['samples'][0]['iterations'][0])
    return json.dumps(saved)


@pytest.mark.parametrize('content, message', [
    (None, 'cannot read'), ('{"schema": 2', 'is not JSON'), ('[' * 100_000, 'is not JSON'), ('[1]', 'schema None'),
    ('\0\xff', 'is not JSON'), ('{"schema": 1}', 'schema 1, wanted 2'), ('{"schema": 2}', 'KeyError'),
    (damage(lambda s, p: p['wave'].pop()), 'length'), (damage(lambda s, p: p['wave'].__setitem__(0, 70000)), 'wave'),
    (damage(lambda s, p: p['output_unmasked'].__setitem__(0, 12)), 'token'),
    (damage(lambda s, p: p['output_unmasked'].__setitem__(0, 'x')), 'ValueError'),
    (damage(lambda s, p: p['remask_score'].__setitem__(0, 1.5)), 'remask_score'),
    (damage(lambda s, p: p['remask_score'].__setitem__(0, float('nan'))), 'remask_score'),
    (damage(lambda s, p: p.update(remasked_indices=[4])), 'remasked_indices'),
    (damage(lambda s, p: p.update(corrected_indices=[4])), 'corrected_indices'),
    (damage(lambda s, p: p.pop('remasked_indices')), 'KeyError'),
    (damage(lambda s, p: p.update(block_start=5)), 'out of range'),
    (damage(lambda s, p: s.update(samples=[])), 'ValueError'), (damage(lambda s, p: s.update(samples=7)), 'TypeError'),
    (damage(lambda s, p: s['samples'][0].update(quality='good')), 'damaged'),
    (damage(lambda s, p: s.update(settings=[])), 'damaged'), (damage(lambda s, p: s.update(seconds='1')), 'damaged')])
def test_bad_files_are_one_line(script, tmp_path, content, message):
    if content is not None:
        (tmp_path / 'a.json').write_text(content, encoding='latin-1' if '\xff' in content else 'utf-8')
    status, _, err = view(script, tmp_path / 'a.json', '-o', tmp_path / 'a.html')
    assert status == 2 and err.count('\n') == 1 and message in err and 'sample_simple.py --save' in err, err
    assert not (tmp_path / 'a.html').exists()


def test_only_what_it_made_is_replaced(script, tmp_path):
    (tmp_path / 'a.json').write_text(json.dumps(tiny()))
    for name in ('a.html', 'a.svg'):
        output = tmp_path / name
        assert view(script, tmp_path / 'a.json', '-o', output)[0] == 0
        assert view(script, tmp_path / 'a.json', '-o', output)[0] == 0
        output.write_text(mine := '<!DOCTYPE html>\n<!-- saved from elsewhere -->')
        status, _, err = view(script, tmp_path / 'a.json', '-o', output)
        assert status == 2 and 'would replace a file that holds something else' in err and output.read_text() == mine


def test_bad_arguments_are_one_line(script, tmp_path):
    (tmp_path / 'a.json').write_text(json.dumps(tiny()))
    path = tmp_path / 'a.json'
    for args, message in (([path] * 3, 'found 3 files'), ([path, '-o', path], 'wanted the name of a page'),
                          ([path, '-o', 'view.html'], 'wanted the name of a page'),
                          ([path, '-o', tmp_path / 'a.html', '--sample', 0], 'found --sample 0 with a page'),
                          ([path, '-o', tmp_path / 'no' / 'a.html'], 'cannot write')):
        status, _, err = view(script, *args)
        assert status == 2 and err.count('\n') == 1 and message in err, err
    assert read(path) == tiny()
