"""The likelihood of a decoder is that of what it samples, it sums to one, and it is right where the truth is known."""
import itertools
import math

import numpy as np
import pytest
import torch

import decoding
from conftest import tiny_model
from decoding import DecoderConfig, decode_window
from diffusion import validate
from likelihood import log_likelihood
from plans import ANY_PASSES, Plan, make_plan, reads_blockwise

V, T = 3, 5    # letters and length of the tiny texts: 243 of them
PLANS = [('left-to-right', 1), ('fronts-2', 1), ('blocks', 2), ('blocks', 5), ('interleaved', 3), ('random', 2),
         ('spans', 2), ('wavefront', 1), ('speculative', 1), ('speculative', 2), ('speculative', 3), ('speculative', 5)]


def tiny(seed=0):
    model = tiny_model(seed, vocab_size=V + 1, block_size=T)
    model.sampler_head.out[1].weight.data *= 4    # neighbours matter
    return model


def all_texts():
    return torch.tensor(list(itertools.product(range(V), repeat=T)))


def plan_for(model, name, passes, B=1):
    """The plan that decode_window follows for sequence 0 of the default seed, which every text is given here."""
    first = None
    if name == 'wavefront':
        from filling import HeadFiller
        blank = torch.full((1, T), model.mask_id)
        first = HeadFiller(model).first(torch.ones_like(blank).bool(), model(blank))
    return make_plan(name, T, passes, sequences=[0], first=first)


@pytest.mark.parametrize('name, passes, use_sampler', [
    (*plan, use) for plan in PLANS for use in (True, False) if use or plan[0] != 'speculative'])
def test_probabilities_of_all_texts_sum_to_one(name, passes, use_sampler):
    model = tiny()
    with torch.no_grad():
        total = log_likelihood(model, all_texts(), plan_for(model, name, passes), use_sampler).sum(1).exp().sum()
    assert total.item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize('name, passes, use_sampler, dtype', [
    *[(*plan, True, torch.float64) for plan in PLANS], ('blocks', 2, False, torch.float64),
    *[(*plan, dtype) for plan in [('blocks', 2, True), ('spans', 2, True), ('interleaved', 3, False),
                                  ('speculative', 3, True)]
      for dtype in (torch.float32, torch.bfloat16, torch.float16)]])
def test_samples_have_the_likelihood_that_is_claimed(name, passes, use_sampler, dtype):
    """20,000 samples of the decoder against the 243 probabilities: a chi-squared test, at five standard deviations.

    In 16 bits as in training and decoding: by autocast.
    """
    model, n = tiny().to(torch.float64 if dtype == torch.float64 else torch.float32), 20000
    short = dtype in (torch.bfloat16, torch.float16)
    with torch.no_grad(), torch.autocast('cpu', dtype if short else torch.bfloat16, enabled=short):
        plan = plan_for(model, name, passes)
        probability = log_likelihood(model, all_texts(), plan, use_sampler).sum(1).exp().numpy()
        config = DecoderConfig(use_sampler=use_sampler, plan=name, plan_passes=passes, mask_ratios=())
        x = torch.full((n, T), model.mask_id)
        found = decode_like_sequence_0(model, x, config)
    require_same_counts(found, n * probability)


def require_same_counts(found, expected):
    """A chi-squared test, at five standard deviations: found (n, T) samples, expected (V ** T,) counts of all texts."""
    code = (found * V ** torch.arange(found.size(1) - 1, -1, -1)).sum(1)
    counts = np.bincount(code.numpy(), minlength=len(expected))
    common = expected >= 5
    chi2 = ((counts - expected)[common] ** 2 / expected[common]).sum()
    rest = counts[~common].sum(), expected[~common].sum()
    degrees = common.sum()
    assert abs(chi2 - degrees) < 5 * math.sqrt(2 * degrees), (chi2, degrees)
    assert abs(rest[0] - rest[1]) < 5 * math.sqrt(rest[1] + 1)


@pytest.mark.parametrize('name, passes, use_sampler', [
    *[(*plan, True) for plan in PLANS], ('blocks', 2, False), ('interleaved', 3, False)])
def test_a_continuation_has_the_likelihood_of_its_samples(name, passes, use_sampler):
    """Behind two given letters and beside two more, of eight, which themselves have the likelihood 1."""
    length, n = 8, 20000
    model = tiny_model(0, vocab_size=V + 1, block_size=length)
    given = {0: 2, 1: 0, 4: 1, 7: 2}
    free = torch.tensor([[i not in given for i in range(length)]])
    texts = torch.tensor([[given.get(i, 0) for i in range(length)]]).repeat(V ** 4, 1)
    texts[:, free[0]] = torch.tensor(list(itertools.product(range(V), repeat=4)))
    first = torch.zeros_like(free)
    first[0, 0] = True    # where a blank sequence would begin
    plan = make_plan(name, length, passes, sequences=[0], first=first, free=free)
    log_prob = log_likelihood(model, texts, plan, use_sampler)
    assert not log_prob[:, ~free[0]].any()
    expected = np.zeros(V ** length)
    expected[(texts * V ** torch.arange(length - 1, -1, -1)).sum(1)] = n * log_prob.sum(1).exp()
    assert expected.sum() == pytest.approx(n, rel=1e-5)
    assert (expected >= 5).sum() >= 6 and ((plan.wave_of > 0) & free).any(), 'the head has something to say'
    x = torch.where(free, model.mask_id, texts[:1]).repeat(n, 1)
    config = DecoderConfig(use_sampler=use_sampler, plan=name, plan_passes=passes, mask_ratios=())
    require_same_counts(decode_like_sequence_0(model, x, config), expected)


def decode_like_sequence_0(model, x, config):
    """Samples under noise of their own but the plan of sequence 0, which random plans draw by sequence."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, 'make_plan', lambda name, length, passes, seed, sequences, **kw:
                      make_plan(name, length, passes, seed, [0] * len(sequences), **kw))
        return decode_window(model, x, x == model.mask_id, config, range(len(x)), range(x.size(1))).x


@pytest.mark.parametrize('name, passes', PLANS)
def test_later_tokens_change_nothing_earlier(name, passes):
    """No leak: changing a token moves its own probability and those of later passes and waves alone."""
    model, x0 = tiny(), torch.tensor([[0, 1, 2, 1, 0]])
    plan = plan_for(model, name, passes)
    key = (plan.pass_of * 100 + plan.wave_of)[0]
    with torch.no_grad():
        before = log_likelihood(model, x0, plan)[0]
        for i in range(T):
            changed = x0.clone()
            changed[0, i] = (x0[0, i] + 1) % V
            after = log_likelihood(model, changed, plan)[0]
            same = (key <= key[i]) & (torch.arange(T) != i)
            torch.testing.assert_close(after[same], before[same], atol=1e-12, rtol=0)
            distance = torch.arange(T) - i
            later = (key > key[i]) & (distance.abs() <= 2)    # within the head's reach
            if plan.lanes:
                later &= distance > 0    # filling from left to right sees the left alone
            if later.any():
                assert (after - before)[later].abs().max() > 1e-6


# -----------------------------------------------------------------------------
# the exact denoiser of a chain

CHAIN_T, LETTERS = 8, 3
STEP = torch.tensor([[0.8, 0.15, 0.05], [0.1, 0.7, 0.2], [0.25, 0.05, 0.7]], dtype=torch.float64)
START = torch.linalg.matrix_power(STEP, 200)[0]


class Perfect(torch.nn.Module):
    """A position's distribution given the nearest visible letters on both sides, exact for the chain."""
    mask_id, sampler_head, critic_head = LETTERS, None, None

    class config:
        vocab_size, block_size = LETTERS + 1, CHAIN_T

    def forward(self, xt):
        logits = torch.zeros(*xt.shape, LETTERS, dtype=torch.float64)
        for b, i in itertools.product(range(len(xt)), range(xt.size(1))):
            visible = [j for j in range(xt.size(1)) if xt[b, j] != LETTERS]
            left, right = [j for j in visible if j < i], [j for j in visible if j > i]
            p = torch.linalg.matrix_power(STEP, i - left[-1])[xt[b, left[-1]]] if left else START
            if right:
                p = p * torch.linalg.matrix_power(STEP, right[0] - i)[:, xt[b, right[0]]]
            logits[b, i] = (p / p.sum()).log()
        return logits

    def reader(self, B, length):
        return self

    def read_block(self, x, start, end):
        xt = torch.where(torch.arange(x.size(1)) < start, x, LETTERS)
        return self(xt)[:, start:end], None

    def lm_head(self, hidden):
        return hidden


def chain_rows(n, seed=0):
    rng, x = np.random.default_rng(seed), np.empty((n, CHAIN_T), np.int64)
    x[:, 0] = rng.choice(LETTERS, n, p=START.numpy())
    for i in range(1, CHAIN_T):
        x[:, i] = [rng.choice(LETTERS, p=STEP[a].numpy()) for a in x[:, i - 1]]
    return torch.from_numpy(x)


def chain_log_probability(x):
    return START[x[:, 0]].log() + STEP[x[:, :-1], x[:, 1:]].log().sum(1)


@pytest.mark.parametrize('name', ['blocks', 'interleaved', 'random', 'spans'])
def test_one_token_a_pass_is_exact_in_any_order(name):
    """A perfect denoiser that fills one position in each pass has the chain's own likelihood, text by text."""
    x = chain_rows(20)
    plan = make_plan(name, CHAIN_T, CHAIN_T, sequences=range(20))
    torch.testing.assert_close(log_likelihood(Perfect(), x, plan, use_sampler=False).sum(1), chain_log_probability(x))


def test_two_passes_by_hand():
    """Interleaved in two passes: even positions from their marginals, odd ones from the neighbours on both sides."""
    x = chain_rows(400)
    by_hand = START[x[:, ::2]].log().sum(1)
    for i in range(1, CHAIN_T, 2):
        p = STEP[x[:, i - 1]]
        if i + 1 < CHAIN_T:
            p = p * STEP[:, x[:, i + 1]].T
        by_hand += (p / p.sum(1, keepdim=True)).gather(1, x[:, i:i + 1])[:, 0].log()
    found = log_likelihood(Perfect(), x, make_plan('interleaved', CHAIN_T, 2), use_sampler=False).sum(1)
    torch.testing.assert_close(found, by_hand)
    assert found.mean() < chain_log_probability(x).mean() - 0.1, 'parallel draws from marginals cost likelihood'


def test_one_position_a_pass_in_random_order_is_the_nelbo():
    """The mean over texts and orders equals validate's bound on a random model, to four standard errors."""
    model = tiny_model(heads=False)
    x0 = torch.randint(0, 11, (300, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ll = log_likelihood(model, x0, make_plan('random', 24, 24, sequences=range(300)), use_sampler=False).mean(1)
    bound = validate(model, x0, 50, seed=0)
    error = math.hypot(ll.std().item() / 300 ** 0.5, bound['nelbo_error'])
    assert error < 0.2 and abs(-ll.mean().item() - bound['nelbo']) < 4 * error


# -----------------------------------------------------------------------------
# plans

def test_plans_by_hand():
    plan = lambda name, K, T=8: make_plan(name, T, K)
    assert plan('left-to-right', 1).wave_of.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert plan('fronts-2', 1).wave_of.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]
    blocks = plan('blocks', 2)
    assert blocks.pass_of.tolist() == [[0] * 4 + [1] * 4] and blocks.wave_of.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]
    assert plan('interleaved', 4).pass_of.tolist() == [[0, 2, 1, 3] * 2]
    assert plan('blocks', 100).passes == 8, 'no more passes than positions'


@pytest.mark.parametrize('name, passes', [('left-to-right', 1), ('fronts-1', 1), ('fronts-3', 1), ('wavefront', 1),
                                          *((name, K) for name in ANY_PASSES for K in (1, 3))])
@pytest.mark.parametrize('start', [0, 5])
def test_which_plans_see_nothing_behind_a_mask(name, passes, start):
    free = (torch.arange(24) >= start)[None]
    plan = make_plan(name, 24, passes, first=torch.zeros_like(free), free=free)
    assert reads_blockwise(name, passes, start) == plan.blockwise


@pytest.mark.parametrize('name', ['blocks', 'spans', 'interleaved', 'random'])
@pytest.mark.parametrize('passes', [1, 3, 8, 16])
def test_every_pass_of_a_plan_fills_its_share(name, passes):
    plan = make_plan(name, 48, passes, sequences=range(5))
    counts = torch.stack([row.bincount(minlength=passes) for row in plan.pass_of])
    assert isinstance(plan, Plan) and counts.min() >= 48 // passes - 1 and counts.max() <= 48 // passes + 1
