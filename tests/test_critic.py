"""The critic learns from what the shipped decoder makes, and scores are made as they are read."""
import pytest
import torch
import torch.nn.functional as F

import decoding
import diffusion
from conftest import tiny_batch, tiny_model
from critic import critic_loss, remask_score
from decoding import decode_block, default_config
from diffusion import critic_examples
from noise import derive
from filling import Wavefront


def examples(model, iterations, seed=5, B=8, n_sequences=4):
    """generated, real, mask, and what they were made from: clean x0 (n, T), free (n, T) and the passes made."""
    with torch.no_grad():
        generated, real, mask = critic_examples(model, tiny_batch(model, B), n_sequences, seed, iterations)
    n = n_sequences
    passes = len(mask) // n
    assert len(mask) == passes * n and all(torch.equal(mask[:n], part) for part in mask.split(n))
    assert all(torch.equal(real[0][:n], part) for part in real[0].split(n))
    return generated, real, mask, real[0][:n], mask[:n], passes


def decoded(model, x0, free, config):
    """The passes of a decoding, as on_pass sees them."""
    steps = []
    decode_block(model, x0, free, config, range(len(x0)), range(x0.size(1)), steps.append, wanted=['hidden'])
    return steps


def seed_of(model, whole):
    """A seed with which whole sequences are decoded, or those with their text."""
    return next(seed for seed in range(20) if examples(model, 1, seed)[4].all() == whole)


@pytest.mark.parametrize('whole', [True, False])
@pytest.mark.parametrize('iterations', [1, 2, 4])
@pytest.mark.parametrize('changes', [{}, {'corrections': 2, 'temperature': 0.5, 'mask_ratios': (0.8, 0.4)}])
def test_generated_text_is_what_the_shipped_decoder_makes(iterations, changes, whole, monkeypatch):
    """After each of its passes, bit for bit, whatever its defaults are.

    The critic was trained on fills of one pass without corrections, and scored text of many passes with them.
    """
    model = tiny_model()
    monkeypatch.setattr(diffusion, 'default_config', lambda *args, **kwargs: default_config(*args, **kwargs | changes))
    seed = seed_of(model, whole)
    generated, real, mask, x0, free, passes = examples(model, iterations, seed)
    config = default_config(model, iterations, prefix_only=whole, revising=True, **changes | {'seed': derive(seed, 1)})
    steps = decoded(model, x0, free, config)
    assert len(steps) == passes == config.passes
    assert torch.equal(generated[0], torch.cat([step['x'] for step in steps]))
    assert torch.equal(generated[1], torch.cat([step['hidden'] for step in steps]))
    assert torch.equal(generated[0][~mask], real[0][~mask]), 'given text is the same on both sides'
    assert (free.all(1) == whole).all() and config.plan == ('left-to-right' if whole else 'wavefront')


@pytest.mark.parametrize('whole', [True, False])
def test_real_text_is_seen_as_if_the_decoder_had_drawn_it(whole, monkeypatch):
    """The same decoding with every draw replaced by the real token gives the trunk's views of the real side."""
    model = tiny_model()
    seed = seed_of(model, whole)
    generated, real, mask, x0, free, passes = examples(model, 4, seed)
    config = default_config(model, 4, prefix_only=whole, revising=True, seed=derive(seed, 1))
    steps = decoded(model, x0, free, config)
    remasked = iter([step['remasked'] for step in steps])
    for name in ('fill', 'fill_from_left'):
        plain = getattr(Wavefront, name)
        monkeypatch.setattr(Wavefront, name, lambda *args, plain=plain: (x0, *plain(*args)[1:]))
    monkeypatch.setattr(decoding, 'positions_to_remask', lambda *args: next(remasked))
    steps = decoded(model, x0, free, config)
    assert len(steps) == passes == 4 and all(torch.equal(step['x'], x0) for step in steps)
    assert torch.equal(real[1], torch.cat([step['hidden'] for step in steps]))
    assert not torch.equal(generated[1][mask], real[1][mask])


def test_the_critic_is_shown_in_training_what_it_scores_in_decoding():
    """The last example of a pass has the text, views and positions that the decoder's critic then scores."""
    model, seed = tiny_model(), 0
    seen = []
    generated, real, mask, x0, free, _ = examples(model, 1, seed)
    config = default_config(model, 1, prefix_only=bool(free.all()), revising=True, seed=derive(seed, 1))
    hook = model.critic_head.register_forward_pre_hook(lambda _, args: seen.append(args))
    decode_block(model, x0, free, config, range(len(x0)), range(x0.size(1)), wanted=['p_generated'])
    hook.remove()
    hidden, x, at, _ = seen[0]    # of the one pass of the decoder
    assert torch.equal(x, generated[0]) and torch.equal(hidden, generated[1])
    assert torch.equal(torch.stack(at), mask.nonzero().T)


def test_critic_loss_is_the_cross_entropy_of_generated_against_real():
    model = tiny_model()
    generated, real, mask, *_ = examples(model, 2)
    loss, logits, targets = critic_loss(model.critic_head, generated, real, mask, model.wte.weight)
    n = int(mask.sum())
    assert targets.tolist() == [1.0] * n + [0.0] * n
    at = mask.nonzero(as_tuple=True)
    for (x, hidden), part, target in ((generated, logits[:n], 1.0), (real, logits[n:], 0.0)):
        torch.testing.assert_close(part, model.critic_head(hidden, x, at, model.wte.weight))
    logits = logits.double()
    by_hand = -torch.cat((F.logsigmoid(logits[:n]), F.logsigmoid(-logits[n:]))).mean()    # 1 - sigmoid would be 0
    torch.testing.assert_close(loss.double(), by_hand, rtol=1e-4, atol=0)


def test_a_critic_learns_to_tell_generated_from_real():
    """A few steps on one batch bring the loss well below log 2, where it starts: the two sides do differ."""
    model = tiny_model().float()
    generated, real, mask, *_ = examples(model, 2)
    for p in model.critic_head.parameters():
        torch.nn.init.normal_(p, std=0.1)
    optimizer = torch.optim.AdamW(model.critic_head.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        loss = critic_loss(model.critic_head, generated, real, mask, model.wte.weight)[0]
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert abs(losses[0] - 0.693) < 0.1 and losses[-1] < 0.35


def test_remask_score_by_hand():
    prob = torch.tensor([1.0, 0.5, 0.5, 0.0]).double()
    critic = torch.tensor([-100.0, 0.0, 100.0, 0.0])    # chance of being generated 0, 1/2, 1, 1/2
    torch.testing.assert_close(remask_score(prob, critic), torch.tensor([0.0, 0.75, 1.0, 1.0]).double())


def test_the_critic_is_decoded_in_all_its_iterations(monkeypatch):
    """Training draws 1, 2, 4 or 8 iterations by the seed of the batch; validation takes 4."""
    model, asked = tiny_model(), []
    plain = diffusion.critic_examples
    monkeypatch.setattr(diffusion, 'critic_examples', lambda *args: asked.append(args[-1]) or plain(*args))
    batch = tiny_batch(model)
    for seed in range(16):
        diffusion.head_losses(model, batch, seed, critic_rows=1)
    assert set(asked) == set(diffusion.CRITIC_ITERATIONS) == {1, 2, 4, 8}
    asked.clear()
    result = diffusion.validate(model, batch.x0, 4, seed=0, critic=True)
    assert asked == [4] and 0 <= result['critic_auc'] <= 1 and result['critic'] > 0
