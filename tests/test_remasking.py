"""What is masked again after a pass: by score, noise, margin, threshold, and as ReMDM does."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import blank, tiny_model
from decoding import DecoderConfig, decode_window, positions_to_remask
from noise import ORDER, gumbel, margin, uniform


def remask(config, score, mask, free, i=0):
    score, mask, free = torch.tensor([score]).double(), torch.tensor([mask]).bool(), torch.tensor([free]).bool()
    return positions_to_remask(config, i, score, mask, free, [0], range(score.size(1)))[0].int().tolist()


def test_remasking_by_hand():
    score, new, free = [0.9, 0.8, 0.1, 0.3, 0.0], [0, 1, 1, 1, 0], [1, 1, 1, 1, 0]
    assert remask(DecoderConfig(mask_ratios=(0.5,)), score, new, free) == [1, 1, 0, 0, 0]
    assert remask(DecoderConfig(mask_ratios=(0.5,), revise=False), score, new, free) == [0, 1, 0, 1, 0]
    assert remask(DecoderConfig(mask_ratios=(0.0,)), score, new, free) == [0] * 5
    assert remask(DecoderConfig(mask_ratios=(1.0,)), score, new, free) == free
    assert remask(DecoderConfig(threshold=0.25), score, new, free) == [1, 1, 0, 1, 0]
    chosen = remask(DecoderConfig(mask_ratios=(0.5,), order='random'), score, new, free)
    assert sum(chosen) == 2 and all(c <= n for c, n in zip(chosen, new))


def test_remasking_a_share_of_the_kept_by_hand():
    """ReMDM: before the pass half of 40 were known, a tenth of them is masked again, and three quarters are known."""
    new, free = [0] * 20 + [1] * 20, [1] * 40
    given = [1] * 10 + [0] * 10 + [1] * 20    # the second ten are given text
    config = DecoderConfig(mask_ratios=(0.25,), order='random', remask_kept=0.1)
    chosen = remask(config, [0.5] * 40, new, free)
    assert sum(chosen[:20]) == 2 and sum(chosen[20:]) == 8
    capped = remask(DecoderConfig(mask_ratios=(0.25,), order='random', remask_kept=0.9), [0.5] * 40, new, free)
    assert sum(capped[:20]) == 10 and sum(capped[20:]) == 0, 'no more than (1 - alpha_s) / alpha_t'
    assert chosen != remask(replace(config, seed=2), [0.5] * 40, new, free)
    among_given = remask(replace(config, remask_kept=1.0), [0.5] * 40, new, given)
    assert sum(among_given[:10]) == 8 and sum(among_given[10:]) == 0    # a quarter of 30, rounded to even
    rising = remask(replace(config, mask_ratios=(0.75,)), [0.5] * 40, new, free)
    assert sum(rising[:20]) == 10 and sum(rising[20:]) == 20, 'as many as the ratio says, when it rises too'
    kept_for_good = remask(replace(config, revise=False), [0.5] * 40, new, free)
    assert sum(kept_for_good[:20]) == 0 and sum(kept_for_good) == 10
    ignored = remask(replace(config, order='confidence'), [0.5] * 40, new, free)
    assert ignored == remask(replace(config, order='confidence', remask_kept=0.0), [0.5] * 40, new, free)


def test_a_share_of_few_kept_tokens_is_rounded_by_lot():
    """A twentieth of eight is remasked in two passes out of five, not never."""
    mask = torch.tensor([[False] * 8 + [True] * 8]).expand(2000, -1)
    config = DecoderConfig(mask_ratios=(0.25,), order='random', remask_kept=0.05)
    chosen = positions_to_remask(config, 0, torch.zeros(2000, 16), mask, torch.ones_like(mask), range(2000), range(16))
    assert (chosen.sum(1) == 4).all() and set(chosen[:, :8].sum(1).tolist()) == {0, 1}
    assert chosen[:, :8].sum(1).double().mean().item() == pytest.approx(0.4, abs=4 * (0.24 / 2000) ** 0.5)


def test_the_margin_goes_by_the_distribution_and_not_by_the_token():
    """Position 0 hesitates between two tokens, position 1 is sure but an unlikely token was drawn there."""
    model = tiny_model()
    p = torch.full((1, 2, model.mask_id), 0.01)
    p[0, 0, :2], p[0, 1, 0] = 0.45, 0.9
    model.forward, model.lm_head = lambda xt: p.log(), lambda hidden: hidden
    x, free = torch.full((1, 2), model.mask_id), torch.ones(1, 2, dtype=torch.bool)
    for order, worst in (('margin', 0), ('confidence', 1)):
        steps, config = [], DecoderConfig(use_sampler=False, order=order, mask_ratios=(0.5,))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr('filling.sample', lambda logits, u, *_: torch.tensor([0, 1])[-len(u):])
            decode_window(model, x, free, config, [0], range(2), steps.append, wanted=['remask_score'])
        assert steps[0]['remasked'].tolist() == [[worst == 0, worst == 1]]
    assert margin(p[0].log()).tolist() == pytest.approx([0, 0.9 - 0.01], abs=1e-6)


def noise_on_order(config, i, n):
    """Strength times Gumbel noise of n positions of sequence 0 in pass i."""
    strength = config.randomness_strength * (1 - (i + 1) / config.passes)
    return (strength * gumbel(uniform(config.seed, ORDER, [0], i, range(n)))[0]).tolist()


@pytest.mark.parametrize('seed', range(5))
def test_noise_on_the_order_has_maskgits_sign(seed):
    """MaskGIT (2202.04200) keeps the highest log p + strength * Gumbel; the noise was once added to -log p instead.

    Gumbel noise is skewed: the other sign is another sampler. Both are written out here and give different choices.
    """
    rng = np.random.default_rng(seed)
    prob = rng.uniform(0.05, 0.95, 40).tolist()
    config = DecoderConfig(mask_ratios=(0.5,) * 9, randomness_strength=2.0, seed=seed)
    g = noise_on_order(config, 3, 40)

    def lowest_half(keep):
        worst = sorted(range(40), key=keep.__getitem__)[:20]
        return [int(i in worst) for i in range(40)]
    published = lowest_half([math.log(p) + n for p, n in zip(prob, g)])
    other_sign = lowest_half([math.log(p) - n for p, n in zip(prob, g)])
    ones = [1] * 40
    found = remask(config, [1 - p for p in prob], ones, ones, 3)
    assert found == published and found != other_sign


def test_noise_on_the_order_is_annealed():
    """Before the last pass there is hardly any: order by remask score alone."""
    score, ones = np.random.default_rng(0).random(40).tolist(), [1] * 40
    quiet = DecoderConfig(mask_ratios=(0.5,) * 50)
    loud = DecoderConfig(mask_ratios=(0.5,) * 50, randomness_strength=1.0)
    assert remask(quiet, score, ones, ones, 0) != remask(loud, score, ones, ones, 0)
    last = remask(quiet, score, ones, ones, 49), remask(loud, score, ones, ones, 49)
    assert sum(a != b for a, b in zip(*last)) <= 6


def test_threshold_obeys_noise_and_no_revise():
    """--schedule-mode threshold once ignored --no-revise and --randomness-strength.

    A token is remasked if p * exp(strength * Gumbel), the quantity that ratios rank by, is below 1 - threshold.
    """
    score = np.random.default_rng(0).uniform(0.05, 0.95, 40).tolist()
    new, ones = [i % 2 for i in range(40)], [1] * 40
    config = DecoderConfig(threshold=0.6, mask_ratios=(0.5,) * 9, randomness_strength=1.0)
    noisy = [int((1 - s) * math.exp(n) < 0.4) for s, n in zip(score, noise_on_order(config, 2, 40))]
    assert remask(config, score, new, ones, 2) == noisy != [int(s > 0.6) for s in score]
    config.revise = False
    assert remask(config, score, new, ones, 2) == [n * c for n, c in zip(noisy, new)]


def test_threshold_never_touches_what_was_kept_where_revise_is_off():
    model = tiny_model()
    remasked_again = {}
    for revise in (True, False):
        steps = []
        config = DecoderConfig(threshold=0.5, revise=revise, mask_ratios=(0.5,) * 7)
        decode_window(model, *blank(model), config, range(3), range(24), steps.append)
        assert len(steps) > 2
        masks = [step['xt'] == model.mask_id for step in steps]
        remasked_again[revise] = sum(int((later & ~mask).sum()) for mask, later in zip(masks, masks[1:]))
    assert remasked_again[False] == 0 < remasked_again[True]


def test_threshold_stops_early_when_no_score_is_above_it():
    model = tiny_model()
    config = DecoderConfig(threshold=1.0, mask_ratios=(0.5,) * 9)
    assert decode_window(model, *blank(model), config, range(3), range(24)).passes == 1
