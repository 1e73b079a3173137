"""The autoregressive baseline: a key-value cache changes its speed alone."""
import math

import pytest
import torch

import autoregressive
from cache import CachedTrunk
from conftest import tiny_model
from noise import TOKENS, sample, uniform


@pytest.fixture(scope='module')
def model():
    return tiny_model(heads=False, attention_type='causal')


def ids(B, T, seed=0):
    return torch.randint(0, 11, (B, T), generator=torch.Generator().manual_seed(seed))


def generate_without_cache(model, first, length, sequences, seed, temperature):
    """Every token from a forward pass over all tokens before it."""
    x = first
    for i in range(first.size(1), length):
        u = uniform(seed, TOKENS, sequences, 0, [i])[:, 0]
        x = torch.cat((x, sample(model.lm_head(model(x)[:, -1]), u, temperature)[:, None]), 1)
    return x


@torch.no_grad()
def test_one_position_at_a_time_gives_the_logits_of_a_whole_forward_pass(model):
    """Every layer sees as much as without a cache: attention back to the start, the convolution 8 positions back."""
    x = ids(3, 24)
    cached = CachedTrunk(model, 3, 24)
    logits = torch.cat([cached.lm_head(cached.read(x[:, t:t + 1])) for t in range(24)], 1)
    torch.testing.assert_close(logits, model.lm_head(model(x)), rtol=1e-6, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize('prompt, length, temperature', [(1, 25, 1.0), (7, 20, 0.7), (3, 12, 0.0), (5, 5, 1.0)])
def test_same_tokens_with_and_without_cache(model, prompt, length, temperature):
    arguments = ids(4, prompt, seed=1), length, [2, 0, 9, 5], 7, temperature
    x = autoregressive.generate(model, *arguments)
    assert torch.equal(x, generate_without_cache(model, *arguments))
    assert torch.equal(x[:, :prompt], arguments[0]) and x.shape == (4, length)


@torch.no_grad()
def test_a_sequence_does_not_depend_on_its_company(model):
    first = ids(4, 1, seed=2)
    together = autoregressive.generate(model, first, 20, range(4), seed=3)
    alone = autoregressive.generate(model, first[2:3], 20, [2], seed=3)
    assert torch.equal(together[2:3], alone)
    assert not torch.equal(together[2:3], autoregressive.generate(model, first[2:3], 20, [2], seed=4))


@torch.no_grad()
def test_autocast_reaches_the_cache(model):
    """In bfloat16 the cached logits differ from the uncached ones by rounding alone."""
    x, small = ids(2, 12), tiny_model(heads=False, attention_type='causal').float()
    for p in small.parameters():
        p.mul_(0.3)
    exact = small.lm_head(small(x))
    with torch.autocast('cpu', torch.bfloat16):
        whole = small.lm_head(small(x))
        cached = CachedTrunk(small, 2, 12)
        logits = torch.cat([cached.lm_head(cached.read(x[:, t:t + 1])) for t in range(12)], 1)
    assert cached.dtype == torch.bfloat16 and logits.dtype == torch.float32
    assert (logits - exact).abs().max() < 2 * (whole - exact).abs().max() + 1e-3


@pytest.mark.parametrize('n, length', [(1, 25), (1, 26), (3, 70), (30, 60)])
def test_beyond_the_block_the_window_slides(model, n, length):
    """As a plain loop without a cache, whose window drops its first half when it is full: blocks of 24."""
    first, start = ids(2, n), 0
    x, u = first, uniform(5, TOKENS, range(2), 0, range(length))
    for t in range(n, length):
        if t - start > 24:
            start = t - 12
        logits = model.lm_head(model(x[:, start:]))[:, -1]
        x = torch.cat((x, sample(logits, u[:, t])[:, None]), 1)
    assert torch.equal(autoregressive.generate(model, first, length, range(2), seed=5), x)


@torch.no_grad()
def test_nll_by_hand(model):
    x = ids(2, 9)
    log_prob = torch.log_softmax(model.lm_head(model(x[:, :-1])), -1)
    by_hand = torch.stack([torch.stack([-log_prob[b, i, x[b, i + 1]] for i in range(8)]) for b in range(2)])
    torch.testing.assert_close(autoregressive.nll(model, model, x), by_hand)
    result = autoregressive.validate(model, x, batch_size=1)
    means = by_hand.double().mean(1)
    assert result['nll'] == pytest.approx(means.mean().item(), rel=1e-5)
    assert result['nll_error'] == pytest.approx(means.std().item() / math.sqrt(2), rel=1e-4)
