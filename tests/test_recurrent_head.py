"""Filling from left to right: training shows the head what decoding shows it, and decoding keeps its promises."""
import pytest
import torch
import torch.nn.functional as F

import filling
import sampler
from conftest import blank, masked_sequences, tiny_batch, tiny_model
from decoding import DecoderConfig, decode_window
from diffusion import forward_blocks
from likelihood import log_likelihood
from plans import make_plan
from filling import HeadFiller
from sampler import sampler_examples, sampler_loss

T = 24
PLANS = [('left-to-right', 1), ('blocks', 3), ('fronts-5', 1)]


def text_of(B=3, length=T, seed=0):
    return torch.randint(0, 11, (B, length), generator=torch.Generator().manual_seed(seed))


def config_of(name, passes, **changes):
    return DecoderConfig(**dict(plan=name, plan_passes=passes, mask_ratios=()) | changes)


def shown_in_decoding(model, x, free, config):
    """What the head's first layer has when decode_window fills from left to right, and its text.

    Returns {(sequence, position): (view, features, projected)} of each position's first time, and x (B, T). The view is
    logits, features are the sum of all that the head sees, and projected is the part of it that no token decides.
    """
    found, at, plain, plain_logits = {}, [], HeadFiller.fill_from_left, HeadFiller.logits

    def fill_from_left(self, xt, mask, hidden, last, lanes, *rest):
        for t in range(1, max(lane.end - lane.start for lane in lanes)):    # the first is not the head's
            places = [(b, min(lane.start + t, lane.end - 1)) for b in range(len(xt)) for lane in lanes]
            projected = [self.head.project(hidden[b, i], None if last is None else last[b]) for b, i in places]
            at.append((places, projected))
        return plain(self, xt, mask, hidden, last, lanes, *rest)

    def logits(self, view, features=None):
        if features is not None:
            for n, (place, projected) in enumerate(zip(*at.pop(0))):
                found.setdefault(place, (view[n].clone(), features[n].clone(), projected))
        return plain_logits(self, view, features)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeadFiller, 'fill_from_left', fill_from_left)
        patch.setattr(HeadFiller, 'logits', logits)
        decoded = decode_window(model, x, free, config, range(len(x)), range(x.size(1)))
    assert not at
    return found, decoded.x


def features_of(head, wte, projected, around, state):
    """The head's first layer by its parts: projected (N, H), around (N, 4) ids, state (N, S) -> (N, H)."""
    return head.local(projected, around, head.local.tables(wte)) + head.state_proj(state)


def shown_in_training(model, text, passes, seed):
    """What the head's loss gives it for the same text: view and features, in blocks if passes > 1."""
    batch, seen = tiny_batch(model, len(text)), []
    batch.x0 = text
    with torch.no_grad():
        blocks, _ = forward_blocks(model, model, text, torch.Generator().manual_seed(seed))
        examples = sampler_examples(model, batch, blocks, 2 * len(text), torch.Generator().manual_seed(seed))
        assert torch.equal(examples.text, text.repeat(2, 1)), 'those of blocks first'
        handle = model.sampler_head.register_forward_pre_hook(lambda _, args: seen.append(args))
        sampler_loss(model.sampler_head, examples, model.wte.weight)
        handle.remove()
    hidden, projected, around, _, state = seen[0]
    assert (around[examples.state_of >= 0, 2:] == model.mask_id).all(), 'nothing on the right'
    with torch.no_grad():
        view = F.linear(hidden, model.unembedding)
        features = features_of(model.sampler_head, model.wte.weight, projected, around, state)
    if passes > 1 and len(blocks.positions) != T // passes - 1:
        return {}    # a block of another size
    n_wave = int((examples.state_of < 0).sum())
    in_blocks = torch.arange(len(examples.targets)).sub(n_wave).remainder(T - 1 + len(blocks.positions)) >= T - 1
    shown = in_blocks == (passes > 1)
    return {(position // T, position % T): (view[n], features[n])
            for n, position in enumerate(examples.state_of.tolist()) if 0 <= position < text.numel() and shown[n]}


@pytest.mark.parametrize('name, passes', [('left-to-right', 1), ('blocks', 4), ('blocks', 8)])
def test_training_shows_what_decoding_shows(name, passes):
    """The real decoder writes text from nothing; learning from that text, the head gets the same at every position:
    the trunk's view, its state before the block, the neighbours and the recurrent state.
    """
    model = tiny_model()
    decoded, text = shown_in_decoding(model, *blank(model), config_of(name, passes))
    size = T // passes
    assert set(decoded) == {(b, i) for b in range(3) for i in range(T) if i % size}
    compared = set()
    for seed in range(200):
        for position, trained in shown_in_training(model, text, passes, seed).items():
            for a, b in zip(trained, decoded[position]):
                torch.testing.assert_close(a, b, atol=1e-10, rtol=0, msg=lambda m: f'{position}: {m}')
            compared.add(position)
        if compared == set(decoded):
            break
    assert compared == set(decoded)


def test_states_equal_reading_token_by_token():
    """In training a whole text is read at once, in decoding one token after another; [MASK] has a code of zeros."""
    model = tiny_model()
    text, head, wte = text_of(), model.sampler_head, model.wte.weight
    text[1, 5] = model.mask_id
    with torch.no_grad():
        states = head.states(text, wte)
        state = torch.zeros(3, 8).double()
        for i in range(T):
            torch.testing.assert_close(states[:, i], state, atol=1e-12, rtol=0)
            gates = F.linear(head.local.codes(wte, text[:, i]), head.reader.weight_ih_l0, head.reader.bias_ih_l0)
            state = head.read(gates, F.linear(state, head.reader.weight_hh_l0, head.reader.bias_hh_l0), state)
        assert torch.equal(head.states(text[:, :1], wte), torch.zeros(3, 1, 8).double())


def test_a_changed_token_changes_later_states_alone():
    model, x = tiny_model(), text_of(1)
    with torch.no_grad():
        before = model.sampler_head.states(x, model.wte.weight)[0]
        for i in range(T):
            changed = x.clone()
            changed[0, i] = (x[0, i] + 1) % 11
            moved = (model.sampler_head.states(changed, model.wte.weight)[0] - before).abs().amax(-1)
            assert (moved[:i + 1] == 0).all() and (moved[i + 1:i + 3] > 1e-9).all()


def test_the_state_carries_tokens_that_are_out_of_reach():
    """In one pass the trunk sees nothing and the tables two tokens: what lies further left comes by the state."""
    model, x = tiny_model(), text_of(1)
    plan = make_plan('left-to-right', T, 1)
    before = log_likelihood(model, x, plan)[0]
    for i in range(T - 4):
        changed = x.clone()
        changed[0, i] = (x[0, i] + 1) % 11
        moved = (log_likelihood(model, changed, plan)[0] - before).abs()
        assert (moved[:i] < 1e-12).all() and moved[i + 3:i + 5].max() > 1e-9


@pytest.mark.parametrize('name, passes', PLANS)
def test_states_are_those_of_the_finished_text_and_given_text_is_read(name, passes):
    """Given text in the middle is kept and read like text that was drawn; a lane reads nothing before its start."""
    model, head = tiny_model(), tiny_model().sampler_head
    x, free = blank(model)
    x[:, 10:14], free[:, 10:14] = text_of(length=4), False
    found, text = shown_in_decoding(model, x, free, config_of(name, passes))
    assert torch.equal(text[:, 10:14], x[:, 10:14]) and (text < model.mask_id).all()
    lanes = [lane for lanes in make_plan(name, T, passes).lanes for lane in lanes]
    compared, other, at = 0, 0, torch.arange(T)
    with torch.no_grad():
        whole = head.states(text, model.wte.weight)
        for lane in lanes:
            states = head.states(text[:, lane.read_from:lane.end], model.wte.weight)
            known = (at >= lane.start) | (lane.read_from < lane.start) | ~free    # of what lies on the left
            for b in range(3):
                for i in range(lane.start + 1, lane.end):
                    _, features, projected = found[b, i]
                    near = [text[b, j] if j >= 0 and known[b, j] else model.mask_id for j in (i - 2, i - 1)]
                    around = torch.tensor([[*near, model.mask_id, model.mask_id]])    # nothing on the right
                    state = states[b, i - lane.read_from]
                    right = features_of(head, model.wte.weight, projected[None], around, state[None])[0]
                    torch.testing.assert_close(features, right, atol=1e-10, rtol=0)
                    compared, other = compared + 1, other + int((state - whole[b, i]).abs().max() > 1e-6)
    assert compared == 3 * (T - len(lanes))
    assert (other > 0) == name.startswith('fronts'), 'only a lane of its own has read less than the whole text'


def decode_rows(model, rows, name, passes, same_start):
    _, xt, mask = masked_sequences()
    xt, mask = torch.where(mask, model.mask_id, xt), mask.clone()
    if same_start:
        mask[:, 0], xt[:, 0] = True, model.mask_id
    else:
        mask[0, :5], xt[0, :5] = False, 3
        mask[1:, 0], xt[1:, 0] = True, model.mask_id
    config = config_of(name, passes, mask_ratios=(0.5, 0.3), corrections=1, randomness_strength=0.5)
    return decode_window(model, xt[rows], mask[rows], config, rows, range(T)).x


@pytest.mark.parametrize('name, passes', PLANS)
def test_a_sequence_alone_equals_the_sequence_in_a_batch(name, passes):
    """Exact in float64, where all begin at the same position."""
    model = tiny_model()
    together = decode_rows(model, [0, 1, 2, 3, 4, 5], name, passes, True)
    for row in range(6):
        assert torch.equal(decode_rows(model, [row], name, passes, True)[0], together[row])
    assert torch.equal(decode_rows(model, [5, 2], name, passes, True), together[[5, 2]])


@pytest.mark.parametrize('name, passes', PLANS)
def test_a_prefix_is_each_sequences_own(name, passes):
    """A plan that starts behind the shortest prefix of a batch would decode a longer one otherwise than alone.

    So a batch has one length of prefix; sequences of another are decoded apart.
    """
    model = tiny_model()
    with pytest.raises(ValueError, match=r'prefixes of \[0, 5\] given tokens'):
        decode_rows(model, [0, 1, 2, 3, 4, 5], name, passes, False)
    together = decode_rows(model, [1, 2, 3], name, passes, False)
    assert torch.equal(decode_rows(model, [2], name, passes, False)[0], together[1])
    assert (decode_rows(model, [0], name, passes, False)[0, :5] == 3).all()


@pytest.mark.parametrize('name, passes', PLANS)
def test_a_large_vocabulary_is_filled_alike_piece_by_piece(name, passes, monkeypatch):
    model = tiny_model()

    def decode():
        return decode_rows(model, [0, 1, 2, 3, 4, 5], name, passes, True)
    whole = decode()
    monkeypatch.setattr(HeadFiller, 'max_tabled', 0)
    assert torch.equal(decode(), whole)
    monkeypatch.setattr('noise.MAX_LOGITS', 3 * 12)    # three positions at a time
    assert torch.equal(decode(), whole)
    assert len(filling.pieces(10, 12)) == 4, 'the limit has reached the decoder'


def test_views_of_earlier_blocks_are_kept():
    """Each position keeps the trunk's view from when it was last masked: scores after later blocks go by it.

    The views of finished blocks became zeros with every further block, and with them what is remasked.
    """
    model, steps = tiny_model(), []
    decode_window(model, *blank(model), config_of('blocks', 3, mask_ratios=(0.4,)), range(3), range(T), steps.append,
                 wanted=['hidden', 'remask_score'])
    assert len(steps) == 4
    everywhere = torch.ones(3, T).bool().nonzero(as_tuple=True)
    seen = 0
    for i, step in enumerate(steps[:3]):
        now = torch.arange(T)[:, None] // 8 == i
        seen = torch.where(now, step['hidden'], seen)
        torch.testing.assert_close(step['hidden'], seen, atol=0, rtol=0)
    with torch.no_grad():
        right = HeadFiller(model).rescore(steps[2]['x'], everywhere, seen).view(3, T)
    torch.testing.assert_close(steps[2]['remask_score'], 1 - right, atol=1e-5, rtol=0)


def test_only_what_begins_from_nothing_is_drawn_at_temperature_one(monkeypatch):
    """The first position of a text; the first of a later block follows text, so it is drawn like the others."""
    heats, plain = [], filling.sample
    monkeypatch.setattr(filling, 'sample', lambda logits, u, heat, top_p: heats.append(heat) or plain(
        logits, u, heat, top_p))
    model = tiny_model()
    decode_window(model, *blank(model), config_of('blocks', 2, temperature=0.5), range(3), range(T))
    assert heats == [1.0] + [0.5] * 23


@pytest.mark.parametrize('length, n_given, passes', [(24, 8, 3), (4, 0, 8), (24, 0, 3)])
def test_what_a_plan_has_filled_is_revised(length, n_given, passes):
    """Also where its last block is given, or where it has fewer positions than passes: both stopped unrevised."""
    model = tiny_model()
    x, free = blank(model, 3, length)
    x[:, length - n_given:], free[:, length - n_given:] = 3, False
    once, revised = (decode_window(model, x, free, config_of('blocks', passes, mask_ratios=ratios), range(3),
                                  range(length)).x for ratios in ((), (0.5, 0.5)))
    assert (once < model.mask_id).all() and not torch.equal(once, revised)


def test_gradients_end_a_chunk_back(monkeypatch):
    """States are exact however long the text; their gradients are those of chunks whose first state is given."""
    monkeypatch.setattr(sampler, 'CHUNK', 5)
    model, text = tiny_model(), text_of()
    head, wte = model.sampler_head, model.wte.weight
    weight = torch.randn(3, T, 8, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        exact = head.states(text, wte)
    states = head.states(text, wte)
    torch.testing.assert_close(states.detach(), exact, atol=1e-12, rtol=0)
    found = torch.autograd.grad((states * weight).sum(), [*head.reader.parameters(), head.local.token_code.weight])
    total, codes = 0, head.local.codes(wte, text)
    for start in range(0, T - 1, 5):
        end = min(start + 5, T - 1)
        read, _ = head.reader(codes[:, start:end], exact[None, :, start].contiguous())
        total = total + (read * weight[:, start + 1:end + 1]).sum()
    by_hand = torch.autograd.grad(total, [*head.reader.parameters(), head.local.token_code.weight])
    for a, b in zip(found, by_hand, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)
