"""--template: blanks are filled, all else is kept, in every sample; what cannot be a template is one line."""
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from conftest import ROOT
from corpus import Tokenizer
from errors import InputError
from prompts import given_text, is_prefix, template_ids

CHARS = list('abc_# \n@')
TOKENIZER = Tokenizer({'name': 'toy', 'kind': 'char', 'chars': CHARS, 'vocab_size': len(CHARS) + 1})
MASK = TOKENIZER.mask_id


def given(**changes):
    flags = dict(template='', blank='_', seed_text='', seed_placement='prefix', num_samples=2, sequence_length=0,
                 seed=1337)
    return given_text(SimpleNamespace(**flags | changes), TOKENIZER, 16)


def test_a_template_by_hand():
    x, free = given(template='a__b_c')
    assert x.tolist() == [[0, MASK, MASK, 1, MASK, 2]] * 2 and free.tolist() == (x == MASK).tolist()


def test_a_template_with_underscores_takes_another_blank():
    assert template_ids('a_##b', '#', TOKENIZER) == [0, 3, MASK, MASK, 1]


def test_a_longer_sequence_goes_on_behind_the_template():
    x, free = given(template='a_b', sequence_length=6)
    assert x[0].tolist() == [0, MASK, 1, MASK, MASK, MASK] and free[0].tolist() == (x[0] == MASK).tolist()
    assert given(template='ab', sequence_length=3)[1].tolist() == [[False, False, True]] * 2


def test_a_file_holds_a_template(tmp_path):
    (tmp_path / 't.txt').write_text('@a_\nb\n')
    assert given(template=f'@{tmp_path / "t.txt"}')[0][0].tolist() == [7, 0, MASK, 6, 1]


def test_byte_pairs_have_one_blank_for_each_token():
    tokenizer = SimpleNamespace(encode=lambda text: [len(word) for word in text.split()], mask_id=99)
    assert template_ids('to be__or not', '_', tokenizer) == [2, 2, 99, 99, 2, 3]


@pytest.mark.parametrize('flags, message', [
    (dict(template='xay_z'), "--template: 'xyz' is not in the vocabulary"), (dict(template='abc'), "no blank '_'"),
    (dict(template='abc_', sequence_length=3), '4 tokens, wanted at most the sequence length, 3'),
    (dict(template='@no.txt'), "--template: cannot read 'no.txt'"), (dict(seed_text='xa'), "--seed-text: 'x' is not")])
def test_what_is_no_template(flags, message):
    with pytest.raises(InputError, match=message):
        given(**flags)


@pytest.mark.parametrize('flags, prefix', [
    (dict(), True), (dict(seed_text='ab'), True), (dict(seed_text='ab', seed_placement='random'), False),
    (dict(seed_text='ab', seed_placement='random', num_samples=1), False), (dict(template='ab__'), True),
    (dict(template='ab_c'), False), (dict(template='_ab'), False), (dict(template='a_', sequence_length=5), True)])
def test_text_that_is_given_at_the_front_alone(flags, prefix):
    args = SimpleNamespace(**dict(seed_text='', seed_placement='prefix') | flags)
    assert is_prefix(args, given(**flags)[1]) == torch.tensor(prefix)


@pytest.mark.parametrize('flags', [[], ['--disable-sampler'], ['--plan', 'interleaved'], ['--plan', 'left-to-right'],
                                   ['--iterations', 1],
                                   ['--order', 'critic']])
def test_every_sample_keeps_the_text_and_fills_the_blanks(script, trained_once, flags):
    template = 'the ___ sat on a ____ the mat.'
    status, out, err = script('sample_simple.py', '--out-dir', trained_once[0], '--template', template, '--num-samples',
                              5, '--no-progress', '--batch-size', 2, '--iterations', 4, *flags)
    assert status == 0, err
    texts = out.split('--- sample ')[1:]
    bodies = [text.split('\n', 1)[1].rsplit('\n---', 1)[0].rstrip('\n')[:len(template)] for text in texts]
    assert len(bodies) == 5
    for body in bodies:
        assert '_' not in body
        assert ''.join('_' if a == '_' else b for a, b in zip(template, body)) == template, body


@pytest.mark.parametrize('flags, message', [
    (['--template', 'a_', '--seed-text', 'the'], '--template goes neither'),
    (['--template', 'a_', '--seed-placement', 'random'], '--template goes neither'),
    (['--template', 'the _at XZ'], "'XZ' is not in the vocabulary"),
    (['--template', 'a_', '--blank', 'ab'], "--blank is 'ab'"),
    (['--template', 'the _at', '--plan', 'speculative'], '--plan speculative reads from left to right'),
    (['--template', 'the _at', '--plan', 'left-to-right', '--iterations', '1'], 'would not see the text behind'),
    (['--template', 'the _at', '--plan', 'fronts-1', '--iterations', '1'], 'would not see the text behind a blank'),
    (['--plan', 'blocks', '--seed-text', 'a', '--seed-placement', 'random'], '--plan blocks needs the same positions')])
def test_bad_templates_are_one_line(script, trained_once, flags, message):
    status, _, err = script('sample_simple.py', '--out-dir', trained_once[0], '--no-progress', *flags)
    assert status == 2 and message in err and err.count('\n') == 1


@pytest.mark.parametrize('command', [['sample_simple.py', '--help'], ['sample_simple.py', '--iterations', 'x'],
                                     ['view.py', '--help'], ['plot.py', '--help']])
def test_help_does_not_wait_for_torch(tmp_path, command):
    """It took seconds: torch was imported before a flag was read."""
    (tmp_path / 'torch.py').write_text('raise SystemExit("torch was imported")')
    env = os.environ | {'PYTHONPATH': str(tmp_path)}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)
    assert 'usage' in done.stdout + done.stderr and 'torch was' not in done.stderr


def test_a_blank_of_its_own_may_come_first():
    """--blank @ was taken for the name of a file."""
    from prompts import read_template
    assert read_template('@@ cat', '@') == '@@ cat'
