"""Gaps in given text: what decoders write there has the likelihood that is claimed; the table of evaluate.py --gaps."""
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import gap_table
from conftest import tiny_model
from decoding import DecoderConfig, decode_window
from likelihood import log_likelihood
from plans import Plan, make_plan
from sampler import wave_numbers
from test_likelihood import T, V, tiny

GIVEN = torch.tensor([[2, 0, 0, 1, 0]])
FREE = torch.tensor([[0, 1, 1, 0, 1]]).bool()


def fillings():
    """The 27 texts that GIVEN with its FREE positions may become."""
    x = GIVEN.repeat(V ** 3, 1)
    x[:, FREE[0]] = torch.tensor(list(itertools.product(range(V), repeat=3)))
    return x


@pytest.mark.parametrize('name, passes, use_sampler', [
    ('interleaved', 2, True), ('interleaved', 2, False), ('spans', 2, True), ('random', 3, True), ('random', 1, True)])
def test_fillings_have_the_likelihood_that_is_claimed(name, passes, use_sampler):
    """20,000 fillings against the 27 probabilities, a chi-squared test at five standard deviations."""
    model, n, seed = tiny().double(), 20000, 1337
    config = DecoderConfig(use_sampler=use_sampler, plan=name, plan_passes=passes, mask_ratios=())
    sequences = range(n)
    plan = make_plan(name, T, passes, seed, sequences, free=FREE.expand(n, -1))
    with torch.no_grad():
        found = decode_window(model, GIVEN.repeat(n, 1), FREE.repeat(n, 1), config, sequences, range(T)).x
        expected = np.zeros(V ** 3)
        kinds, number = torch.cat((plan.pass_of, plan.wave_of), 1).unique(dim=0, return_counts=True)
        for kind, times in zip(kinds, number.tolist()):    # random plans differ from sequence to sequence
            one = Plan(kind[None, :T], kind[None, T:])
            p = log_likelihood(model, fillings(), one, use_sampler)[:, FREE[0]].sum(1).exp().numpy()
            assert p.sum() == pytest.approx(1, abs=1e-9)
            expected += times * p
    assert (found[:, ~FREE[0]] == GIVEN[:, ~FREE[0]]).all()
    code = (found[:, FREE[0]] * V ** torch.arange(2, -1, -1)).sum(1)
    counts = np.bincount(code.numpy(), minlength=V ** 3)
    common = expected >= 5
    chi2 = ((counts - expected)[common] ** 2 / expected[common]).sum()
    assert abs(chi2 - common.sum()) < 5 * np.sqrt(2 * common.sum())


def test_a_wave_begins_beside_given_text():
    """Whole, the only pass begins at the left end; the gap is filled from both of its ends."""
    free = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0]]).bool()
    assert make_plan('interleaved', 8, 1).wave_of.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    plan = make_plan('interleaved', 8, 1, free=free)
    assert plan.pass_of.tolist() == [[-1, -1, 0, 0, 0, 0, -1, -1]]
    assert plan.wave_of[free].tolist() == [1, 2, 3, 1] and not plan.wave_of[~free].any()


def test_one_pass_beside_given_text_is_the_wavefront():
    """What --gaps scores in one pass is what it samples, and what --template begins with."""
    generator = torch.Generator().manual_seed(0)
    free = torch.rand(300, 20, generator=generator) < torch.rand(300, 1, generator=generator)
    free = free[(~free).any(1)]    # a blank sequence begins at its surest positions
    plan = make_plan('interleaved', 20, 1, sequences=range(len(free)), free=free)
    waves = wave_numbers(free, torch.zeros_like(free))
    assert len(free) > 200 and torch.equal(plan.wave_of[free], waves[free])


@pytest.mark.parametrize('name, passes, made', [('interleaved', 7, 3), ('random', 7, None), ('spans', 3, None)])
@pytest.mark.parametrize('use_sampler', [True, False])
def test_a_gap_depends_on_no_other_and_no_pass_is_made_in_vain(name, passes, made, use_sampler):
    model = tiny_model(vocab_size=V + 1, block_size=12)
    free = torch.tensor([[0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1, 0, 0, 1, 1, 0, 0],
                         [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0], [0] * 12]).bool()
    x = torch.randint(V, free.shape, generator=torch.Generator().manual_seed(1))
    config = DecoderConfig(use_sampler=use_sampler, plan=name, plan_passes=passes, mask_ratios=(), seed=1)
    decode = lambda rows: decode_window(model.double(), x[rows], free[rows], config, rows, range(12))
    together = decode([0, 1, 2, 3])
    for row in range(3):
        alone = decode([row])
        assert torch.equal(alone.x[0], together.x[row]) and alone.passes <= min(passes, free[row].sum())
        assert made is None or row == 2 or alone.passes == made
    assert torch.equal(together.x[~free], x[~free]) and (together.x != model.mask_id).all()


def test_gaps_lie_in_the_middle_half():
    x0 = torch.zeros(1000, 64, dtype=torch.int64)
    free = gap_table.place(x0, 12, seed=1)
    assert (free.sum(1) == 12).all() and not free[:, :16].any() and not free[:, 48:].any()
    assert free[:, 16].any() and free[:, 47].any() and (free[:, 1:] & ~free[:, :-1]).sum() == 1000


def test_the_table_of_gaps(evaluated, tmp_path, monkeypatch):
    monkeypatch.setattr(gap_table, 'SEQUENCES', 4)
    monkeypatch.setattr(gap_table, 'BATCH', 3)
    status, out, err = evaluated('--gaps', evaluator='', samples=False)
    assert status == 0, err
    entries = json.loads((tmp_path / 'gaps.json').read_text())['entries']
    gaps = {e['gap'] for e in entries}
    assert gaps == {gap for gap in gap_table.GAPS if gap <= 8} and {e['measure'] for e in entries} == set(
        gap_table.MEASURES)
    nats = {(e['decoder'], e['passes']): e['value'] for e in entries if e['measure'] == 'nats_per_token'}
    assert set(nats) == {(name, n) for name in ('naive', 'sampler head') for n in (1, 2)} and min(nats.values()) > 0
    assert all(0 <= e['value'] <= 1 for e in entries if e['measure'] != 'nats_per_token')
    for title in gap_table.MEASURES.values():
        assert f'{title}:\n\n| decoder | forward passes | gap of 4 |' in out
    assert '| naive, revised | ' in out and '| the text itself | - |' in out and '| head minus naive, revised | ' in out
    by_hand = [e['values'] for e in entries if (e['measure'], e['passes']) == ('nats_per_token', 1)]
    difference = np.subtract(*by_hand[::-1])
    assert (f'| head minus naive | 1 | {difference.mean():.3f} '
            f'±{difference.std(ddof=1) / len(difference) ** 0.5:.3f} |') in out
    before = (tmp_path / 'gaps.json').read_bytes()
    assert evaluated('--gaps', evaluator='', samples=False)[0] == 0
    status, _, err = evaluated('--gaps', '--seed', 7, evaluator='', samples=False)
    assert status == 2 and 'another identity (seed 1337, now 7)' in err
    assert (tmp_path / 'gaps.json').read_bytes() == before
    for flags, named in ((['--likelihood'], '--likelihood'), (['--passes', '2'], '--passes'), (['--quick'], '--quick'),
                         (['--plans', 'random'], '--plans'), (['--judge', 'x'], '--judge'),
                         (['--evaluator', 'x'], '--evaluator')):
        status, _, err = evaluated('--gaps', *flags, evaluator='', samples=False)
        assert status == 2 and f'--gaps goes without {named}' in err


def test_gaps_without_a_word():
    """A corpus of digits has none: there is nothing to say of words, and no division by zero."""
    table = SimpleNamespace(entries=[], gaps=[4])
    gap_table.GapTable.add(table, 'known_words', 4, 'naive', '', 1, [None, None])
    gap_table.GapTable.add(table, 'known_words', 4, 'sampler head', '', 1, [None, 0.5])
    text = gap_table.GapTable.table(table, 'known_words')
    assert '| naive | 1 | - |' in text and '| sampler head | 1 | 0.500 ±0.000 |' in text
    assert '| head minus naive |  | - |' in text


@pytest.mark.parametrize('plan', ['interleaved', 'spans', 'random'])
def test_a_seed_at_random_places_goes_with_orders_that_mix(script, trained_once, plan):
    flags = ['--out-dir', trained_once[0], '--no-progress', '--plan', plan, '--iterations', 3, '--seed-text', 'the cat',
             '--seed-placement', 'random']
    status, out, err = script('sample_simple.py', *flags, '--num-samples', 3)
    assert status == 0 and out.count('the cat') >= 3, err
