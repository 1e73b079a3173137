"""svg.py: frames by hand, text that cannot become markup, the command."""
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from saved_runs import STATES, corrected, hostile, large, tiny
from test_view_browser import driver    # noqa: F401 (a fixture)

import svg
from animate import MEANINGS
from conftest import ROOT
from errors import InputError

SPACE = '{http://www.w3.org/2000/svg}'


def shown_at(text, percent):
    """The text that a reader sees so far into the animation: what stands in the rows of the panel."""
    root, cells = ElementTree.fromstring(text), {}
    css = root.find(f'{SPACE}style').text
    for group in root.iter(f'{SPACE}g'):
        name = group.get('class').split()[0]
        opacity = 1
        if name != 'always':
            keyframes = re.search(rf'@keyframes {name}\{{(.*)\}}', css)[1]
            for at, value in re.findall(r'([\d.]+)%\{opacity:(\d)\}', keyframes):
                opacity = int(value) if float(at) <= percent else opacity
        for element in group if opacity else ():
            if element.get('class') != 'title':
                cells[float(element.get('y')), float(element.get('x'))] = element.text
    last = max(y for y, _ in cells)    # the legend
    rows = sorted({y for y, _ in cells} - {last})
    return '\n'.join(''.join(text for (y, _), text in sorted(cells.items()) if y == row) for row in rows)


def test_every_frame_is_a_state():
    text = svg.animated([('a', tiny())])
    n = 7 + svg.HOLD
    states = [STATES[i] for i in (0, 1, 2, 3, 5, 7, 8)]
    assert [shown_at(text, 100 * (i + 0.5) / n) for i in range(7)] == states
    assert shown_at(text, 99.9) == 'hello\n!'


def test_two_runs_go_on_in_step():
    short = tiny()
    short['samples'][0]['iterations'] = short['samples'][0]['iterations'][:1]
    text = svg.animated([('a', tiny()), ('b', short)])
    ElementTree.fromstring(text)
    assert text.count('>a<') == 1 and text.count('>b<') == 1 and 'prefers-reduced-motion' in text


def test_the_same_file_gives_the_same_bytes(tmp_path):
    """It went through sets, whose order differs from process to process."""
    (tmp_path / 'a.json').write_text(json.dumps(corrected()))
    made = []
    for seed in ('1', '2'):
        path = tmp_path / f'{seed}.svg'
        subprocess.run([sys.executable, os.path.join(ROOT, 'view.py'), 'a.json', '-o', path], cwd=tmp_path, check=True,
                       env=os.environ | {'PYTHONHASHSEED': seed}, stdout=subprocess.DEVNULL)
        made.append(path.read_bytes())
    assert made[0] == made[1]


def test_every_kind_of_token_has_its_colour_and_a_place_in_the_legend():
    text = svg.animated([('a', corrected())])
    for kind in ('masked', 'given', 'first', 'wave', 'corrected', 'remasked'):
        assert f'class="{kind}"' in text and f'.{kind}{{fill:' in text and f'>{MEANINGS[kind]}</text>' in text
    width = float(re.search(r'viewBox="0 0 (\S+)', text)[1])
    ends = [float(x) + len(body) * svg.CELL for x, body in re.findall(r'x="(\S+)" y="\S+" [^>]*>([^<]+)<', text)]
    assert max(ends) <= width


def test_hostile_text_stays_text():
    saved = hostile()
    text = svg.animated([('<script>', saved)])
    assert not {element.tag for element in ElementTree.fromstring(text).iter()} - {
        SPACE + tag for tag in ('svg', 'title', 'style', 'rect', 'g', 'text')}


def test_a_sample_that_is_not_there():
    with pytest.raises(InputError, match='--sample is 1'):
        svg.animated([('a', tiny())], 1)


def test_256_tokens_redrawn_in_15_passes_are_under_a_megabyte():
    """Random text, of which every pass draws another: nothing stands for long."""
    saved = large(256, 15, 1)
    saved['vocabulary']['vocab_size'] = saved['mask_id'] + 1
    assert len(svg.animated([('a', saved)])) < 1e6


def test_the_command(script, tmp_path):
    (tmp_path / 'a.json').write_text(json.dumps(tiny()))
    status, out, err = script('view.py', tmp_path / 'a.json', '-o', tmp_path / 'x.svg')
    assert status == 0 and err == '' and 'x.svg' in out
    assert 'sampler head, 3 forward passes' in (tmp_path / 'x.svg').read_text()
    broken = tiny()
    broken['samples'][0]['iterations'][0]['wave'] = [0]
    (tmp_path / 'b.json').write_text(json.dumps(broken))
    for args, message in ((['a.json', '--sample', 3], '--sample is 3'), (['b.json'], 'is damaged')):
        status, _, err = script('view.py', tmp_path / args[0], '-o', tmp_path / 'y.svg', *args[1:])
        assert status == 2 and message in err and err.count('\n') == 1


def test_it_plays_in_a_browser(driver, tmp_path):    # noqa: F811
    """At the end of the animation each token is seen once."""
    (tmp_path / 'x.svg').write_text(svg.animated([('a', tiny())]))
    driver.get((tmp_path / 'x.svg').as_uri())
    seen = driver.execute_script('''
        for (const one of document.getAnimations()) { one.pause(); one.currentTime = arguments[0]; }
        return [...document.querySelectorAll('g')].filter(g => getComputedStyle(g).opacity === '1')
            .flatMap(g => [...g.children]).filter(t => t.getAttribute('class') !== 'title').map(t => t.textContent)''',
                                 1000 * (7 + svg.HOLD) / svg.PER_SECOND - 1)
    assert {'h', 'el', 'lo', '!'} & set(seen) and '░' not in ''.join(seen[:4]), seen
