"""The sampler head's training examples show what decoding shows, and are chosen as the settings say."""
import pytest
import torch

import diffusion
import filling
from conftest import blank, tiny_batch, tiny_model
from decoding import DecoderConfig, decode_window
from filling import HeadFiller
from sampler import sampler_examples


def generator(seed):
    return torch.Generator().manual_seed(seed)


def examples_of(model, batch, n_sequences, seed, augment=True, blocks=None):
    with torch.no_grad():
        return sampler_examples(model, batch, blocks, n_sequences, generator(seed), augment)


def test_plain_examples_are_the_masked_positions():
    """Nothing is read from left to right, blocks or not: validation compares with the language-model head."""
    model = tiny_model()
    batch = tiny_batch(model)
    blocks, _ = diffusion.forward_blocks(model, model, batch.x0, generator(0))
    for given in (None, blocks):
        examples = examples_of(model, batch, 16, 0, augment=False, blocks=given)
        assert torch.equal(examples.targets, batch.targets) and torch.equal(examples.hidden, batch.hidden[batch.mask])
        assert examples.around.shape == (8 * 12, 4) and not examples.hidden.requires_grad
        assert len(examples.text) == 0 and (examples.state_of == -1).all() and (examples.last == 0).all()
        assert examples.total == len(examples.targets)


@pytest.mark.parametrize('B, n_sequences', [(8, 16), (8, 8), (8, 4), (12, 8), (16, 8)])
def test_chosen_sequences_are_not_all_augmented_alike(B, n_sequences):
    """With an even stride every chosen sequence was augmented or none: parity of the row chose both.

    Of the chosen ones one half is to be filled whole, with the neighbours of plain examples; in the other half more
    neighbours are known, but for a sequence whose part is all that matters, once in a thousand. Over 24 seeds each
    choice has both kinds.
    """
    model = tiny_model()
    batch = tiny_batch(model, B)
    kinds, lucky = set(), 0
    for seed in range(24):
        plain = examples_of(model, batch, n_sequences, seed, augment=False)
        n = len(plain.targets) // 12
        assert n == n_sequences // 2
        around = examples_of(model, batch, n_sequences, seed).around[:n * 12]
        whole = [torch.equal(a, b) for a, b in zip(around.split(12), plain.around.split(12))]
        more_known = (around == model.mask_id).sum() < (plain.around == model.mask_id).sum()
        assert all(whole[::2]) != all(whole[1::2]) and more_known
        kinds.add(all(whole[::2]))
        lucky += sum(whole) - n // 2
    assert len(kinds) == 2, 'either half may be the one'
    assert lucky <= 2


@pytest.mark.parametrize('B, n_sequences, n_chosen, n_blank, n_read', [
    (8, 16, 8, 4, 8), (8, 8, 4, 2, 8), (8, 4, 2, 1, 4), (16, 8, 4, 2, 8), (8, 2, 1, 1, 2), (8, 1, 1, 1, 1)])
def test_blank_sequences_follow_sampler_rows(B, n_sequences, n_chosen, n_blank, n_read):
    """Half as many as chosen ones, at least one, and n_sequences from left to right: they were half the batch whatever
    sampler_rows was. Position 0 is no example of those from left to right: the language-model head fills it.
    """
    model = tiny_model()
    batch = tiny_batch(model, B)
    with torch.no_grad():
        hidden = model(torch.full((1, 24), model.mask_id))[0]
    seen, read = set(), set()

    def row_of(target, start):
        (b,) = (b for b in range(B) if torch.equal(batch.x0[b, start:], target))
        return b
    for seed in range(12):
        examples = examples_of(model, batch, n_sequences, seed)
        sizes = n_chosen * 12, n_blank * 24, n_read * 23
        assert len(examples.targets) == examples.total == sum(sizes)
        _, blank_hidden, read_hidden = examples.hidden.split(sizes)
        torch.testing.assert_close(blank_hidden, hidden.repeat(n_blank, 1))
        torch.testing.assert_close(read_hidden, hidden[1:].repeat(n_read, 1))
        _, blank_targets, read_targets = examples.targets.split(sizes)
        seen.update(row_of(target, 0) for target in blank_targets.split(24))
        rows = [row_of(target, 1) for target in read_targets.split(23)]
        assert len(set(rows)) == n_read and torch.equal(examples.text, batch.x0[rows])
        read.update(rows)
    assert len(seen) > n_blank, 'their text changes from time to time'
    assert len(read) > n_read or n_read == B


@pytest.mark.parametrize('given', [False, True])
def test_each_example_has_the_state_of_its_own_position(given):
    """Of its sequence, after the tokens on its left; examples of the wavefront have none, and no state of the trunk.

    From left to right two neighbours on the left are known, as far as the text goes, and none on the right.
    """
    model = tiny_model()
    batch = tiny_batch(model)
    blocks = diffusion.forward_blocks(model, model, batch.x0[:3], generator(1))[0] if given else None
    examples = examples_of(model, batch, 4, 0, blocks=blocks)
    n = 2 * 12 + 24
    assert (examples.state_of[:n] == -1).all() and (examples.last[:n] == 0).all()
    at = examples.state_of[n:]
    assert (at >= 0).all() and (at % 24 > 0).all()
    assert len(at.unique()) == len(at) - (3 * len(blocks.positions) if given else 0), 'twice in a block'
    assert torch.equal(examples.text.flatten()[at], examples.targets[n:])
    for position, around in zip(at.tolist(), examples.around[n:].tolist()):
        row, i = divmod(position, 24)
        left = [examples.text[row, j].item() if j >= 0 else model.mask_id for j in (i - 2, i - 1)]
        assert around == left + [model.mask_id] * 2


def test_blocks_are_learned_from_as_well():
    """The head reads their text first, and sees every position twice: with the view of a blank sequence and, in the
    block, all but its first with the view and last state of the pass that read it. Other sequences make up the number.
    """
    model = tiny_model()
    batch = tiny_batch(model)
    sizes, read = set(), set()
    for seed in range(24):
        with torch.no_grad():
            blocks, _ = diffusion.forward_blocks(model, model, batch.x0[:3], generator(seed))
        blocks.x0 = (blocks.x0 + 1) % 11    # none of the batch's
        examples = examples_of(model, batch, 4, seed, blocks=blocks)
        M = len(blocks.positions)
        sizes.add(M)
        n, rows = 2 * 12 + 24, 23 + M    # of the wavefront, before; for each sequence that is read in blocks
        assert len(examples.targets) == examples.total == n + 3 * rows + 23
        shown = lambda name: getattr(examples, name)[n:n + 3 * rows].unflatten(0, (3, rows))
        assert torch.equal(examples.text[:3], blocks.x0) and len(examples.text) == 4
        assert torch.equal(shown('targets'), torch.cat((blocks.x0[:, 1:], blocks.x0[:, blocks.positions]), 1))
        assert torch.equal(shown('hidden')[:, 23:], blocks.hidden) and torch.equal(shown('last')[:, 23:], blocks.last)
        assert (shown('last')[:, :23] == 0).all() and torch.equal(shown('hidden')[0, :23], shown('hidden')[1, :23])
        assert torch.equal(shown('state_of') // 24, torch.arange(3)[:, None].expand(3, rows))
        read.add((batch.x0 == examples.text[3]).all(1).nonzero().item())
    assert sizes == {5, 2, 0} and len(read) > 4


def decoded_from_blank(model, B, dtype=None):
    """What decode_window gives for B blank sequences, in one pass.

    Returns text (B, T), first positions (B, T) bool, and the neighbours (B, T, S) that the head saw when it filled each
    position, and when it rescored it.
    """
    plain_fill, plain_around = filling.padded_neighbors, HeadFiller.around
    filled = torch.full((B, 24, len(model.sampler_head.local.offsets)), -1)
    again = filled.clone()

    def around_while_filling(padded, at, offsets):
        found = filled[at] = plain_fill(padded, at, offsets)
        return found

    def around(self, x, at):
        found = again[at] = plain_around(self, x, at)
        return found
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filling, 'padded_neighbors', around_while_filling)
        patch.setattr(HeadFiller, 'around', around)
        with torch.autocast('cpu', dtype or torch.bfloat16, enabled=dtype is not None):
            decode_window(model, *blank(model, B), DecoderConfig(mask_ratios=()), range(B), range(24), steps.append,
                         wanted=['remask_score'])
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
    examples = examples_of(model, batch, 4, seed)
    around = examples.around[24:48]    # those of the blank sequence, after 12 of each of the two
    b = next(b for b in range(2) if torch.equal(examples.targets[24:48], x[b]))
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
            examples = examples_of(model, batch, 4, seed)
        b = next(b for b in range(2) if torch.equal(examples.targets[24:48], x[b]))
        assert torch.equal(examples.around[24:48], torch.where(first[b][:, None], again[b], filled[b]))


def test_rescoring_in_training_sees_what_decoding_sees(monkeypatch):
    """A sequence of which nothing is to be filled is seen as after filling: every neighbour on both sides known."""
    model = tiny_model()
    batch = tiny_batch(model, 2)
    monkeypatch.setattr(torch, 'rand', lambda *size, generator=None: torch.zeros(size))    # shares below 0
    around = examples_of(model, batch, 4, 0).around[:24].view(2, 12, 4)
    seen = []
    plain = HeadFiller.around
    monkeypatch.setattr(HeadFiller, 'around', lambda *args: seen.append(plain(*args)) or seen[-1])
    with torch.no_grad():
        HeadFiller(model).rescore(batch.x0, batch.mask.nonzero(as_tuple=True), batch.hidden)
    rescored = torch.cat(seen).view(2, 12, 4)
    same = [torch.equal(a, b) for a, b in zip(around, rescored)]
    assert sorted(same) == [False, True], 'one of the two sequences is rescored, the other filled'


def test_validation_uses_plain_examples(monkeypatch):
    """Validation shows all plain masks to the head, so that its loss can be compared with the main one."""
    model = tiny_model()
    shown = []
    plain = diffusion.sampler_examples

    def spy(model, batch, blocks, n_sequences, generator, augment):
        examples = plain(model, batch, blocks, n_sequences, generator, augment)
        shown.append((blocks, augment, torch.equal(examples.targets, batch.targets)))
        return examples
    monkeypatch.setattr(diffusion, 'sampler_examples', spy)
    x0 = torch.randint(0, 11, (6, 24), generator=generator(0))
    diffusion.validate(model, x0, 4, seed=0, sampler=True)
    assert shown == [(None, False, True)] * 2
