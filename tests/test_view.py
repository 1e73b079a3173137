"""view.py: what it encodes, what it refuses, and the page in a headless browser."""
import base64
import copy
import json
import os
import re
import shutil
import zlib
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import ROOT
from view import page, read, setting_text

MASK = 9
CHARS = ['h', 'e', 'l', 'o', 'x', '\n', '!', '<', '>']
SETTINGS = {'iterations': 2, 'judge_checkpoint_name': None, 'use_sampler': True, 'save': 'a.json', 'seed_text': 'h'}


def ids_of(text):
    return [MASK if c == '_' else CHARS.index(c) for c in text]


def one_pass(iteration, start, before, after, wave, score, remasked=(), corrected=()):
    return {'iteration': iteration, 'block_start': start, 'input_masked': ids_of(before),
            'output_unmasked': ids_of(after), 'wave': wave, 'remask_score': score, 'remasked_indices': list(remasked),
            'corrected_indices': list(corrected)}


def tiny(**settings):
    """What --save writes for one sample of two blocks: h and ! are given, an x is remasked and becomes an l."""
    passes = [one_pass(0, 0, 'h___', 'helx', [0, 1, 2, 3], [0, 0.1, 0.2, 0.9], [3]),
              one_pass(1, 0, 'hel_', 'hell', [0, 0, 0, 1], [0, 0.1, 0.2, 0.3]),
              one_pass(0, 2, 'll__', 'llo\n', [0, 0, 1, 2], [0, 0, 0.5, 1.0])]
    sample = {'text': 'hello\n!', 'tokens': ids_of('hello\n!'), 'quality': 0.25, 'iterations': passes}
    return {'schema': 2, 'settings': SETTINGS | settings, 'mask_id': MASK, 'seconds': 0.5, 'forward_passes': 3,
            'waves': 6, 'vocabulary': {'name': 'toy', 'kind': 'char', 'chars': CHARS, 'vocab_size': MASK + 1},
            'samples': [sample]}


STATES = ['h░░░░░!', 'he░░░░!', 'hel░░░!', 'helx░░!', 'hel░░░!', 'hell░░!', 'hell░░!', 'hello░!', 'hello\n!']


def data_of(html):
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', html, re.S).group(1))


def hostile():
    """A file whose every text tries to become part of the page."""
    attack = '</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 1">'
    saved = tiny(seed_text=attack, checkpoint='"\'--><svg onload=window.hacked=1>&lt;b&gt;')
    saved['settings'][attack] = 'x'
    saved['vocabulary']['chars'] = [attack, '&lt;', '"', "'", '<!--', '\n', '\u2028', '{{data}}', '\\u003c']
    return saved


def large(length, passes, n, seed=0):
    """n samples of random tokens, waves and scores, of which each pass fills as many as the default schedule asks."""
    rng, saved = np.random.default_rng(seed), tiny()
    saved['vocabulary']['chars'], saved['mask_id'] = [chr(33 + i) for i in range(64)], 64
    saved['samples'] = [{'text': '', 'tokens': [0] * length, 'quality': None, 'iterations': []} for _ in range(n)]
    for sample in saved['samples']:
        tokens, mask = np.full(length, 64), np.full(length, True)
        for k in range(passes):
            before, tokens = np.where(mask, 64, tokens), np.where(mask, rng.integers(0, 64, length), tokens)
            wave, mask = np.where(mask, rng.integers(0, 50, length), 0), rng.random(length) < 0.95 - 0.065 * k
            sample['iterations'].append({
                'iteration': k, 'block_start': 0, 'input_masked': before.tolist(), 'output_unmasked': tokens.tolist(),
                'wave': wave.tolist(), 'remask_score': rng.random(length).tolist(),
                'remasked_indices': np.flatnonzero(mask).tolist() if k < passes - 1 else []})
        sample['tokens'] = tokens.tolist()
    return saved


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
    assert decoders == [['sampler head, plan blocks', '3 forward passes'], ['naive', '3 forward passes']]
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


def test_bad_arguments_are_one_line(script, tmp_path):
    (tmp_path / 'a.json').write_text(json.dumps(tiny()))
    path = tmp_path / 'a.json'
    for args, message in (([path] * 3, 'found 3 files'), ([path, '-o', path], 'wanted the name of a page'),
                          ([path, '-o', 'view.html'], 'wanted the name of a page'),
                          ([path, '-o', tmp_path / 'no' / 'a.html'], 'cannot write')):
        status, _, err = view(script, *args)
        assert status == 2 and err.count('\n') == 1 and message in err, err
    assert read(path) == tiny()


# -----------------------------------------------------------------------------
# the page in a browser

def found(*names):
    return next(filter(None, map(shutil.which, names)), None)


@pytest.fixture(scope='module')
def driver(tmp_path_factory):
    """A headless Chromium; its window is 1200 wide."""
    selenium = pytest.importorskip('selenium.webdriver', reason='no browser test: pip install selenium')
    chromium = found('chromium', 'chromium-browser', 'google-chrome', 'chrome')
    chromedriver = found('chromedriver', 'chromium.chromedriver')
    if not (chromium and chromedriver):
        pytest.skip('no browser test: wanted Chromium and its driver, apt-get install chromium chromium-driver')
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for flag in ('headless=new', 'no-sandbox', 'disable-gpu', 'window-size=1200,900', 'disable-dev-shm-usage',
                 f'user-data-dir={tmp_path_factory.mktemp("chromium")}'):
        options.add_argument(f'--{flag}')
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    browser = selenium.Chrome(options=options, service=selenium.ChromeService(chromedriver))
    yield browser
    browser.quit()


class Page:
    """The page of some files in the browser."""

    def __init__(self, driver, path, saves, motion='reduce'):
        from selenium.webdriver.support.ui import WebDriverWait
        self.driver = driver
        wish = {'name': 'prefers-reduced-motion', 'value': motion}    # else the page plays as soon as it is open
        driver.execute_cdp_cmd('Emulation.setEmulatedMedia', {'features': [wish]})
        path.write_text(page(saves), encoding='utf-8')
        driver.get_log('browser')
        driver.get(path.as_uri())
        WebDriverWait(driver, 10).until(lambda _: self.js('return !document.querySelector("main").hidden'))

    def js(self, code, *args):
        return self.driver.execute_script(code, *args)

    def slide(self, step):
        self.js('const s = document.getElementById("slider"); s.value = arguments[0];'
                's.dispatchEvent(new Event("input"))', step)

    def choose(self, name, value):
        self.js('const s = document.getElementById(arguments[0]); s.value = arguments[1];'
                's.dispatchEvent(new Event("change"))', name, value)

    def press(self, *keys):
        """Press keys one after another; one that begins with shift+ together with it."""
        from selenium.webdriver import ActionChains, Keys
        for key in keys:
            chain, name = ActionChains(self.driver), key.removeprefix('shift+')
            chain = chain.key_down(Keys.SHIFT) if name != key else chain
            chain.send_keys(getattr(Keys, name.upper()) if len(name) > 1 else name)
            (chain.key_up(Keys.SHIFT) if name != key else chain).perform()

    @property
    def last(self):
        return int(self.js('return document.getElementById("slider").max'))

    @property
    def texts(self):
        return self.js('return [...document.querySelectorAll(".text")].map(e => e.textContent)')

    def rows_of(self, selector):
        return self.js('return [...document.querySelectorAll(arguments[0] + " tr")]'
                       '.map(row => [...row.cells].map(cell => cell.textContent))', selector)

    def text_of(self, selector):
        return self.js('return document.querySelector(arguments[0]).textContent', selector)

    def marked(self, name):
        """Positions of the first run that carry a mark."""
        return self.js('return [...document.querySelector(".text").getElementsByClassName(arguments[0])]'
                       '.map(e => e.position)', name)

    def coloured(self):
        return self.js('return [...document.querySelector(".text").children].flatMap(e => '
                       'e.style.backgroundColor ? [e.position] : [])')

    def complaints(self):
        return self.driver.get_log('browser')


@pytest.fixture
def opened(driver, tmp_path):
    """opened(a, b): the page of what --save wrote; no message may be in the browser's console at the end."""
    pages = []

    def call(*saves, **wishes):
        pages.append(Page(driver, tmp_path / 'page.html', list(zip('ab', saves)), **wishes))
        return pages[-1]
    yield call
    assert [one.complaints() for one in pages] == [[]] * len(pages)


def test_the_slider_goes_through_waves_passes_and_blocks(opened):
    shown = opened(tiny())
    assert shown.texts == STATES[-1:] and shown.last == len(STATES) - 1    # at the end, for no motion is wanted
    for step, text in enumerate(STATES):
        shown.slide(step)
        assert shown.texts == [text], step
    shown.choose('steps', 'passes')
    states = []
    for step in range(shown.last + 1):
        shown.slide(step)
        states += shown.texts
    assert states == [STATES[0], STATES[3], STATES[5], STATES[8]]


def test_marks_and_colours(opened):
    shown = opened(tiny())
    shown.slide(3)
    assert shown.marked('remasked') == [3] and shown.marked('fresh') == [3] and shown.marked('given') == [0, 6]
    assert shown.marked('masked') == [4, 5] and '1 remasked' in shown.text_of('.now')
    assert shown.coloured() == [1, 2, 3]
    shown.choose('colour', 'score')
    assert shown.coloured() == [1, 2, 3]
    shown.slide(2)
    assert shown.coloured() == []    # a score comes after the pass
    shown.slide(5)
    assert shown.coloured() == [1, 2, 3]
    for colour, wanted in (('age', [1, 2, 3, 4, 5]), ('none', [])):
        shown.slide(8)
        shown.choose('colour', colour)
        assert shown.coloured() == wanted
    assert shown.marked('newline') == [5] and shown.marked('remasked') == []


def test_keys(opened):
    shown = opened(tiny())
    step = lambda: int(shown.js('return document.getElementById("slider").value'))
    for key, wanted in (('home', 0), ('arrow_right', 1), ('arrow_right', 2), ('arrow_left', 1),
                        ('shift+arrow_right', 3), ('shift+arrow_right', 5), ('shift+arrow_left', 3),
                        ('shift+arrow_left', 0), ('end', 8), ('shift+arrow_right', 8), ('arrow_right', 8)):
        shown.press(key)
        assert step() == wanted, key
    shown.press('c', 's')
    chosen = [shown.js('return document.getElementById(arguments[0]).value', name) for name in ('colour', 'steps')]
    assert chosen == ['score', 'passes'] and shown.last == 3
    shown.press('.', '.')
    assert shown.marked('here') == [1] and 'Token 2 in a' in shown.text_of('#history')
    shown.press('escape')
    assert shown.marked('here') == [] and shown.js('return document.getElementById("history").hidden')


def test_play_runs_to_the_end_and_stops(opened):
    from selenium.webdriver.support.ui import WebDriverWait
    shown = opened(tiny())
    shown.choose('speed', '50')
    shown.press(' ')
    assert 'Stop' in shown.text_of('#play')
    WebDriverWait(shown.driver, 10).until(lambda _: 'Play' in shown.text_of('#play'))
    assert shown.texts == STATES[-1:]


def test_it_opens_at_the_start_and_plays_once(opened):
    from selenium.webdriver.support.ui import WebDriverWait
    shown = opened(tiny(), motion='no-preference')
    step = lambda: int(shown.js('return document.getElementById("slider").value'))
    assert step() < shown.last and 'Stop' in shown.text_of('#play')
    WebDriverWait(shown.driver, 10).until(lambda _: 'Play' in shown.text_of('#play'))
    assert step() == shown.last and shown.texts == STATES[-1:]


def corrected():
    """A pass whose e a correction drew again, in wave 3, and a later pass that fills the last l once more."""
    saved = tiny()
    saved['samples'][0]['iterations'] = [
        one_pass(0, 0, 'h___', 'helx', [0, 3, 2, 0], [0, 0.1, 0.2, 0.9], [3], corrected=[1]),
        one_pass(1, 0, 'hel_', 'hell', [0, 0, 0, 1], [0, 0.1, 0.2, 0.3]),
        one_pass(0, 2, 'll__', 'llo\n', [0, 0, 1, 2], [0, 0, 0.5, 1.0])]
    return saved


def test_how_each_token_was_placed(opened):
    shown = opened(corrected())
    shown.choose('colour', 'kind')
    colours = lambda: shown.js('return [...document.querySelector(".text").children].map(e => '
                               'e.style.backgroundColor.replace(/[^0-9,]/g, ""))')
    first, wave, again, remasked = '230,159,0', '86,180,233', '47,199,154', '225,143,192'
    shown.slide(3)    # after the first pass
    assert colours() == ['', again, wave, first, '', '', ''] and shown.marked('corrected') == [1]
    shown.slide(shown.last)
    assert colours() == ['', again, wave, remasked, wave, wave, ''] and shown.marked('corrected') == [1]
    assert 'corrected by the sampler head' in shown.text_of('#kinds')
    shown.press('.', '.')
    assert shown.rows_of('#history')[1] == ['1', '3', '"e"', '0.10', 'filled, corrected']


def test_a_run_of_one_wave_has_no_colour_for_it(opened):
    naive = tiny(use_sampler=False)
    for one in naive['samples'][0]['iterations']:
        one['wave'] = [0] * len(one['wave'])
    shown = opened(naive)
    chosen = lambda: shown.js('return document.getElementById("colour").value')
    assert chosen() == 'age' and shown.coloured() == [1, 2, 3, 4, 5]
    shown.choose('colour', 'wave')
    assert shown.coloured() == [] and 'every pass has one wave' in shown.text_of('#low')
    assert not shown.js('return document.getElementById("bar").checkVisibility()')
    beside = opened(tiny(), naive)    # the other run keeps its colours
    assert beside.coloured() == [1, 2, 3, 4, 5]
    assert beside.js('return [...document.querySelectorAll(".text")[1].children].filter('
                     'e => e.style.backgroundColor).length') == 0


def test_scores_that_decide_nothing_say_so(opened):
    kept = tiny()
    kept['samples'][0]['iterations'] = kept['samples'][0]['iterations'][1:]
    for saved, said in ((tiny(), False), (kept, True)):
        shown = opened(saved)
        shown.choose('colour', 'score')
        assert ('never remasks' in shown.text_of('.now')) == said
        assert ('nothing is remasked' in shown.text_of('#high')) == said


def test_hover_shows_the_history_and_a_click_keeps_it(opened):
    from selenium.webdriver import ActionChains
    shown = opened(tiny(), tiny())
    token = shown.driver.find_elements('css selector', '.text span')[3]
    ActionChains(shown.driver).move_to_element(token).perform()
    assert shown.rows_of('#history') == [
        ['pass', 'wave', 'token', 'score', ''], ['1', '3', '"x"', '0.90', 'filled, remasked'],
        ['2', '1', '"l"', '0.30', 'filled'], ['3 ◂', '', '"l"', '', 'given']]
    assert shown.js('return document.querySelectorAll(".text .here").length') == 2    # in both runs
    token.click()
    ActionChains(shown.driver).move_to_element(shown.driver.find_element('tag name', 'h1')).perform()
    assert not shown.js('return document.getElementById("history").hidden')


def test_two_runs_in_step_with_scores_and_settings(opened):
    short = tiny(iterations=1, use_sampler=False)
    short['samples'][0]['iterations'] = [one_pass(0, 0, 'h_____!', 'hello\n!', [0] * 7, [0] * 7)]
    shown = opened(tiny(), short)
    for step, (a, b) in enumerate(zip(STATES, ['h░░░░░!'] + ['hello\n!'] * 8)):
        shown.slide(step)
        assert shown.texts == [a, b]
    assert 'finished after 1 pass' in shown.js('return document.querySelectorAll(".now")[1].textContent')
    assert 'mean quality 0.250' in shown.text_of('.facts') and 'of this sample 0.250' in shown.text_of('.facts')
    assert shown.rows_of('#differences') == [['', 'a', 'b'], ['iterations', '2', '1'],
                                             ['use_sampler', 'true', 'false']]


def test_hostile_text_does_nothing(opened):
    saved = hostile()
    chars = saved['vocabulary']['chars']
    shown = opened(saved, saved)
    final = ''.join(chars[i] for i in saved['samples'][0]['tokens'])
    assert shown.texts == [final, final]
    shown.press('.', '.')
    assert '&lt;' in shown.text_of('#history') and saved['settings']['seed_text'] in shown.text_of('#settings')
    assert shown.js('return [window.hacked, document.querySelectorAll("img, svg, b, .text script").length,'
                    'document.scripts.length]') == [None, 0, 2]


def test_a_phone_needs_no_sideways_scrolling(opened):
    saved = tiny()
    shown = opened(saved, large(1024, 2, 1))
    narrow = {'width': 360, 'height': 700, 'deviceScaleFactor': 2, 'mobile': True}
    shown.driver.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', narrow)
    try:
        assert shown.js('return document.documentElement.scrollWidth') <= 360
    finally:
        shown.driver.execute_cdp_cmd('Emulation.clearDeviceMetricsOverride', {})
