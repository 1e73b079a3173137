"""The decoder: schedules, passes and corrections, blocks, and what every decoder must keep."""
import pytest
import torch

from conftest import blank, masked_sequences, tiny_model
from decoding import WANTED, DecoderConfig, decode_window, default_config, generate, linear_ratios, windows
from filling import NaiveFiller, HeadFiller
from noise import margin, probability


@pytest.mark.parametrize('iterations, expected', [
    (1, []), (2, [0.9]), (3, [0.9, 0.1]), (5, [0.9, 0.9 - 0.8 / 3, 0.9 - 1.6 / 3, 0.1])])
def test_schedule_and_both_ends(iterations, expected):
    assert linear_ratios(iterations, 0.9, 0.1) == pytest.approx(expected)


@pytest.mark.parametrize('iterations', [1, 2, 7, 8, 15])
def test_the_default_takes_the_iterations_asked_for(iterations):
    model = tiny_model()
    assert default_config(model, iterations).passes == iterations
    decoded = decode_window(model, *blank(model), default_config(model, iterations), range(3), range(24))
    assert 1 <= decoded.passes <= iterations, 'it may be done sooner'
    naive = default_config(model, iterations, use_sampler=False)
    assert decode_window(model, *blank(model), naive, range(3), range(24)).passes == naive.passes == iterations
    assert default_config(model).order == 'critic' and default_config(model, use_sampler=False).order == 'confidence'
    assert not default_config(tiny_model(heads=False)).use_sampler


# -----------------------------------------------------------------------------
# passes and corrections

def spied(model, config):
    """What a decoder from all masks filled, [(positions (B, T) bool, forward passes so far)], its text and passes."""
    passes, fills, steps = [], [], []
    hook = model.register_forward_hook(lambda *_: passes.append(1))

    def spy(plain):
        return lambda self, xt, mask, *rest: fills.append((mask, len(passes))) or plain(self, xt, mask, *rest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeadFiller, 'fill', spy(HeadFiller.fill))
        patch.setattr(HeadFiller, 'correct', spy(HeadFiller.correct))
        x = decode_window(model, *blank(model), config, range(3), range(24), steps.append).x
    hook.remove()
    return x, fills, steps


@pytest.mark.parametrize('order', ['confidence', 'margin', 'critic', 'random'])
def test_corrections_resample_a_share_of_what_a_pass_filled_and_cost_no_pass(order):
    model = tiny_model()
    settings = dict(order=order, mask_ratios=(0.5, 0.25), correction_ratio=0.5)
    x, fills, steps = spied(model, DecoderConfig(corrections=2, **settings))
    assert [(int(mask.sum(1).unique()), trunk) for mask, trunk in fills] == [
        (24, 1), (12, 1), (6, 1), (12, 2), (6, 2), (3, 2), (6, 3), (3, 3), (2, 3)]
    for k in (0, 3, 6):
        filled = fills[k][0]
        assert all((filled | ~resampled[0]).all() for resampled in fills[k:k + 3]), 'what was kept is not touched'
        assert torch.equal(steps[k // 3]['corrected'], fills[k + 1][0] | fills[k + 2][0])
    assert (x < model.mask_id).all()
    assert not torch.equal(x, spied(model, DecoderConfig(corrections=0, **settings))[0])
    assert all((step['wave'][step['xt'] != model.mask_id] == 0).all() for step in steps)


def test_temperature_goes_evenly_from_the_first_pass_to_the_last():
    temperatures, plain, correct = [], HeadFiller.fill, HeadFiller.correct

    def spy(plain):
        def fill(self, xt, mask, hidden, u, temperature, *rest):
            temperatures.append(temperature)
            return plain(self, xt, mask, hidden, u, temperature, *rest)
        return fill
    model = tiny_model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeadFiller, 'fill', spy(plain))
        patch.setattr(HeadFiller, 'correct', spy(correct))
        config = DecoderConfig(temperature=0.8, end_temperature=0.2, mask_ratios=(0.5, 0.25), corrections=1)
        decode_window(model, *blank(model), config, range(3), range(24))
    assert temperatures == pytest.approx([0.8, 0.8, 0.5, 0.5, 0.2, 0.2])
    to_zero = DecoderConfig(temperature=0.2, end_temperature=0.0, mask_ratios=(0.5,) * 3)
    assert to_zero.temperature_of(3) == 0.0    # 0.2 - 0.2 * 3 / 3 is below it
    assert DecoderConfig(temperature=0.7, mask_ratios=(0.5,)).temperature_of(1) == 0.7
    assert DecoderConfig(temperature=0.7, end_temperature=0.1, mask_ratios=()).temperature_of(0) == 0.7


def test_naive_decoding_has_no_corrections():
    model = tiny_model()

    def run(n):
        config = DecoderConfig(use_sampler=False, mask_ratios=(0.5,), corrections=n)
        return decode_window(model, *blank(model), config, range(3), range(24)).x
    assert torch.equal(run(0), run(3))


@pytest.mark.parametrize('use_sampler', [True, False])
@pytest.mark.parametrize('order', ['confidence', 'margin', 'critic'])
@pytest.mark.parametrize('corrections', [0, 2])
def test_remask_score_is_that_of_the_present_neighbours(use_sampler, order, corrections):
    """A kept token is rescored when a token beside it changes: no stale neighbour decides what is remasked."""
    model = tiny_model()
    steps, views = [], [None]
    model.register_forward_hook(lambda _, args, hidden: views.append(hidden))
    config = DecoderConfig(use_sampler=use_sampler, order=order, mask_ratios=(0.5, 0.4, 0.3), corrections=corrections)
    decode_window(model, *blank(model), config, range(3), range(24), steps.append, wanted=['hidden', 'remask_score'])
    everywhere = torch.ones(3, 24).bool().nonzero(as_tuple=True)
    with torch.no_grad():
        for step, hidden in zip(steps, views[1:]):
            masked = (step['xt'] == model.mask_id)[..., None]
            seen = hidden if step['pass'] == 0 else torch.where(masked, hidden, seen)
            assert torch.equal(step['hidden'], seen)
            by = margin if order == 'margin' else probability
            right = (HeadFiller if use_sampler else NaiveFiller)(model).rescore(step['x'], everywhere, seen, by)
            if order == 'critic':
                logits = model.critic_head(seen, step['x'], everywhere, model.wte.weight).double()
                right = right * torch.sigmoid(-logits)
            torch.testing.assert_close(step['remask_score'].flatten(), 1 - right, atol=1e-5, rtol=0)


# -----------------------------------------------------------------------------
# top_p

@pytest.mark.parametrize('use_sampler', [True, False])
def test_top_p_reaches_every_draw_of_a_decoding(use_sampler):
    """A nucleus of one token is the likeliest token, as at temperature 0: in first positions, waves and corrections."""
    model = tiny_model(sampler_min_neighbors_ratio=0.2)

    def run(**changes):
        config = DecoderConfig(use_sampler=use_sampler, mask_ratios=(0.6, 0.3), corrections=2, **changes)
        return decode_window(model, *blank(model), config, range(3), range(24)).x
    assert torch.equal(run(top_p=1e-6), run(temperature=0.0))
    assert not torch.equal(run(top_p=1e-6), run()) and not torch.equal(run(top_p=0.5), run())


def test_naive_draws_lie_in_the_nucleus():
    """One pass over 64 blank sequences: no token from outside the nucleus, and more than one from inside."""
    model = tiny_model()
    x, free = blank(model, 64)
    prob = model.lm_head(model(x[:1]))[0].double().softmax(-1)
    likelier = (prob[:, None, :] > prob[:, :, None]).double() @ prob[:, :, None]    # mass of the likelier tokens
    outside = likelier[..., 0] >= 0.9
    drawn = {}
    for top_p in (1.0, 0.9):
        config = DecoderConfig(use_sampler=False, mask_ratios=(), top_p=top_p)
        ids = decode_window(model, x, free, config, range(64), range(24)).x
        drawn[top_p] = int(outside[torch.arange(24), ids].sum())
    assert drawn[0.9] == 0 < drawn[1.0] and max(len(ids[:, i].unique()) for i in range(24)) > 1


# -----------------------------------------------------------------------------
# what every decoder keeps

def decode(model, rows, order='confidence', **changes):
    _, xt, mask = masked_sequences()
    config = DecoderConfig(order=order, mask_ratios=tuple(linear_ratios(5, 0.8, 0.2)), randomness_strength=0.5,
                           corrections=1, remask_kept=0.2, **changes)    # in random order
    return decode_window(model, xt[rows], mask[rows], config, rows, range(24)).x


@pytest.mark.parametrize('order', ['confidence', 'margin', 'critic', 'random'])
@pytest.mark.parametrize('use_sampler', [True, False])
def test_a_sequence_alone_equals_the_sequence_in_a_batch(order, use_sampler):
    """Exact in float64, token for token; tests/test_precision.py says what holds in other precisions."""
    model = tiny_model()
    together = decode(model, [0, 1, 2, 3, 4, 5], order, use_sampler=use_sampler)
    for row in range(6):
        assert torch.equal(decode(model, [row], order, use_sampler=use_sampler)[0], together[row])
    assert torch.equal(decode(model, [5, 2], order, use_sampler=use_sampler), together[[5, 2]])


def test_a_sequence_stops_alone_as_it_stops_in_company():
    """With rising ratios a short gap has nothing to remask at first, while longer ones go on."""
    model = tiny_model()
    _, xt, mask = masked_sequences()
    mask[0] = torch.arange(24) < 4
    config = DecoderConfig(mask_ratios=(0.03, 0.5, 0.5))
    together = decode_window(model, xt, mask, config, range(6), range(24)).x
    alone = decode_window(model, xt[:1], mask[:1], config, [0], range(24))
    assert alone.passes == 1 and torch.equal(alone.x[0], together[0])


@pytest.mark.parametrize('order', ['confidence', 'margin', 'critic', 'random'])
@pytest.mark.parametrize('use_sampler', [True, False])
@pytest.mark.parametrize('threshold', [0.0, 0.3])
def test_no_mask_is_left_and_given_text_is_kept(order, use_sampler, threshold):
    model = tiny_model()
    x0, xt, mask = masked_sequences()
    x = decode(model, [0, 1, 2, 3, 4, 5], order, use_sampler=use_sampler, threshold=threshold)
    assert (x < model.mask_id).all() and (x >= 0).all()
    assert torch.equal(x[~mask], x0[~mask])


def test_no_mask_is_produced_at_any_temperature():
    model = tiny_model()
    assert model.lm_head(model(torch.zeros(1, 4, dtype=torch.long))).size(-1) == model.mask_id
    for temperature in (0.0, 1e-3, 100.0):
        assert (decode(model, [0, 5], temperature=temperature) < model.mask_id).all()


def test_same_seed_same_tokens():
    model = tiny_model()

    def run(seed):
        return decode_window(model, *blank(model), DecoderConfig(seed=seed), range(3), range(24)).x
    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))


def test_naive_and_wavefront_draw_with_the_same_noise():
    """In one pass the first positions of a blank sequence, filled from marginals, get the same tokens from both."""
    model = tiny_model(sampler_min_neighbors_ratio=0.3)
    steps, x = [], {}
    for use_sampler in (True, False):
        config = DecoderConfig(use_sampler=use_sampler, mask_ratios=())
        x[use_sampler] = decode_window(model, *blank(model), config, range(3), range(24), steps.append).x
    first = steps[0]['wave'] == 0
    assert first.sum() == 21 and torch.equal(x[True][first], x[False][first]) and not torch.equal(x[True], x[False])


# -----------------------------------------------------------------------------
# blocks

def test_blocks_cover_and_overlap():
    assert windows(10, 16) == [(0, 10)] and windows(16, 16) == [(0, 16)]
    assert windows(40, 16) == [(0, 16), (12, 28), (24, 40)]
    assert windows(17, 16) == [(0, 16), (1, 17)]


def test_long_sequences_keep_given_text_and_fill_the_rest():
    model = tiny_model()
    x, _ = blank(model, 2, 60)
    x[:, 30:33] = torch.tensor([1, 2, 3])
    free = x == model.mask_id
    config = DecoderConfig(mask_ratios=(0.5, 0.3))
    decoded = generate(model, x, free, config, range(2), wanted=['p_generated'])
    assert decoded.x[:, 30:33].tolist() == [[1, 2, 3]] * 2 and (decoded.x < model.mask_id).all()
    assert decoded.passes == 3 * len(windows(60, 24))
    assert (decoded.p_generated[:, 30:33] == 0).all() and (decoded.p_generated[free] > 0).all()
    assert torch.equal(decoded.x[1:], generate(model, x[1:], free[1:], config, [1]).x)


# -----------------------------------------------------------------------------
# work that nobody asks for

def test_the_trunk_reads_the_sequences_that_have_masks():
    """One sequence has nothing left to remask after the first pass; it is not read again, and the others are."""
    model, rows = tiny_model(), []
    model.register_forward_hook(lambda _, args, hidden: rows.append(len(hidden)))
    _, xt, mask = masked_sequences()
    mask[0] = torch.arange(24) < 4
    decode_window(model, xt, mask, DecoderConfig(mask_ratios=(0.03, 0.5)), range(6), range(24))
    assert rows[0] == 6 and rows[1] < 6 and len(rows) == 3


@pytest.mark.parametrize('plan', ['blocks', 'left-to-right', 'interleaved'])
@pytest.mark.parametrize('ratios', [(), (0.5, 0.3)])
@pytest.mark.parametrize('order', ['critic', 'confidence'])
def test_what_is_decoded_does_not_depend_on_who_listens(plan, ratios, order):
    """Scores are made when something reads them: after every pass for a listener, else where remasking follows."""
    model = tiny_model()
    passes = 1 if plan == 'left-to-right' else 3
    config = DecoderConfig(plan=plan, plan_passes=passes, mask_ratios=ratios, order=order)
    alone = decode_window(model, *blank(model), config, range(3), range(24))
    heard = decode_window(model, *blank(model), config, range(3), range(24), lambda step: None, wanted=WANTED)
    assert torch.equal(alone.x, heard.x) and alone.p_generated is None and (heard.p_generated > 0).all()


def test_the_recurrent_state_has_read_corrected_tokens(monkeypatch):
    """Carried on from the draw before the corrections it had read tokens that were gone: 176 of 256 came out others."""
    model, plain, compared = tiny_model(), HeadFiller.fill_from_left, []

    def fill_from_left(self, xt, mask, hidden, last, lanes, u, temperature, top_p, state=None):
        if state is not None:
            read = self.head.states(torch.nn.functional.pad(xt[:, :lanes[0].start], (0, 1)), self.wte)[:, -1]
            torch.testing.assert_close(state, read, atol=1e-10, rtol=0)
        compared.append(state is not None)
        return plain(self, xt, mask, hidden, last, lanes, u, temperature, top_p, state)
    monkeypatch.setattr(HeadFiller, 'fill_from_left', fill_from_left)
    for corrections in (0, 2):
        config = DecoderConfig(plan='blocks', plan_passes=4, mask_ratios=(), corrections=corrections)
        decode_window(model, *blank(model), config, range(3), range(24))
    assert len(compared) == 8 and any(compared)


@pytest.mark.parametrize('plan', ['random', 'spans'])
def test_a_plan_of_its_own_does_not_depend_on_the_batch(plan):
    """A template leaves few positions free: the passes that a plan takes were cut to the last one of the batch."""
    model = tiny_model()
    x, free = blank(model, B=8)
    x[:, 4:], free[:, 4:] = 3, False
    config = DecoderConfig(plan=plan, plan_passes=4, mask_ratios=(0.5, 0.5))
    together = decode_window(model, x, free, config, range(8), range(24)).x
    for i in range(8):
        alone = decode_window(model, x[i:i + 1], free[i:i + 1], config, [i], range(24)).x
        assert torch.equal(alone[0], together[i])
