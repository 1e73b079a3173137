"""Wavefront filling: what the head sees, when a place is filled, and that fast code does what plain code does."""
import pytest
import torch

from conftest import tiny_model
from diffusion import Decoder, decode_block, filler, linear_ratios
from noise import sample, uniform
from sampler import Wavefront, first_places, look_around, pad, teacher_forced, wave_numbers


def masked_rows(B=6, T=24, V=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randint(0, V - 1, (B, T), generator=generator)
    mask = torch.rand(B, T, generator=generator) < torch.linspace(0.2, 1.0, B)[:, None]
    mask[-1] = True    # a row that knows nothing
    return x0, torch.where(mask, V - 1, x0), mask


def plain_fill(model, xt, mask, hidden, lm_logits, u):
    """The definition: place by place, wave by wave, reading each place's neighbours one at a time."""
    head, mask_id, (B, T) = model.sampler_head, model.mask_id, xt.shape
    window, wte = head.window, model.wte.weight
    layer_norm = lambda v: (v - v.mean(-1, keepdim=True)) / (v.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    normed = layer_norm(wte)
    x, waves = xt.clone(), torch.zeros_like(xt)

    def logits_at(x, b, i):
        codes = [window.code(normed[x[b, i + offset]]) if 0 <= i + offset < T and x[b, i + offset] != mask_id
                 else torch.zeros(window.code.out_features).double() for offset in window.offsets]
        feature = window.place(hidden[b, i]) + window.slots(torch.cat(codes))
        h = layer_norm(torch.nn.functional.gelu(layer_norm(feature)))
        gate, value = head.mix(h).split(h.numel())
        h = layer_norm(h + torch.nn.functional.gelu(gate) * value)
        return lm_logits[b, i] + (head.out(h) @ model.wte.weight[:-1].T).float()

    for b in range(B):
        if mask[b].all():
            n = max(1, round(model.config.sampler_min_neighbors_ratio * T))
            for i in lm_logits[b].softmax(-1).amax(-1).topk(n).indices.tolist():
                x[b, i] = sample(lm_logits[b, i][None], u[b, i][None])[0]
        wave = 0
        while (x[b] == mask_id).any():
            wave += 1
            known = [x[b, i] != mask_id for i in range(T)]
            ready = [i for i in range(T) if not known[i] and ((i > 0 and known[i - 1]) or (i + 1 < T and known[i + 1]))]
            # two that meet: the right one waits
            ready = [i for i in ready if i - 1 not in ready]
            before = x.clone()
            for i in ready:
                x[b, i] = sample(logits_at(before, b, i)[None], u[b, i][None])[0]
                waves[b, i] = wave
    prob = torch.ones(B, T, dtype=torch.float64)
    for b, i in mask.nonzero().tolist():
        without = x.clone()
        prob[b, i] = logits_at(without, b, i).double().softmax(-1)[x[b, i]]
    return x, prob, waves


def test_fast_wavefront_equals_plain_loop():
    """Token for token in float64, waves and fresh looks included, rows without a known token too."""
    model = tiny_model()
    for seed in range(5):
        _, xt, mask = masked_rows(seed=seed)
        u = uniform(seed, 0, range(6), 0, range(24))
        with torch.no_grad():
            hidden = model(xt)
            lm_logits = model.lm_head(hidden)
            fills = filler(model, True)
            x, wave = fills.fill(xt, mask, hidden, lm_logits, u, 1.0, 1.0)
            prob = torch.ones(6, 24, dtype=torch.float64)
            at = mask.nonzero(as_tuple=True)
            prob[at] = fills.look(x, at, hidden, lm_logits)
            plain_x, plain_prob, plain_wave = plain_fill(model, xt, mask, hidden, lm_logits, u)
        assert torch.equal(x, plain_x)
        assert torch.equal(torch.where(mask, wave, 0), plain_wave)
        torch.testing.assert_close(prob, plain_prob, atol=1e-6, rtol=0)


def test_tables_of_some_tokens_equal_the_whole_ones():
    model = tiny_model(vocab_size=200)
    window, wte = model.sampler_head.window, model.wte.weight
    around = torch.randint(0, 200, (5, 4), generator=torch.Generator().manual_seed(0))
    around[2, 1] = model.mask_id
    tables, rows = window.tables_for(wte, around)
    assert len(tables) < len(window.tables(wte))
    place = torch.zeros(5, 16).double()
    torch.testing.assert_close(window(place, rows, tables), window(place, around, window.tables(wte)))


def test_waves_by_hand():
    mask = torch.tensor([[0, 1, 1, 1, 1, 0, 1, 1], [1, 1, 1, 0, 1, 1, 1, 0]]).bool()
    wave = wave_numbers(mask, torch.zeros_like(mask))
    assert wave.tolist() == [[0, 1, 2, 3, 1, 0, 1, 2], [3, 2, 1, 0, 1, 2, 1, 0]]


def test_first_places_are_each_rows_own():
    """A row that knows nothing starts by itself; rows that know something do not."""
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]]).bool()
    score = torch.tensor([[0.1, 0.9, 0.3, 0.2]] * 2)
    assert first_places(mask, score, 0.01).tolist() == [[False, True, False, False], [False] * 4]
    assert first_places(mask, score, 0.5).tolist() == [[False, True, True, False], [False] * 4]


@pytest.mark.parametrize('offset', [-2, -1, 1, 2])
def test_a_changed_neighbour_changes_the_logits(offset):
    """The reference implementation wrote neighbours into a copy: its head never saw one."""
    model = tiny_model()
    head = model.sampler_head
    x = torch.randint(0, 11, (1, 24), generator=torch.Generator().manual_seed(0))
    hidden = model(x)
    rows, cols = torch.tensor([0]), torch.tensor([10])

    def logits(x):
        around = look_around(pad(x, 2, model.mask_id), rows, cols, head.window.offsets, 2)
        return head(head.window.place(hidden[rows, cols]), around, head.window.tables(model.wte.weight),
                    model.lm_head(hidden[rows, cols]), model.unembedding)
    changed, centre = x.clone(), x.clone()
    changed[0, 10 + offset] = (x[0, 10 + offset] + 1) % 11
    centre[0, 10] = (x[0, 10] + 1) % 11
    assert (logits(x) - logits(changed)).abs().max() > 1e-3
    assert torch.equal(logits(x), logits(centre)), 'the head sees the token it is to predict'


def test_teacher_forcing_shows_what_decoding_shows():
    """In training a place's neighbours are known or hidden exactly as they were when decoding filled that place."""
    model = tiny_model()
    _, xt, mask = masked_rows()
    seen = {}
    with torch.no_grad():
        hidden = model(xt)
        lm_logits = model.lm_head(hidden)
        fills = filler(model, True)
        plain = fills.logits

        def spy(x, rows, cols, *rest):
            for n, b, i in zip(range(len(rows)), rows.tolist(), cols.tolist()):
                seen[b, i] = look_around(x, rows, cols, model.sampler_head.window.offsets, 2)[n]
            return plain(x, rows, cols, *rest)
        fills.logits = spy
        x, _ = fills.fill(xt, mask, hidden, lm_logits, uniform(0, 0, range(6), 0, range(24)), 1.0, 1.0)
    score = lm_logits.softmax(-1).amax(-1)
    around = teacher_forced(x, mask, *mask.nonzero(as_tuple=True), model.sampler_head.window.offsets, score, 0.01, model.mask_id)
    first = first_places(mask, score, 0.01)
    compared = 0
    for (b, i), forced in zip(mask.nonzero().tolist(), around):
        if not first[b, i]:    # placed from the language-model head
            assert torch.equal(forced, seen[b, i])
            compared += 1
    assert compared > 50


def test_teacher_forcing_shows_what_a_correction_shows():
    """Where a part is redone among the rest, as when filling it; a place outside it is looked at before that."""
    x0 = torch.arange(8)[None]
    redo = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 0]]).bool()
    around = teacher_forced(x0, redo, torch.zeros(4, dtype=torch.long), torch.tensor([1, 2, 3, 5]), torch.tensor([-2, -1, 1, 2]),
                            torch.zeros(1, 8), 0.01, 99)
    assert around.tolist() == [[99, 0, 99, 99], [0, 1, 99, 99], [1, 2, 4, 5], [99, 99, 6, 7]]


def spied(model, decoder):
    """What a decoder from all masks filled, [places (B, T) bool, trunk passes so far] of each fill, and its passes."""
    passes, fills = [], []
    model.register_forward_hook(lambda *_: passes.append(1))
    plain = Wavefront.fill
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Wavefront, 'fill', lambda self, xt, mask, *rest: fills.append((mask, len(passes))) or plain(self, xt, mask, *rest))
        x = torch.full((3, 24), model.mask_id)
        steps = []
        x = decode_block(model, x, x == model.mask_id, decoder, range(3), range(24), steps.append)[0]
    return x, fills, steps


@pytest.mark.parametrize('order', ['confidence', 'critic', 'random'])
def test_corrections_redo_a_share_of_what_a_pass_filled_and_cost_no_pass(order):
    model = tiny_model()
    x, fills, steps = spied(model, Decoder(order=order, ratios=(0.5, 0.25), corrections=2, correction_ratio=0.5))
    assert [(int(mask.sum(1).unique()), trunk) for mask, trunk in fills] == [(24, 1), (12, 1), (6, 1), (12, 2), (6, 2), (3, 2), (6, 3), (3, 3), (2, 3)]
    for k in (0, 3, 6):
        filled = fills[k][0]
        assert all((filled | ~redone[0]).all() for redone in fills[k:k + 3]), 'what was kept before is not touched'
    assert (x < model.mask_id).all()
    once, _, _ = spied(model, Decoder(order=order, ratios=(0.5, 0.25), corrections=0))
    assert not torch.equal(x, once)
    assert all((step['wave'][step['xt'] != model.mask_id] == 0).all() for step in steps)


def test_temperature_goes_evenly_from_the_first_pass_to_the_last():
    heats = []
    plain = Wavefront.fill
    model = tiny_model()
    x = torch.full((3, 24), model.mask_id)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Wavefront, 'fill', lambda self, *args: heats.append(args[-2]) or plain(self, *args))
        decode_block(model, x, x == model.mask_id, Decoder(temperature=0.8, end_temperature=0.2, ratios=(0.5, 0.25), corrections=1), range(3), range(24))
    assert heats == pytest.approx([0.8, 0.8, 0.5, 0.5, 0.2, 0.2])
    assert Decoder(temperature=0.2, end_temperature=0.0, ratios=(0.5,) * 3).temperature_of(3) == 0.0    # 0.2 - 0.2 * 3 / 3 is below it
    assert Decoder(temperature=0.7, ratios=(0.5,)).temperature_of(1) == 0.7 == Decoder(temperature=0.7, end_temperature=0.1, ratios=()).temperature_of(0)


def test_rows_that_know_nothing_begin_at_temperature_one():
    """Cool first places would begin every row alike; only temperature 0 means the likeliest."""
    model = tiny_model()
    x = torch.full((64, 24), model.mask_id)
    firsts = []
    for temperature in (1.0, 1e-3, 0.0):
        steps = []
        decode_block(model, x, x == model.mask_id, Decoder(temperature=temperature, ratios=()), range(64), range(24), steps.append)
        firsts.append(steps[0]['x'][steps[0]['wave'] == 0])
    assert torch.equal(firsts[0], firsts[1]) and firsts[1].unique().numel() > 1 == firsts[2].unique().numel()


def test_naive_decoding_has_no_corrections():
    model = tiny_model()
    x = torch.full((3, 24), model.mask_id)
    run = lambda n: decode_block(model, x, x == model.mask_id, Decoder(use_sampler=False, ratios=(0.5,), corrections=n), range(3), range(24))[0]
    assert torch.equal(run(0), run(3))


def decode(model, rows, order='confidence', **changes):
    _, xt, mask = masked_rows()
    xt, mask = xt[rows], mask[rows]
    decoder = Decoder(order=order, ratios=tuple(linear_ratios(5, 0.8, 0.2)), randomness_strength=0.5, corrections=1, **changes)
    return decode_block(model, xt, mask, decoder, rows, range(24))[0]


@pytest.mark.parametrize('order', ['confidence', 'critic', 'random'])
@pytest.mark.parametrize('use_sampler', [True, False])
def test_a_row_alone_equals_the_row_in_a_batch(order, use_sampler):
    model = tiny_model()
    together = decode(model, [0, 1, 2, 3, 4, 5], order, use_sampler=use_sampler)
    for row in range(6):
        assert torch.equal(decode(model, [row], order, use_sampler=use_sampler)[0], together[row])
    assert torch.equal(decode(model, [5, 2], order, use_sampler=use_sampler), together[[5, 2]])


def test_a_large_vocabulary_is_tabled_wave_by_wave_to_the_same_end(monkeypatch):
    model = tiny_model()
    whole = decode(model, [0, 1, 2, 3, 4, 5])
    monkeypatch.setattr(Wavefront, 'max_tabled', 0)
    assert torch.equal(decode(model, [0, 1, 2, 3, 4, 5]), whole)


def test_a_row_stops_alone_as_it_stops_in_company():
    """With rising ratios a short gap has nothing to remask at first, while longer ones go on."""
    model = tiny_model()
    _, xt, mask = masked_rows()
    mask[0] = torch.arange(24) < 4
    decoder = Decoder(ratios=(0.03, 0.5, 0.5))
    together = decode_block(model, xt, mask, decoder, range(6), range(24))[0]
    alone, _, passes, _ = decode_block(model, xt[:1], mask[:1], decoder, [0], range(24))
    assert passes == 1 and torch.equal(alone[0], together[0])


@pytest.mark.parametrize('order', ['confidence', 'critic', 'random'])
@pytest.mark.parametrize('use_sampler', [True, False])
@pytest.mark.parametrize('threshold', [0.0, 0.3])
def test_no_mask_is_left_and_given_text_is_kept(order, use_sampler, threshold):
    model = tiny_model()
    x0, xt, mask = masked_rows()
    x = decode(model, [0, 1, 2, 3, 4, 5], order, use_sampler=use_sampler, threshold=threshold)
    assert (x < model.mask_id).all() and (x >= 0).all()
    assert torch.equal(x[~mask], x0[~mask])


@pytest.mark.parametrize('use_sampler', [True, False])
@pytest.mark.parametrize('order', ['confidence', 'critic'])
@pytest.mark.parametrize('corrections', [0, 2])
def test_wrongness_is_that_of_the_present_neighbours(use_sampler, order, corrections):
    """A kept token is looked at again when a token beside it changes: nothing stale decides what is redone."""
    model = tiny_model()
    x = torch.full((3, 24), model.mask_id)
    steps, views = [], [None]
    model.register_forward_hook(lambda _, args, hidden: views.append(hidden))
    decode_block(model, x, x == model.mask_id, Decoder(use_sampler=use_sampler, order=order, ratios=(0.5, 0.4, 0.3), corrections=corrections), range(3),
                 range(24), on_pass=steps.append)
    everywhere = torch.ones_like(x).bool().nonzero(as_tuple=True)
    with torch.no_grad():
        for step, hidden in zip(steps, views[1:]):
            seen = hidden if step['pass'] == 0 else torch.where((step['xt'] == model.mask_id)[..., None], hidden, seen)
            prob = filler(model, use_sampler).look(step['x'], everywhere, seen, model.lm_head(seen))
            right = prob if order == 'confidence' else prob * torch.sigmoid(-model.critic_head(seen, step['x'], everywhere, model.wte.weight).double())
            torch.testing.assert_close(step['wrong'].flatten(), 1 - right, atol=1e-5, rtol=0)


def test_no_mask_is_produced_at_any_temperature():
    model = tiny_model()
    assert model.lm_head(model(torch.zeros(1, 4, dtype=torch.long))).size(-1) == model.mask_id
    for temperature in (0.0, 1e-3, 100.0):
        assert (decode(model, [0, 5], temperature=temperature) < model.mask_id).all()
