"""Whatever the input: settings, texts, templates and metrics work or are one line.

The examples are Hypothesis's, the same ones in every run.
"""
import json
import math
from types import SimpleNamespace

from hypothesis import HealthCheck, assume, given, strategies as st
from hypothesis import settings as bounds

import corpus
import metrics_log
import settings
import train
from configurator import configure
from errors import InputError
from prompts import given_text, is_prefix

few = bounds(derandomize=True, database=None, deadline=None, max_examples=60,
             suppress_health_check=[HealthCheck.function_scoped_fixture])    # a folder may serve all examples
many = bounds(few, max_examples=400)
UNICODE = st.text(st.characters(codec='utf-8'), max_size=60)
ODD_NUMBERS = st.sampled_from([2 ** 63, 10 ** 400, -1, 0, 1, '1e999', '1_0', '\u0663'])
NUMBERS = st.integers() | st.floats() | ODD_NUMBERS
WORDS = st.one_of(UNICODE, NUMBERS.map(str), st.sampled_from(['True', 'false', 'nan', 'scratch', 'causal', 'x.pt']))


def outcome(call):
    """What call() returns, or the message of its InputError, which must be one line."""
    try:
        return call(), ''
    except InputError as error:
        assert str(error) and len(str(error).splitlines()) == 1
        return None, str(error)


def configured(flags):
    config = configure(train.settings, flags)
    settings.check(SimpleNamespace(**config))
    return config


@many
@given(st.sampled_from(sorted(train.settings)), WORDS)
def test_any_text_for_any_setting_is_a_value_or_one_line(name, text):
    config, message = outcome(lambda: configured([f'--{name}={text}']))
    if message:
        assert name in message
    else:
        value = config[name]
        assert type(value) is type(train.settings[name]) and not (isinstance(value, float) and not math.isfinite(value))
        assert {k: v for k, v in config.items() if k != name} == {k: v for k, v in train.settings.items() if k != name}


@many
@given(st.dictionaries(st.sampled_from(sorted(train.settings)), NUMBERS.map(str) | st.booleans().map(str), max_size=6),
       UNICODE)
def test_any_settings_together_and_any_unknown_one_are_values_or_one_line(chosen, name):
    outcome(lambda: configured([f'--{k}={v}' for k, v in chosen.items()]))
    assume(name.partition('=')[0] not in train.settings)
    assert outcome(lambda: configured([f'--{name}=1']))[1] and outcome(lambda: configured([f'-{name}']))[1]


@few
@given(st.binary(max_size=40) | UNICODE.map(str.encode) | UNICODE.map(lambda text: text.encode('utf-8-sig')))
def test_any_bytes_are_text_or_one_line(tmp_path, data):
    """A mark at the front goes, and all line ends are one; nothing else changes."""
    (tmp_path / 'my.txt').write_bytes(data)
    text, message = outcome(lambda: corpus.read_text(str(tmp_path / 'my.txt')))
    try:
        expected = data.decode('utf-8').removeprefix('\ufeff').replace('\r\n', '\n').replace('\r', '\n')
    except UnicodeDecodeError:
        assert 'not UTF-8' in message
        return
    assert ('zero bytes' in message) if '\0' in expected else text == expected


@few
@given(UNICODE, UNICODE)
def test_any_text_goes_through_a_corpus(tmp_path, text, other):
    """Its splits are the text again, and what it lacks is named."""
    _, message = outcome(lambda: corpus.prepare_text('mine', text, 'a test', data_dir=str(tmp_path), overwrite=True))
    if len(set(text)) < 2:
        assert 'is empty' in message or 'one distinct character' in message
        return
    found = corpus.Corpus('mine', str(tmp_path))
    assert ''.join(found.tokenizer.decode(found.splits[split].tolist()) for split in ('train', 'val')) == text
    ids, message = outcome(lambda: found.tokenizer.encode(other))
    unknown = set(other) - set(text)
    assert repr(''.join(sorted(unknown))) in message if unknown else found.tokenizer.decode(ids) == other


CHARS = sorted({'a', 'b', '_', '#', ' ', '\n', '\u00e9', '\U0001f600'})


def tokenizer():
    return corpus.Tokenizer({'name': 'toy', 'kind': 'char', 'chars': CHARS, 'vocab_size': len(CHARS) + 1})


def flags(**changes):
    return SimpleNamespace(**dict(template='', blank='_', seed_text='', seed_placement='prefix', sequence_length=0,
                                  num_samples=3, seed=1) | changes)


@many
@given(st.text(st.sampled_from([*CHARS, 'X']), min_size=1, max_size=24), st.sampled_from(['_', '#', 'a', '%']),
       st.integers(0, 30))
def test_any_template_is_kept_but_for_its_blanks(template, blank, length):
    assume(not template.startswith('@'))
    made, message = outcome(lambda: given_text(
        flags(template=template, blank=blank, sequence_length=length), tokenizer(), 16))
    unknown, size = 'X' in template, length or len(template)
    if unknown or size < len(template) or blank not in template and size == len(template):
        assert '--template' in message
        return
    x, free = made
    whole = template + blank * (size - len(template))
    assert [tokenizer().decode(ids, mask=blank) for ids in x.tolist()] == [whole] * 3
    assert free.tolist() == [[c == blank for c in whole]] * 3
    assert is_prefix(flags(template=template), free) == (blank not in whole.rstrip(blank))


@many
@given(st.text(st.sampled_from([*CHARS, 'X']), max_size=24), st.sampled_from(['prefix', 'random']), st.integers(0, 30),
       st.integers(0, 2 ** 31))
def test_any_seed_text_stands_whole_in_every_sample(text, placement, length, seed):
    made, message = outcome(lambda: given_text(
        flags(seed_text=text, seed_placement=placement, sequence_length=length, seed=seed), tokenizer(), 16))
    if 'X' in text or len(text) > (length or 16):
        assert '--seed-text' in message
        return
    for ids, free in zip(*(part.tolist() for part in made)):
        shown = tokenizer().decode(ids, mask='?')
        start = free.index(False) if text else 0
        assert len(shown) == (length or 16) and shown[start:start + len(text)] == text
        assert sum(free) == len(shown) - len(text) and (placement == 'random' or start == 0)


@few
@given(st.lists(st.dictionaries(UNICODE, st.floats() | st.integers() | UNICODE, max_size=4), max_size=6),
       st.integers(0, 9), st.binary(max_size=30))
def test_metrics_are_strict_json_and_what_is_torn_is_dropped(tmp_path, entries, before, torn):
    entries = [entry | {'iter': i} for i, entry in enumerate(entries)]
    path = tmp_path / 'metrics.jsonl'
    path.write_bytes(''.join(map(metrics_log.line, entries)).encode() + torn.replace(b'\n', b''))

    def refuse(name):
        raise AssertionError(f'{name} is no JSON')
    lines = path.read_bytes().split(b'\n')[:len(entries)]
    assert all(json.loads(text, parse_constant=refuse)['iter'] == i for i, text in enumerate(lines))
    known = [entry for entry in entries if entry['iter'] < before]
    found = metrics_log.read(str(path), before, evaluated=False)
    assert len(found) >= len(known) and all(
        a == {k: v for k, v in b.items() if not (isinstance(v, float) and not math.isfinite(v))}
        for a, b in zip(found, known))
