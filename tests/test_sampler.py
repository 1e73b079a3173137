"""Wavefront filling: what the head sees, when a position is filled, and that fast code does what plain code does."""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import filling
from conftest import blank, masked_sequences, tiny_model
from decoding import DecoderConfig, decode_window
from noise import sample, uniform
from filling import HeadFiller
from sampler import first_positions, known_neighbors, wave_numbers


def plain_logits(model, hidden):
    """The head's logits by its definition, for one position: a function of x (B, T), sequence and position."""
    head, mask_id, T = model.sampler_head, model.mask_id, hidden.size(1)
    local, wte = head.local, model.wte.weight

    def layer_norm(v):
        return (v - v.mean(-1, keepdim=True)) / (v.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    normed = layer_norm(wte)

    def logits_at(x, b, i):
        codes = [local.token_code(normed[x[b, i + offset]]) if 0 <= i + offset < T and x[b, i + offset] != mask_id
                 else torch.zeros(local.token_code.out_features).double() for offset in local.offsets]
        feature = local.hidden_proj(hidden[b, i]) + local.neighbor_proj(torch.cat(codes))
        h = layer_norm(F.gelu(layer_norm(feature)))
        gate, value = head.gate(h).split(h.numel())
        h = layer_norm(h + F.gelu(gate) * value)
        return model.lm_head(hidden[b, i] * (1 + head.scale(h)) + head.out(h))
    return logits_at


def plain_fill(model, xt, mask, hidden, u):
    """The definition: position by position, wave by wave, reading each position's neighbours one at a time."""
    logits_at, mask_id, (B, T) = plain_logits(model, hidden), model.mask_id, xt.shape
    x, waves = xt.clone(), torch.zeros_like(xt)
    for b in range(B):
        if mask[b].all():
            n = max(1, round(model.config.sampler_min_neighbors_ratio * T))
            logits = model.lm_head(hidden[b])
            for i in logits.softmax(-1).amax(-1).topk(n).indices.tolist():
                x[b, i] = sample(logits[i][None], u[b, i][None])[0]
        wave = 0
        while (x[b] == mask_id).any():
            wave += 1
            known = [x[b, i] != mask_id for i in range(T)]
            ready = [i for i in range(T)
                     if not known[i] and ((i > 0 and known[i - 1]) or (i + 1 < T and known[i + 1]))]
            # two that meet: the right one waits
            ready = [i for i in ready if i - 1 not in ready]
            before = x.clone()
            for i in ready:
                x[b, i] = sample(logits_at(before, b, i)[None], u[b, i][None])[0]
                waves[b, i] = wave
    prob = torch.ones(B, T, dtype=torch.float64)
    for b, i in mask.nonzero().tolist():
        prob[b, i] = logits_at(x, b, i).double().softmax(-1)[x[b, i]]
    return x, prob, waves


@pytest.mark.parametrize('ratio', [0.01, 0.15])
def test_fast_wavefront_equals_plain_loop(ratio):
    """Token for token in float64, waves and rescoring included, blank sequences too."""
    model = tiny_model(sampler_min_neighbors_ratio=ratio)
    for seed in range(4):
        _, xt, mask = masked_sequences(seed=seed)
        u = uniform(seed, 0, range(6), 0, range(24))
        with torch.no_grad():
            hidden, filler = model(xt), HeadFiller(model)
            x, wave, steps = filler.fill(xt, mask, hidden, u, 1.0, 1.0)
            prob = torch.ones(6, 24, dtype=torch.float64)
            at = mask.nonzero(as_tuple=True)
            prob[at] = filler.rescore(x, at, hidden)
            plain_x, plain_prob, plain_wave = plain_fill(model, xt, mask, hidden, u)
        assert torch.equal(x, plain_x)
        assert torch.equal(torch.where(mask, wave, 0), plain_wave)
        assert steps == plain_wave.max() + 1, 'the blank sequence makes the wave 0'
        torch.testing.assert_close(prob, plain_prob, atol=1e-6, rtol=0)


@torch.no_grad()
def test_fast_corrections_equal_a_plain_loop():
    """Even positions, then odd ones, token for token in float64; each reads the text as it was before its turn."""
    model = tiny_model()
    for seed in range(4):
        x, _, mask = masked_sequences(seed=seed)
        u, hidden = uniform(seed, 0, range(6), 0, range(24)), model(torch.where(mask, model.mask_id, x))
        logits_at, plain = plain_logits(model, hidden), x.clone()
        for parity in (0, 1):
            before = plain.clone()
            for b, i in mask.nonzero().tolist():
                if i % 2 == parity:
                    plain[b, i] = sample(logits_at(before, b, i)[None], u[b, i][None], 0.8, 0.95)[0]
        fast, wave, steps = HeadFiller(model).correct(x, mask, hidden, u, 0.8, 0.95)
        assert torch.equal(fast, plain) and not torch.equal(fast, x) and steps == 2
        assert torch.equal(fast[~mask], x[~mask]) and torch.equal(wave, mask * (torch.arange(24) % 2))


def test_tables_are_made_once_for_fixed_weights_and_never_stale():
    """Kept from one decoding to the next; made anew for a model in training, and when other weights are loaded."""
    model, other = tiny_model(), tiny_model(seed=1)
    assert HeadFiller.of(model) is not HeadFiller.of(model), 'weights that learn may change in ways nobody notices'
    model.requires_grad_(False)
    kept = HeadFiller.of(model)
    assert HeadFiller.of(model) is kept
    model.load_state_dict(other.state_dict())
    loaded = HeadFiller.of(model)
    assert loaded is not kept and torch.equal(loaded.near, HeadFiller(other).near)
    assert HeadFiller.of(model) is loaded
    assert HeadFiller.of(model.float()).near.dtype == torch.float32
    assert HeadFiller.of(other.requires_grad_(False)).head is other.sampler_head


def test_tables_of_some_tokens_equal_the_whole_ones():
    model = tiny_model(vocab_size=200)
    local, wte = model.sampler_head.local, model.wte.weight
    around = torch.randint(0, 200, (5, 4), generator=torch.Generator().manual_seed(0))
    around[2, 1] = model.mask_id
    tables, rows = local.tables_for(wte, around)
    assert len(tables) < len(local.tables(wte))
    projected = torch.zeros(5, 16).double()
    torch.testing.assert_close(local(projected, rows, tables), local(projected, around, local.tables(wte)))


def test_waves_by_hand():
    mask = torch.tensor([[0, 1, 1, 1, 1, 0, 1, 1], [1, 1, 1, 0, 1, 1, 1, 0]]).bool()
    wave = wave_numbers(mask, torch.zeros_like(mask))
    assert wave.tolist() == [[0, 1, 2, 3, 1, 0, 1, 2], [3, 2, 1, 0, 1, 2, 1, 0]]


def test_an_empty_wave_is_not_counted():
    """Where something is known nothing is filled first: the steps once counted that wave 0 all the same."""
    model = tiny_model()
    x0 = torch.zeros(1, 24, dtype=torch.long)
    for masked, steps in ((range(1, 24), 23), ([5], 1), ([5, 6], 2), ([5, 6, 7], 2), ([], 0), (range(24), None)):
        mask = torch.zeros(1, 24, dtype=torch.bool)
        mask[0, list(masked)] = True
        xt = torch.where(mask, model.mask_id, x0)
        with torch.no_grad():
            _, wave, made = HeadFiller(model).fill(xt, mask, model(xt), uniform(0, 0, [0], 0, range(24)), 1.0, 1.0)
        assert made == (wave.max() + 1 if steps is None else steps), 'a blank sequence alone has a wave 0'


def test_first_positions_are_each_sequences_own():
    """A sequence that knows nothing starts by itself; those that know something do not."""
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]]).bool()
    score = torch.tensor([[0.1, 0.9, 0.3, 0.2]] * 2)
    assert first_positions(mask, score, 0.01).tolist() == [[False, True, False, False], [False] * 4]
    assert first_positions(mask, score, 0.5).tolist() == [[False, True, True, False], [False] * 4]


@pytest.mark.parametrize('offset', [-2, -1, 1, 2])
def test_a_changed_neighbour_changes_the_logits(offset):
    """The reference implementation wrote neighbours into a copy: its head never saw one."""
    model = tiny_model()
    x = torch.randint(0, 11, (1, 24), generator=torch.Generator().manual_seed(0))
    at = torch.tensor([0]), torch.tensor([10])
    hidden = model(x)[at]
    projected = model.sampler_head.local.hidden_proj(hidden)

    def logits(x):
        filler = HeadFiller(model)
        features = filler.features(projected, filler.around(x, at))
        return filler.logits(filler.view(hidden), features)
    changed, centre = x.clone(), x.clone()
    changed[0, 10 + offset] = (x[0, 10 + offset] + 1) % 11
    centre[0, 10] = (x[0, 10] + 1) % 11
    assert (logits(x) - logits(changed)).abs().max() > 1e-3
    assert torch.equal(logits(x), logits(centre)), 'the head sees the token it is to predict'


def test_known_neighbors_are_what_filling_shows(monkeypatch):
    """In training a position's neighbours are known or hidden exactly as when decoding filled that position."""
    model = tiny_model()
    _, xt, mask = masked_sequences()
    seen = {}
    with torch.no_grad():
        hidden, filler = model(xt), HeadFiller(model)
        plain, offsets = filling.padded_neighbors, model.sampler_head.local.offsets

        def spy(padded, at, offsets):
            around = plain(padded, at, offsets)
            seen.update({(b, i): around[n] for n, (b, i) in enumerate(zip(at[0].tolist(), at[1].tolist()))})
            return around
        monkeypatch.setattr(filling, 'padded_neighbors', spy)
        x, wave, _ = filler.fill(xt, mask, hidden, uniform(0, 0, range(6), 0, range(24)), 1.0, 1.0)
    first = mask & (wave == 0)
    around = known_neighbors(x, mask, first, mask.nonzero(as_tuple=True), offsets, model.mask_id)
    compared = 0
    for (b, i), known in zip(mask.nonzero().tolist(), around):
        if not first[b, i]:    # filled by the language-model head
            assert torch.equal(known, seen[b, i])
            compared += 1
    assert compared > 50


def test_known_neighbors_are_what_a_correction_shows():
    """A part resampled among the rest is seen as in filling it; a position outside it is rescored afterwards."""
    x0 = torch.arange(8)[None]
    resample_mask = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 0]]).bool()
    first = torch.zeros_like(resample_mask)
    around = known_neighbors(x0, resample_mask, first, (torch.zeros(4, dtype=torch.long), torch.tensor([1, 2, 3, 5])),
                             torch.tensor([-2, -1, 1, 2]), 99)
    assert around.tolist() == [[99, 0, 2, 3], [0, 1, 99, 99], [1, 2, 4, 5], [3, 4, 6, 7]]


def test_blank_sequences_begin_at_temperature_one():
    """Cool first positions would begin every sequence alike; only temperature 0 means the likeliest."""
    model = tiny_model()
    x, free = blank(model, 64)
    firsts = []
    for temperature in (1.0, 1e-3, 0.0):
        steps = []
        config = DecoderConfig(temperature=temperature, mask_ratios=())
        decode_window(model, x, free, config, range(64), range(24), steps.append)
        firsts.append(steps[0]['x'][steps[0]['wave'] == 0])
    assert torch.equal(firsts[0], firsts[1]) and firsts[1].unique().numel() > 1 == firsts[2].unique().numel()


@pytest.mark.parametrize('plan', ['interleaved', 'random', 'spans'])
def test_the_temperature_asked_for_is_that_of_every_position_of_a_plan(plan):
    """Half of an interleaved text, whose positions have no known neighbour when they are filled, had temperature 1."""
    model = tiny_model()
    x, free = blank(model, 8)
    config = DecoderConfig(plan=plan, plan_passes=4, mask_ratios=())
    almost, none = (decode_window(model, x, free, replace(config, temperature=temperature), range(8), range(24)).x
                    for temperature in (1e-5, 0.0))
    assert torch.equal(almost, none)


def test_a_large_vocabulary_is_filled_alike_piece_by_piece(monkeypatch):
    """Tables made wave by wave and logits made a few positions at a time change no token."""
    model = tiny_model()
    _, xt, mask = masked_sequences()

    def decode():
        config = DecoderConfig(order='critic', mask_ratios=(0.6, 0.3), corrections=1)
        return decode_window(model, xt, mask, config, range(6), range(24)).x
    whole = decode()
    monkeypatch.setattr(HeadFiller, 'max_tabled', 0)
    assert torch.equal(decode(), whole)
    monkeypatch.setattr('noise.MAX_LOGITS', 3 * 12)    # three positions at a time
    assert torch.equal(decode(), whole)
    assert len(filling.pieces(10, 12)) == 4, 'the limit has reached the decoder'
