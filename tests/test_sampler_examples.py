"""The sampler head's training examples show what decoding shows, and are chosen as the settings say."""
import pytest
import torch

import diffusion
from conftest import blank, tiny_batch, tiny_model
from decoding import DecoderConfig, decode_block
from sampler import Wavefront, gather_neighbors, sampler_examples


def generator(seed):
    return torch.Generator().manual_seed(seed)


def examples_of(model, batch, n_sequences, seed, augment=True):
    with torch.no_grad():
        return sampler_examples(model, batch, n_sequences, generator(seed), augment)


def test_plain_examples_are_the_masked_positions():
    model = tiny_model()
    batch = tiny_batch(model)
    examples = examples_of(model, batch, 8, 0, augment=False)
    assert torch.equal(examples.targets, batch.targets) and torch.equal(examples.hidden, batch.hidden[batch.mask])
    assert examples.around.shape == (8 * 12, 4) and not examples.hidden.requires_grad


@pytest.mark.parametrize('B, n_sequences', [(8, 8), (8, 4), (8, 2), (12, 4), (16, 4)])
def test_chosen_sequences_are_not_all_augmented_alike(B, n_sequences):
    """With an even stride every chosen sequence was augmented or none: parity of the row chose both.

    Of the chosen ones one half is to be filled whole, with the neighbours of plain examples; in the other half more
    neighbours are known. Over 24 seeds each choice has both kinds.
    """
    model = tiny_model()
    batch = tiny_batch(model, B)
    kinds = set()
    for seed in range(24):
        plain = examples_of(model, batch, n_sequences, seed, augment=False)
        n = len(plain.targets) // 12
        assert n == n_sequences
        around = examples_of(model, batch, n_sequences, seed).around[:n * 12]
        whole = [torch.equal(a, b) for a, b in zip(around.split(12), plain.around.split(12))]
        more_known = (around == model.mask_id).sum() < (plain.around == model.mask_id).sum()
        assert sum(whole) == n // 2 and more_known
        kinds.add(tuple(whole))
    assert len(kinds) == 2, 'either half may be the one'


@pytest.mark.parametrize('B, n_sequences, n_blank', [(8, 8, 4), (8, 4, 2), (8, 2, 1), (16, 4, 2), (8, 1, 1)])
def test_blank_sequences_follow_sampler_rows(B, n_sequences, n_blank):
    """Half as many as chosen ones, at least one: they were half the batch whatever sampler_rows was."""
    model = tiny_model()
    batch = tiny_batch(model, B)
    with torch.no_grad():
        hidden = model(torch.full((1, 24), model.mask_id))[0]
    seen = set()
    for seed in range(12):
        examples = examples_of(model, batch, n_sequences, seed)
        assert len(examples.targets) == n_sequences * 12 + n_blank * 24
        torch.testing.assert_close(examples.hidden[n_sequences * 12:], hidden.repeat(n_blank, 1))
        for target in examples.targets[n_sequences * 12:].split(24):
            found = [b for b in range(B) if torch.equal(batch.x0[b], target)]
            assert len(found) == 1
            seen.update(found)
    assert len(seen) > n_blank, 'their text changes from time to time'


def decoded_from_blank(model, B, dtype=None):
    """What decode_block gives for B blank sequences, in one pass.

    Returns text (B, T), first positions (B, T) bool, and the neighbours (B, T, S) that the head saw when it filled each
    position, and when it rescored it.
    """
    offsets = model.sampler_head.local.offsets
    plain_fill, plain_logits = Wavefront.fill, Wavefront.logits
    filled = torch.full((B, 24, len(offsets)), -1)
    again, filling = filled.clone(), []

    def fill(self, *args):
        filling.append(True)
        result = plain_fill(self, *args)
        filling.clear()
        return result

    def logits(self, padded, at, *rest):
        (filled if filling else again)[at] = gather_neighbors(padded, *at, offsets, self.reach)
        return plain_logits(self, padded, at, *rest)
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Wavefront, 'fill', fill)
        patch.setattr(Wavefront, 'logits', logits)
        with torch.autocast('cpu', dtype or torch.bfloat16, enabled=dtype is not None):
            decode_block(model, *blank(model, B), DecoderConfig(mask_ratios=()), range(B), range(24), steps.append)
    assert (again >= 0).all()
    return steps[0]['x'], steps[0]['wave'] == 0, filled, again


@pytest.mark.parametrize('ratio', [0.01, 0.1, 0.3])
@pytest.mark.parametrize('seed', [0, 1])
def test_training_and_decoding_agree_on_blank_sequences(ratio, seed):
    """Training began blank sequences anywhere, decoding where the trunk is surest, the same few in every sample.

    A test that hands the score to both cannot see that. Here the real decoder writes text from nothing; as training
    examples the same text must come with the neighbours that the decoder's head saw at every position: when it filled
    it or, at first positions, which the language-model head fills, when it rescored it.
    """
    model = tiny_model(seed, sampler_min_neighbors_ratio=ratio)
    x, first, filled, again = decoded_from_blank(model, 2)
    assert (first.sum(1) == max(1, round(ratio * 24))).all() and (filled[first] == -1).all()
    batch = tiny_batch(model, 2)
    batch.x0 = x
    around = examples_of(model, batch, 2, seed).around[2 * 12:]    # those of the blank sequence
    b = next(b for b in range(2) if torch.equal(examples_of(model, batch, 2, seed).targets[24:], x[b]))
    assert torch.equal(around, torch.where(first[b][:, None], again[b], filled[b]))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_training_and_decoding_agree_on_blank_sequences_under_autocast(dtype):
    """The decoder reads its logits without autocast; rounded ones tie, and ties begin a sequence elsewhere.

    A trunk that has learned little gives every position of a blank sequence nearly the same confidence: as here, where
    the weights are small.
    """
    for seed in range(4):
        model = tiny_model(seed, sampler_min_neighbors_ratio=0.1).float()
        for p in model.parameters():
            p.data.mul_(0.2)
        x, first, filled, again = decoded_from_blank(model, 2, dtype)
        batch = tiny_batch(model, 2)
        batch.x0 = x
        with torch.autocast('cpu', dtype):
            examples = examples_of(model, batch, 2, seed)
        b = next(b for b in range(2) if torch.equal(examples.targets[24:], x[b]))
        assert torch.equal(examples.around[24:], torch.where(first[b][:, None], again[b], filled[b]))


def test_rescoring_in_training_sees_what_decoding_sees(monkeypatch):
    """A sequence of which nothing is to be filled is seen as after filling: every neighbour on both sides known."""
    model = tiny_model()
    batch = tiny_batch(model, 2)
    monkeypatch.setattr(torch, 'rand', lambda *size, generator=None: torch.zeros(size))    # shares below 0
    around = examples_of(model, batch, 2, 0).around[:24].view(2, 12, 4)
    seen = []
    plain = Wavefront.logits

    def logits(self, padded, at, *rest):
        seen.append(gather_neighbors(padded, *at, self.head.local.offsets, self.reach))
        return plain(self, padded, at, *rest)
    monkeypatch.setattr(Wavefront, 'logits', logits)
    with torch.no_grad():
        Wavefront(model).rescore(batch.x0, batch.mask.nonzero(as_tuple=True), batch.hidden)
    rescored = torch.cat(seen).view(2, 12, 4)
    same = [torch.equal(a, b) for a, b in zip(around, rescored)]
    assert sorted(same) == [False, True], 'one of the two sequences is rescored, the other filled'


def test_validation_uses_plain_examples(monkeypatch):
    """Validation shows plain masks to the head, so that its loss can be compared with the main one."""
    model = tiny_model()
    counts = []
    plain = diffusion.sampler_examples
    monkeypatch.setattr(diffusion, 'sampler_examples', lambda *args: counts.append(args[-1]) or plain(*args))
    x0 = torch.randint(0, 11, (6, 24), generator=generator(0))
    diffusion.validate(model, x0, 4, seed=0, sampler=True)
    assert counts == [False, False]
