"""Speculative decoding: what is checked is drawn from the mixture, one token after another, however long drafts are."""
import math

import pytest
import torch

import decoding
import speculative
from cache import CachedTrunk
from conftest import tiny_model
from decoding import DecoderConfig, decode_window, generate
from likelihood import log_likelihood
from noise import ACCEPTED, REPLACED, TOKENS, exact, invert, uniform, weights
from plans import make_plan

B, T = 5, 24


def model_64(**changes):
    model = tiny_model(vocab_size=8, **{'block_size': T} | changes).double().requires_grad_(False)
    model.sampler_head.out[1].weight.data *= 8    # drafts are rejected often
    return model


def config_of(passes, **changes):
    return DecoderConfig(plan='speculative', plan_passes=passes, mask_ratios=(), **changes)


def text_of(model, config, n_given=0, on_pass=None, **changes):
    x = torch.arange(B * T).view(B, T) * 5 % model.mask_id
    free = (torch.arange(T) >= n_given).expand(B, -1).clone()
    return decode_window(model, x, free, config, range(B), range(T), on_pass, **changes)


def one_by_one(model, n_given=0, temperature=1.0, top_p=1.0):
    """The same text written without drafts: every token from the mixture, by the definitions alone.

    With the noise of decoding: the head's token is kept with the chance that the mixture leaves it, else replaced.
    """
    given = torch.arange(B * T).view(B, T) * 5 % model.mask_id
    u = {stream: uniform(1337, stream, range(B), 0, range(T)) for stream in (TOKENS, ACCEPTED, REPLACED)}
    reader = model.reader(B, T)
    read, last = reader.read_block(given, n_given, T)
    x, head, wte = given.clone(), model.sampler_head, model.wte.weight
    for t in range(n_given, T):
        view = read[:, t - n_given]
        if t == n_given:
            z = model.lm_head(view)
            cold = temperature if n_given or not temperature else 1.0
            x[:, t] = invert(weights(z, cold, top_p), u[TOKENS][:, t])
            continue
        ids = torch.full((B, 2 * head.reach), model.mask_id)
        for i, offset in enumerate(head.local.offsets.tolist()):
            if offset < 0 <= t + offset:
                ids[:, i] = x[:, t + offset]
        state = head.states(torch.cat((x[:, :t], x[:, :1]), 1), wte)[:, -1]
        draft = model.lm_head(head(view, head.project(view, last), ids, head.local.tables(wte), state))
        trunk = model.lm_head(model.reader(B, T).read(x[:, :t])[:, -1])
        target = (torch.softmax(exact(draft), -1) + torch.softmax(exact(trunk), -1)) / 2
        p, q = (w / w.sum(-1, keepdim=True) for w in (
            exact(weights(z, temperature, top_p)) for z in (target.log(), draft)))
        for b in range(B):
            token = invert(q[b:b + 1], u[TOKENS][b:b + 1, t])[0]
            if u[ACCEPTED][b, t] * q[b, token] >= p[b, token]:
                token = invert((p - q).clamp(min=0)[b:b + 1], u[REPLACED][b:b + 1, t])[0]
            x[b, t] = token
    return x


@pytest.mark.parametrize('n_given', [0, 1, 7])
@pytest.mark.parametrize('changes', [{}, {'temperature': 0.6}, {'temperature': 0.0}, {'top_p': 0.7}])
def test_a_text_that_is_checked_is_that_of_the_mixture_one_token_after_another(n_given, changes):
    model = model_64()
    decoded = text_of(model, config_of(T, **changes), n_given)
    assert torch.equal(decoded.x, one_by_one(model, n_given, **changes))
    assert 1 < decoded.passes <= T - n_given


@pytest.mark.parametrize('shortest', [1, 2, 5, 100])
def test_the_length_of_drafts_changes_no_token(monkeypatch, shortest):
    model = model_64()
    plain = text_of(model, config_of(T), 3)
    monkeypatch.setattr(speculative, 'DRAFT', shortest)
    other = text_of(model, config_of(100), 3)
    assert torch.equal(other.x, plain.x)
    assert (other.passes > plain.passes) == (shortest < 5)


def test_one_pass_is_filling_from_left_to_right():
    model = model_64()
    plain = DecoderConfig(plan='left-to-right', mask_ratios=())
    assert torch.equal(text_of(model, config_of(1)).x, text_of(model, plain).x)
    assert torch.equal(text_of(model, config_of(1), 4).x, text_of(model, plain, 4).x)


@pytest.mark.parametrize('passes', [2, 3, 6])
def test_passes_that_run_out_leave_what_they_have_checked(passes):
    """The texts of few passes and of many are the same up to where the few end."""
    model, steps = model_64(), []
    few = text_of(model, config_of(passes), on_pass=steps.append)
    assert few.passes == passes == len(steps)
    checked = (steps[-1]['xt'] != model.mask_id) | steps[-1]['corrected']
    whole = text_of(model, config_of(T)).x
    assert torch.equal(few.x[checked], whole[checked]) and checked.any(1).all() and not checked.all()


def test_every_pass_is_told_as_other_decoders_tell_theirs():
    """Masks of a pass are what the one before left; what is not masked stands; rejected tokens are marked."""
    model, steps = model_64(), []
    decoded = text_of(model, config_of(T), 3, steps.append, wanted=['remask_score', 'hidden', 'p_generated'])
    assert [step['pass'] for step in steps] == list(range(decoded.passes))
    masked = torch.arange(T).expand(B, -1) >= 3
    for step in steps:
        assert torch.equal(step['xt'] == model.mask_id, masked)
        assert torch.equal(step['xt'][~masked], step['x'][~masked])
        assert (step['corrected'] <= masked).all() and (step['x'][step['corrected']] != model.mask_id).all()
        assert (step['wave'][~masked] == 0).all() and step['wave'].max() <= T
        assert step['remask_score'].shape == (B, T) and step['hidden'].shape[:2] == (B, T)
        masked = step['remasked']
    assert not masked.any() and torch.equal(steps[-1]['x'], decoded.x)
    assert sum(int(step['corrected'].sum()) for step in steps) > B
    assert (decoded.p_generated[:, 3:] > 0).all() and (decoded.p_generated[:, :3] == 0).all()


def test_text_that_is_given_in_the_middle_stays():
    model = model_64()
    x = torch.arange(B * T).view(B, T) % model.mask_id
    free = (torch.arange(T) % 5 > 0).expand(B, -1).clone()
    decoded = decode_window(model, x, free, config_of(T), range(B), range(T))
    assert torch.equal(decoded.x[~free], x[~free]) and not torch.equal(decoded.x, x)


def test_a_sequence_does_not_depend_on_the_others():
    model = model_64()
    x = torch.full((B, T), model.mask_id)
    alone = [decode_window(model, x[:1], x[:1] == model.mask_id, config_of(T), [b], range(T)).x[0] for b in range(B)]
    assert torch.equal(text_of(model, config_of(T)).x, torch.stack(alone))


def test_long_texts_are_written_in_overlapping_windows():
    model = model_64()
    x = torch.full((2, 3 * T), model.mask_id)
    decoded = generate(model, x, x == model.mask_id, config_of(T), range(2))
    first = decode_window(model, x[:, :T], x[:, :T] == model.mask_id, config_of(T), range(2), range(T)).x
    assert torch.equal(decoded.x[:, :T], first)
    start = T - T // 4
    given = torch.cat((first[:, start:], x[:, :start]), 1)
    second = decode_window(model, given, given == model.mask_id, config_of(T), range(2), range(start, start + T)).x
    assert torch.equal(decoded.x[:, start:start + T], second) and (decoded.x != model.mask_id).all()


def test_its_likelihood_is_that_of_one_pass_with_one_and_of_the_mixture_with_many():
    model, x0 = model_64(), torch.arange(B * T).view(B, T) * 5 % 7
    draft = log_likelihood(model, x0, make_plan('left-to-right', T, 1))
    assert torch.allclose(log_likelihood(model, x0, make_plan('speculative', T, 1)), draft)
    reader = model.reader(B, T)
    trunk = torch.log_softmax(model.lm_head(reader.read(x0)).double(), -1)
    trunk = trunk[:, :-1].gather(-1, x0[:, 1:, None])[..., 0]
    mixed = log_likelihood(model, x0, make_plan('speculative', T, T))
    assert torch.allclose(mixed[:, 1:], torch.logaddexp(trunk, draft[:, 1:]) - math.log(2), atol=1e-6)
    between = [log_likelihood(model, x0, make_plan('speculative', T, k)) for k in (2, 3, 5)]
    assert len({round(z.sum().item(), 6) for z in [draft, *between, mixed]}) == 5


@pytest.mark.parametrize('shortest, passes', [(1, 3), (2, 3), (3, 4), (3, 2)])
def test_its_likelihood_knows_where_drafts_end(monkeypatch, shortest, passes):
    """Short drafts end a pass without a rejection: test_likelihood.py's texts are shorter than any draft."""
    import test_likelihood
    monkeypatch.setattr(speculative, 'DRAFT', shortest)
    test_likelihood.test_probabilities_of_all_texts_sum_to_one('speculative', passes, True)
    test_likelihood.test_samples_have_the_likelihood_that_is_claimed('speculative', passes, True, torch.float64)


@pytest.mark.parametrize('changes', [{'use_sampler': False}, {'mask_ratios': (0.5,)}, {'corrections': 2},
                                     {'end_temperature': 0.5}])
def test_settings_of_which_it_has_no_use_are_refused(changes):
    config = decoding.replace(config_of(4), **changes)
    with pytest.raises(ValueError, match='speculative plan'):
        text_of(model_64(), config)


@pytest.mark.parametrize('dtype, atol', [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_tokens_are_read_at_places_of_their_own_as_in_one_go(dtype, atol):
    """Also what was read wrongly there before, and when other tokens go beyond the end."""
    model = tiny_model(vocab_size=8, block_size=T).to(torch.float64 if dtype == torch.float64 else torch.float32)
    x = torch.arange(B * T).view(B, T) * 5 % 7
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16), torch.no_grad():
        whole = model.reader(B, T).read(x)
        reader, starts = CachedTrunk(model, B, T + 10), torch.tensor([3, 7, 12, 15, 19])
        reader.read(x[:, :3])
        reader.read_at((x[:, 3:] + 1) % 7, torch.full((B,), 3))    # a draft that is rejected
        for start in range(3, 20, 4):
            reader.read_at(x[:, start:start + 4], torch.full((B,), start))
        ids = torch.stack([torch.nn.functional.pad(row, (0, 10))[start:start + 10] for row, start in zip(x, starts)])
        hidden = reader.read_at(ids, starts)
    for b, start in enumerate(starts.tolist()):
        n = min(10, T - start)
        torch.testing.assert_close(hidden[b, :n], whole[b, start:start + n], atol=atol, rtol=0)


def test_the_views_are_states_where_a_token_was_checked_and_else_of_masks():
    model, steps = model_64(), []
    decoded = text_of(model, config_of(4), 3, steps.append, wanted=['hidden'])
    last = steps[-1]
    checked = ((last['xt'] != model.mask_id) | last['corrected']) & (torch.arange(T) > 3)
    assert torch.equal(checked.any(1), torch.ones(B).bool()) and not checked[:, -1].any()
    expected = speculative.views_of(model, decoded.x, 3, checked)
    torch.testing.assert_close(last['hidden'][:, 3:], expected[:, 3:])
    whole = text_of(model, config_of(T), on_pass=steps.append, wanted=['hidden'])    # drafts beyond the end
    expected_whole = speculative.views_of(model, whole.x, 0, torch.arange(T).expand(B, -1) > 0)
    torch.testing.assert_close(steps[-1]['hidden'], expected_whole)
    masks = speculative.views_of(model, decoded.x, 3, torch.zeros_like(checked))
    assert not torch.allclose(masks[:, 3:], expected[:, 3:])


def test_a_replacement_is_drawn_where_the_two_differ_only_by_rounding():
    p = torch.tensor([[0.0, 0.7, 0.3], [0.5, 0.5, 0.0]], dtype=torch.float64)
    assert speculative.replacement(p, p, torch.tensor([0.5, 0.9])).tolist() == [1, 1]


def test_one_position_has_the_likelihood_of_the_language_model_head():
    model = model_64(block_size=1)
    plan = make_plan('speculative', 1, 3)
    assert log_likelihood(model, torch.arange(7)[:, None], plan).exp().sum().item() == pytest.approx(1)
    with pytest.raises(ValueError, match='sampler head'):
        log_likelihood(model, torch.zeros(1, 1, dtype=torch.int64), plan, use_sampler=False)


@pytest.mark.parametrize('flags, said', [
    (['--disable-sampler'], 'a model without a sampler head'), (['--corrections', 2], '--corrections; leave out'),
    (['--end-temperature', 0.5], '--end-temperature; leave out'), (['--order', 'critic'], 'a flag about revising'),
    (['--order', 'random', '--plan-passes', 15], 'a flag about revising'),
    (['--plan-passes', 3], '--plan-passes 3 and --iterations 15'),
    (['--plan-passes', 20], 'wanted at most --iterations, 15')])
def test_flags_that_do_not_go_with_it_are_named(script, trained_once, flags, said):
    status, _, err = script('sample_simple.py', '--out-dir', trained_once[0], '--plan', 'speculative', *flags)
    assert status == 2 and said in err and err.count('\n') == 1


def test_it_is_shown_and_told_as_it_comes_about(script, trained_once):
    flags = ['--out-dir', trained_once[0], '--num-samples', 2, '--iterations', 12]
    status, out, err = script('sample_simple.py', *flags, '--animate', 1000)
    assert status == 0 and 2 < out.count('--- pass') <= 12 and '░' in out, err
    _, _, err = script('sample_simple.py', *flags, '--verbose')
    assert 'samples 0-1, from token 0, pass 2: ' in err


def test_a_trunk_that_never_read_text_checks_nothing(script, train, tmp_path):
    train(tmp_path, '--block_rows=0', '--max_iters=4', '--add_critic_head=False')
    _, out, _ = script('sample_simple.py', '--out-dir', tmp_path, '--num-samples', 1, '--iterations', 3)
    assert 'plan interleaved, 3 forward passes' in out
