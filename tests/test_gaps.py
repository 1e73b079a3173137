"""Gaps in given text: what decoders write there has the likelihood that is claimed; the table of evaluate.py --gaps."""
import itertools
import json

import numpy as np
import pytest
import torch

import gap_table
from decoding import DecoderConfig, decode_block
from likelihood import log_likelihood
from plans import beside_given, make_plan
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
    plan = beside_given(make_plan(name, T, passes, seed, sequences), FREE.expand(n, -1))
    with torch.no_grad():
        found = decode_block(model, GIVEN.repeat(n, 1), FREE.repeat(n, 1), config, sequences, range(T)).x
        expected = np.zeros(V ** 3)
        kinds, number = torch.cat((plan.pass_of, plan.wave_of), 1).unique(dim=0, return_counts=True)
        for kind, times in zip(kinds, number.tolist()):    # random plans differ from sequence to sequence
            one = beside_given(make_plan(name, T, passes), FREE)
            one.pass_of, one.wave_of = kind[None, :T], kind[None, T:]
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
    plan = make_plan('interleaved', 8, 1)
    free = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0]]).bool()
    assert plan.wave_of.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    beside = beside_given(plan, free)
    assert beside.pass_of.tolist() == [[-1, -1, 0, 0, 0, 0, -1, -1]]
    assert beside.wave_of[free].tolist() == [1, 2, 3, 1] and not beside.wave_of[~free].any()


def test_gaps_lie_in_the_middle_half():
    x0 = torch.zeros(1000, 64, dtype=torch.int64)
    free = gap_table.place(x0, 12, seed=1)
    assert (free.sum(1) == 12).all() and not free[:, :16].any() and not free[:, 48:].any()
    assert free[:, 16].any() and free[:, 47].any() and (free[:, 1:] & ~free[:, :-1]).sum() == 1000


def test_the_table_of_gaps(evaluated, tmp_path, monkeypatch):
    monkeypatch.setattr(gap_table, 'SEQUENCES', 4)
    monkeypatch.setattr(gap_table, 'BATCH', 3)
    status, out, err = evaluated('--gaps', evaluator='none', samples=False)    # which it does not need
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
    assert '| naive, revised by confidence | 15 |' in out and '| the text itself | - |' in out
    before = (tmp_path / 'gaps.json').read_bytes()
    assert evaluated('--gaps', evaluator='none', samples=False)[0] == 0
    status, _, err = evaluated('--gaps', '--seed', 7, samples=False)
    assert status == 2 and 'another identity (seed 1337, now 7)' in err
    assert (tmp_path / 'gaps.json').read_bytes() == before
    for flags, named in ((['--likelihood'], '--likelihood'), (['--passes', '2'], '--passes')):
        status, _, err = evaluated('--gaps', *flags, samples=False)
        assert status == 2 and f'--gaps goes without {named}' in err
