"""The page of view.py in a headless browser."""
import shutil

import pytest

from saved_runs import corrected, hostile, large, one_pass, STATES, tiny
from view import page


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
    assert 'corrected' in shown.text_of('#kinds') and 'written again' in shown.text_of('#kinds')
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
