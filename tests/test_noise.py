"""Noise belongs to positions, seeds to the parts of a run, and sampling with it is exact."""
import math

import pytest
import torch

import noise
from noise import derive, pieces, probability, sample, uniform


def test_noise_does_not_depend_on_company():
    together = uniform(7, 0, range(5), 3, range(10))
    assert torch.equal(uniform(7, 0, [3], 3, range(10))[0], together[3])
    assert torch.equal(uniform(7, 0, [4, 1], 3, range(4, 8)), together[[4, 1], 4:8])


@pytest.mark.parametrize('change', [dict(seed=8), dict(stream=1), dict(step=4)])
def test_noise_differs_where_anything_differs(change):
    settings = dict(seed=7, stream=0, sequences=range(5), step=3, positions=range(10))
    a, b = uniform(**settings), uniform(**settings | change)
    assert (a != b).all()


def test_noise_is_uniform_and_uncorrelated():
    """400,000 numbers; each bound is five standard errors: fails by luck once in a million, and the seed is fixed."""
    u = uniform(1, 0, range(400), 0, range(1000))
    assert 0 < u.min() and u.max() < 1
    assert abs(u.mean() - 0.5) < 5 * (1 / 12 / 4e5) ** 0.5
    for a, b in ((u[:, 1:], u[:, :-1]), (u[1:], u[:-1]), (u, uniform(1, 0, range(400), 1, range(1000)))):
        assert abs(((a - 0.5) * (b - 0.5)).mean() * 12) < 5 * 4e5 ** -0.5


def test_derived_seeds_differ_and_repeat():
    """Every iteration, micro-step and use has a seed of its own, in the range that every generator takes."""
    seeds = [derive(seed, *counters) for seed in (0, 1337, 2 ** 62) for counters in
             [(), (0,), (1,), *((it, micro) for it in range(30) for micro in range(8)), (0, 0, 0, 7)]]
    assert len(set(seeds)) == len(seeds) and derive(1337, 3, 1) == derive(1337, 3, 1)
    assert all(0 <= seed < 2 ** 63 for seed in seeds)
    torch.Generator().manual_seed(max(seeds))
    uniform(max(seeds), 0, [0], 0, [0])


def test_pieces_cover_every_position_once_and_stay_small(monkeypatch):
    monkeypatch.setattr(noise, 'MAX_LOGITS', 100)
    for n, V, sizes in ((0, 10, [0]), (10, 10, [10]), (11, 10, [10, 1]), (25, 10, [10, 10, 5]), (3, 1000, [1, 1, 1])):
        parts = [range(n)[part] for part in pieces(n, V)]
        assert [i for part in parts for i in part] == list(range(n)) and [len(part) for part in parts] == sizes


def test_sampling_follows_the_distribution():
    """20,000 draws; five standard errors."""
    p = torch.tensor([0.5, 0.25, 0.2, 0.05, 0.0])
    ids = sample(p.log().expand(20000, -1), uniform(0, 0, [0], 0, range(20000))[0])
    share = ids.bincount(minlength=5) / 20000
    assert ((share - p).abs() <= 5 * (p * (1 - p) / 20000) ** 0.5).all()


def test_temperature_and_top_p_by_hand():
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(1000, -1)
    u = uniform(0, 0, [0], 0, range(1000))[0]
    assert sample(logits, u, temperature=0).eq(0).all()
    assert set(sample(logits, u, top_p=0.79).tolist()) == {0, 1}
    assert set(sample(logits, u, top_p=0.81).tolist()) == {0, 1, 2}
    assert sample(logits, u, top_p=1e-6).eq(0).all()
    assert sample(logits[:1], torch.tensor([1 - 2.0 ** -53])).item() == 2
    expected = torch.tensor([0.3, 0.2], dtype=torch.float64)
    torch.testing.assert_close(probability(logits[:2], torch.tensor([1, 2])), expected)


def sample_in_float64(logits, u, temperature):
    """The definition: everything in float64, one running sum over the vocabulary."""
    cdf = torch.softmax(logits.double() / temperature, -1).cumsum(-1)
    return torch.searchsorted(cdf, u[:, None] * cdf[:, -1:])[:, 0]


@pytest.mark.parametrize('V', [2, 66, 1024, 1025, 3000])
@pytest.mark.parametrize('temperature', [1.0, 0.3, 2.0])
def test_sampling_is_that_of_one_running_sum_in_float64(V, temperature):
    """Float32 weights and sums of groups: 1,000 draws, all the same; impossible tokens at both ends of a group too."""
    logits = 3 * torch.randn(1000, V, generator=torch.Generator().manual_seed(V))
    logits[:, ::7] = -torch.inf
    logits[:, V - V // 5:] = -torch.inf
    logits[:, 1] = 0
    u = uniform(1, 0, [0], 0, range(1000))[0]
    assert torch.equal(sample(logits, u, temperature), sample_in_float64(logits, u, temperature))


@pytest.mark.parametrize('V', [66, 1024, 5000])
@pytest.mark.parametrize('scale', [0.01, 2.0, 8.0])
@pytest.mark.parametrize('top_p', [0.05, 0.9, 0.999])
def test_the_nucleus_is_that_of_a_whole_sort(V, scale, top_p):
    """Flat and steep distributions, so that a few, a thousand and nearly all tokens are in it: 300 draws, the same."""
    logits = scale * torch.randn(300, V, generator=torch.Generator().manual_seed(V))
    u = uniform(1, 0, [0], 0, range(300))[0]
    prob = torch.softmax(logits.double(), -1)
    likelier = (prob.sort(-1, descending=True)[0].cumsum(-1).gather(1, prob.argsort(-1, descending=True).argsort(-1))
                - prob)
    kept = prob.masked_fill(likelier >= top_p, 0).cumsum(-1)
    assert torch.equal(sample(logits, u, 1.0, top_p), torch.searchsorted(kept, u[:, None] * kept[:, -1:])[:, 0])


@pytest.mark.parametrize('V', [100, 5000])
def test_the_tail_is_drawn_as_often_as_it_is_likely(V):
    """A token of probability 1e-9 has its 1e-9 of the random numbers: a running sum in float32 would lose it."""
    logits = torch.zeros(1, V).fill_(-torch.inf)
    logits[0, 0], logits[0, V - 2] = 0, math.log(1e-9)
    u = torch.tensor([1 - 1.1e-9, 1 - 0.9e-9, 1 - 2.0 ** -53], dtype=torch.float64)
    assert sample(logits.expand(3, -1), u).tolist() == [0, V - 2, V - 2]
