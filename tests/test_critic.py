"""The critic learns from what the shipped decoder makes, and scores are made as they are read."""
import pytest
import torch
import torch.nn.functional as F

import decoding
import diffusion
from conftest import tiny_batch, tiny_model
from critic import CriticExamples, critic_loss, remask_score
from decoding import decode_window, default_config
from diffusion import critic_examples
from noise import derive
from filling import HeadFiller


def examples(model, iterations, seed=5, B=8, n_sequences=4):
    """generated, real, mask, and what they were made from: clean x0 (n, T), free (n, T) and the passes made."""
    with torch.no_grad():
        found = critic_examples(model, tiny_batch(model, B), n_sequences, seed, iterations)
    n, mask, real = n_sequences, found.mask, found.real
    passes = len(mask) // n
    assert len(mask) == passes * n and all(torch.equal(mask[:n], part) for part in mask.split(n))
    assert all(torch.equal(real[0][:n], part) for part in real[0].split(n))
    assert (found.weight == 1 / passes).all() and found.n == found.total == mask[:n].sum()
    return found.generated, real, mask, real[0][:n], mask[:n], passes


def numbers_of(model, x0):
    """Which sequences of tiny_batch these are: their noise goes by it."""
    return [(tiny_batch(model).x0 == row).all(1).nonzero().item() for row in x0]


def decoded(model, x0, free, config):
    """The passes of a decoding, as on_pass sees them."""
    steps = []
    decode_window(model, x0, free, config, numbers_of(model, x0), range(x0.size(1)), steps.append, wanted=['hidden'])
    return steps


def kind_of(model, seed):
    """'default', 'revised' or 'given': what is decoded with a seed, by the decoder's settings that were asked for."""
    asked = []

    def spy(*args, **changes):
        asked.append('default' if not changes['revising'] else 'revised')
        asked[:] = asked if changes['prefix_only'] else ['given']
        return default_config(*args, **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusion, 'default_config', spy)
        examples(model, 2, seed)
    return asked[0]


def seed_of(model, kind):
    return next(seed for seed in range(40) if kind_of(model, seed) == kind)


def config_of(model, kind, iterations, **changes):
    return default_config(model, iterations, prefix_only=kind != 'given', revising=kind == 'revised', **changes)


def test_the_default_decoder_and_those_that_revise_are_learned_from():
    """Samples in blocks were scored by a critic that had never seen one: it learned from revised text alone."""
    kinds = [kind_of(tiny_model(), seed) for seed in range(40)]
    assert 12 <= kinds.count('default') <= 28 and min(kinds.count('revised'), kinds.count('given')) >= 4
    assert all(kind_of(tiny_model(add_sampler_head=False), seed) for seed in range(4)), 'a naive decoder serves as well'


@pytest.mark.parametrize('kind', ['default', 'revised', 'given'])
@pytest.mark.parametrize('iterations', [1, 2, 4])
@pytest.mark.parametrize('changes', [{}, {'corrections': 2, 'temperature': 0.5, 'end_temperature': 0.1}])
def test_generated_text_is_what_the_shipped_decoder_makes(iterations, changes, kind, monkeypatch):
    """At the end or, where it revises, after each of its passes, bit for bit, whatever its defaults are.

    The critic was trained on fills of one pass without corrections, and scored text of many passes with them.
    """
    model = tiny_model()
    seed = seed_of(model, kind)
    monkeypatch.setattr(diffusion, 'default_config', lambda *args, **kwargs: default_config(*args, **kwargs | changes))
    generated, real, mask, x0, free, passes = examples(model, iterations, seed)
    config = config_of(model, kind, iterations, **changes | {'seed': derive(seed, 1)})
    steps = decoded(model, x0, free, config)
    assert len(steps) <= config.passes == iterations
    assert len(steps) == iterations or config.plan == 'speculative'
    assert passes == (1 if kind == 'default' else iterations)
    assert torch.equal(generated[0], torch.cat([step['x'] for step in steps[-passes:]]))
    assert torch.equal(generated[1], torch.cat([step['hidden'] for step in steps[-passes:]]))
    assert (generated[0] != model.mask_id).all()
    assert torch.equal(generated[0][~mask], real[0][~mask]), 'given text is the same on both sides'
    assert free.all(1).all() == (kind != 'given')
    default = 'blocks' if changes else 'speculative'
    assert config.plan == {'default': default, 'revised': 'left-to-right', 'given': 'wavefront'}[kind]


@pytest.mark.parametrize('kind', ['default', 'revised', 'given'])
def test_real_text_is_seen_as_if_the_decoder_had_drawn_it(kind, monkeypatch):
    """The same decoding with every draw replaced by the real token gives the trunk's views of the real side."""
    model = tiny_model()
    seed = seed_of(model, kind)
    generated, real, mask, x0, free, passes = examples(model, 4, seed)
    config = config_of(model, kind, 4, seed=derive(seed, 1))
    steps = decoded(model, x0, free, config)
    remasked = iter([step['remasked'] for step in steps])

    def drawn(xt, mask, plain, self, *rest):
        return torch.where(mask, x0, xt), *plain(self, xt, mask, *rest)[1:]
    if config.plan == 'speculative':    # what was checked is read as text from left to right, the rest seen as masks
        checked = (steps[-1]['xt'] != model.mask_id) | steps[-1]['corrected']
        checked[:, 0] = False
        with torch.no_grad():
            text = model.reader(*x0.shape).read(x0)[:, :-1]
            masks = model(torch.full_like(x0, model.mask_id))
        states = torch.nn.functional.pad(text, (0, 0, 1, 0))
        torch.testing.assert_close(real[1], torch.where(checked[..., None], states, masks))
        assert torch.equal(real[0], x0) and checked.any() and not torch.equal(generated[1], real[1])
        return
    for name in ('fill', 'fill_from_left'):
        plain = getattr(HeadFiller, name)
        monkeypatch.setattr(HeadFiller, name, lambda self, xt, mask, *rest, plain=plain: drawn(
            xt, mask, plain, self, *rest))
    monkeypatch.setattr(decoding, 'positions_to_remask', lambda *args: next(remasked))
    steps = decoded(model, x0, free, config)
    assert passes == (1 if kind == 'default' else 4) and torch.equal(steps[-1]['x'], x0)
    assert torch.equal(real[0], x0.repeat(passes, 1))
    assert torch.equal(real[1], torch.cat([step['hidden'] for step in steps[-passes:]]))
    assert not torch.equal(generated[1][mask], real[1][mask])


def test_the_critic_is_shown_in_training_what_it_scores_in_decoding():
    """The last example of a pass has the text, views and positions that the decoder's critic then scores."""
    model, seed = tiny_model(), 0
    seen = []
    seed = seed_of(model, 'revised')
    generated, real, mask, x0, free, _ = examples(model, 1, seed)
    config = default_config(model, 1, prefix_only=bool(free.all()), revising=True, seed=derive(seed, 1))
    hook = model.critic_head.register_forward_pre_hook(lambda _, args: seen.append(args))
    decode_window(model, x0, free, config, numbers_of(model, x0), range(x0.size(1)), wanted=['p_generated'])
    hook.remove()
    hidden, x, at, _ = seen[0]    # of the one pass of the decoder
    assert torch.equal(x, generated[0]) and torch.equal(hidden, generated[1])
    assert torch.equal(torch.stack(at), mask.nonzero().T)


def test_the_critic_is_shown_in_training_the_default_samples_that_it_scores():
    """Text with the trunk's views of it, as sample_simple.py decodes and scores it: nobody listens there."""
    model = tiny_model()
    seed = seed_of(model, 'default')
    generated, real, mask, x0, free, _ = examples(model, 4, seed)
    seen = []
    hook = model.critic_head.register_forward_pre_hook(lambda _, args: seen.append(args))
    config = default_config(model, 4, seed=derive(seed, 1))
    made = decode_window(model, x0, free, config, numbers_of(model, x0), range(x0.size(1)), wanted=['p_generated'])
    hook.remove()
    (hidden, x, at, _), = seen
    assert torch.equal(x, generated[0]) and torch.equal(hidden, generated[1]) and torch.equal(made.x, x)
    assert torch.equal(torch.stack(at), mask.nonzero().T)


def test_of_a_trunk_that_does_not_read_text_it_learns_what_that_decodes(monkeypatch):
    """It was shown drafts that such a trunk had checked, which nobody gets."""
    model, asked = tiny_model(), []
    seed, model.reads_text = seed_of(model, 'default'), False
    plain = diffusion.decode_window
    monkeypatch.setattr(diffusion, 'decode_window', lambda *args, **kwargs: asked.append(args[3]) or plain(
        *args, **kwargs))
    generated, real, *_ = examples(model, 4, seed)
    assert {config.plan for config in asked} == {'interleaved'} and generated[0].shape == real[0].shape


def test_critic_loss_is_the_cross_entropy_of_generated_against_real():
    model = tiny_model()
    generated, real, mask, *_ = examples(model, 2)
    weight = torch.rand(len(mask), generator=torch.Generator().manual_seed(0))
    loss, logits, targets = critic_loss(model.critic_head, CriticExamples(generated, real, mask, weight, 1, 1),
                                        model.wte.weight)
    n = int(mask.sum())
    assert targets.tolist() == [1.0] * n + [0.0] * n
    at = mask.nonzero(as_tuple=True)
    for (x, hidden), part, target in ((generated, logits[:n], 1.0), (real, logits[n:], 0.0)):
        torch.testing.assert_close(part, model.critic_head(hidden, x, at, model.wte.weight))
    logits = logits.double()
    weight = weight[:, None].expand(mask.shape)[mask].double()
    by_hand = -(weight * (F.logsigmoid(logits[:n]) + F.logsigmoid(-logits[n:]))).sum() / (2 * weight.sum())
    torch.testing.assert_close(loss.double(), by_hand, rtol=1e-4, atol=0)


def test_a_critic_learns_to_tell_generated_from_real():
    """A few steps on one batch bring the loss well below log 2, where it starts: the two sides do differ."""
    model = tiny_model().float()
    with torch.no_grad():
        shown = critic_examples(model, tiny_batch(model), 4, 5, 2)
    for p in model.critic_head.parameters():
        torch.nn.init.normal_(p, std=0.1)
    optimizer = torch.optim.AdamW(model.critic_head.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        loss = critic_loss(model.critic_head, shown, model.wte.weight)[0]
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


def test_a_finished_sequence_is_shown_as_often_as_it_was_read():
    """Lightly masked sequences are done in fewer passes, but waited for the others and were shown again after each."""
    model, batch = tiny_model(), tiny_batch(tiny_model(), n_masked=2)
    batch.mask[0] = batch.all_masks[0] = True    # whom the others wait for
    with torch.no_grad():
        found = next(e for e in (critic_examples(model, batch, 8, seed, 8) for seed in range(20)) if e.n < 8 * 24)
    read = found.mask.any(1).view(-1, 8)
    assert read[:, 0].sum() > read[:, 1].sum() >= 1 and found.n == found.total == 24 + 7 * 2
    torch.testing.assert_close(found.weight.view(-1, 8)[0], 1 / read.sum(0))
    assert (read.int().diff(dim=0) <= 0).all(), 'once finished, finished for good'
