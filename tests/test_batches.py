"""An iteration's global batch is the same in however many parts it is taken: rows, masks, noise, losses, gradients."""
import math
from types import SimpleNamespace

import pytest
import torch

import diffusion
import objectives
from batches import Share, spread_choice
from conftest import tiny_model
from corpus import Corpus

G = 12


@pytest.mark.parametrize('n_all, n', [(12, 5), (48, 25), (48, 16), (7, 7), (3, 9)])
def test_as_many_are_chosen_as_asked_for_each_as_often(n_all, n):
    """Of 48 sequences 25 were 48: the stride was a whole number."""
    counts = torch.zeros(n_all)
    for seed in range(400):
        chosen = spread_choice(n_all, n, torch.Generator().manual_seed(seed))
        assert len(chosen.unique()) == len(chosen) == min(n, n_all)
        assert chosen.diff().max() - chosen.diff().min() <= 1 and 0 <= chosen[0] and chosen[-1] < n_all
        counts[chosen] += 1
    torch.testing.assert_close(counts / 400, torch.full((n_all,), min(1.0, n / n_all)), rtol=0, atol=0.12)


def test_shares_by_hand():
    share = Share(7, 1, 3)
    assert list(share.numbers) == [1, 4]
    masked, blocks = share.split(3)    # 0 to 3 and, as 0 to 2, 4 to 6
    assert list(masked.numbers) == [1] and list(blocks.numbers) == [0]
    which, own = share.of(torch.tensor([0, 1, 3, 4, 6]))
    assert which.tolist() == [1, 3] and own.tolist() == [0, 1]
    assert share.weigh(5.0, 2, 6) == 5.0


@pytest.mark.parametrize('parts', [1, 2, 3, 5, 12])
@pytest.mark.parametrize('n_blocks', [0, 1, 5])
def test_shares_are_a_partition(parts, n_blocks):
    shares = [Share(G, first, parts) for first in range(parts)]
    assert sorted(i for share in shares for i in share.numbers) == list(range(G))
    for share in shares:
        masked, blocks = share.split(n_blocks)
        assert [*masked.numbers, *(G - n_blocks + i for i in blocks.numbers)] == list(share.numbers)
    chosen = torch.arange(1, G, 2)
    found = sorted((int(chosen[w]), s.numbers[o]) for s in shares for w, o in zip(*(z.tolist() for z in s.of(chosen))))
    assert found == [(i, i) for i in chosen.tolist()]


def test_rows_do_not_depend_on_which_are_taken(toy_data):
    import numpy as np
    rows = lambda *chosen: Corpus('toy', toy_data).random_rows('train', 6, 9, np.random.default_rng(3), *chosen)
    assert (rows()[[1, 4]] == rows([1, 4])).all()


def losses_and_gradients(model, x0, seed, parts, rows):
    """Mean over the parts of a global batch: {loss: value}, {parameter: gradient}."""
    objective = objectives.DiffusionObjective(model, SimpleNamespace(compile=False, device='cpu', text_masking=0.2))
    model.zero_grad()
    values = {}
    for first in range(parts):
        share = Share(len(x0), first, parts)
        losses = objective(x0[list(share.numbers)], seed, share, *rows)
        (sum(losses.values()) / parts).backward()
        for name, value in losses.items():
            values[name] = values.get(name, 0) + value.item() / parts
    return values, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize('rows', [(0, 0, 0), (0, 0, 4), (6, 0, 4), (3, 2, 4), (1, 1, 0), (12, 5, 6)])
@pytest.mark.parametrize('parts', [2, 3, 4, 12])
def test_parts_together_are_the_whole(parts, rows):
    """Sequences for the sampler head, the critic head and blocks; with twelve parts some have none of them.

    Each process and micro-step once drew its own: two processes trained another model than one.
    """
    for seed in range(3):
        model, x0 = tiny_model(seed), torch.randint(0, 11, (G, 24), generator=torch.Generator().manual_seed(seed))
        whole, gradients = losses_and_gradients(model, x0, seed, 1, rows)
        values, shared = losses_and_gradients(model, x0, seed, parts, rows)
        named = {'main': 1, 'sampler': rows[0], 'critic': rows[1], 'blocks': rows[2]}
        assert list(whole) == list(values) == [name for name, on in named.items() if on]
        for name, value in whole.items():
            assert values[name] == pytest.approx(value, rel=1e-6), name
        assert set(gradients) == set(shared)
        for name, gradient in gradients.items():
            torch.testing.assert_close(shared[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text: f'{name}: {text}')


@pytest.mark.parametrize('text_masking', [0.0, 0.1, 0.5])
def test_masked_text_is_read_and_clean_text_is_learned(text_masking):
    """The share masked is spread evenly from 0 to twice the setting, over sequences; no target is a mask."""
    model, x0 = tiny_model(), torch.randint(0, 11, (400, 2001), generator=torch.Generator().manual_seed(0))
    config, seen = SimpleNamespace(compile=False, device='cpu', text_masking=text_masking), []
    objective = objectives.AutoregressiveObjective(model, config)
    objective.trunk = lambda x: seen.append(x) or torch.zeros(*x.shape, 1)
    model.lm_head = lambda hidden: hidden.new_zeros(*hidden.shape[:-1], model.mask_id)
    assert objective(x0, 3, Share(400))['main'].item() == pytest.approx(math.log(model.mask_id), rel=1e-5)
    masked = seen[0] == model.mask_id
    assert torch.equal(seen[0][~masked], x0[:, :-1][~masked])
    share = masked.double().mean(1)    # its standard error is 0.011 at most, that of the quartiles some 0.04
    wanted = torch.tensor([0.25, 0.5, 0.75]).double()
    torch.testing.assert_close(share.quantile(wanted), 2 * text_masking * wanted, atol=0.2 * text_masking, rtol=0)


def test_parts_of_masked_text_are_the_whole():
    model, x0 = tiny_model(heads=False), torch.randint(0, 11, (G, 24), generator=torch.Generator().manual_seed(0))
    config = SimpleNamespace(compile=False, device='cpu', text_masking=0.3)
    objective = objectives.AutoregressiveObjective(model, config)

    def loss(parts):
        shares = [Share(G, first, parts) for first in range(parts)]
        with torch.no_grad():
            return sum(objective(x0[list(share.numbers)], 3, share)['main'].item() for share in shares) / parts
    assert [loss(3), loss(4)] == pytest.approx([loss(1)] * 2, rel=1e-6)


def test_blocks_are_learned_behind_masked_text():
    """The trunk learns from text with masks, its targets have none; the heads see what reading the clean text gives."""
    model, x0 = tiny_model().eval(), torch.randint(0, 11, (6, 24), generator=torch.Generator().manual_seed(0))
    seen = torch.where(torch.rand(6, 24, generator=torch.Generator().manual_seed(1)) < 0.4, model.mask_id, x0)
    read = []

    def trunk(x, layout):
        read.append(x)
        return model(x, layout)

    def run(**given):
        return diffusion.forward_blocks(trunk, model, x0, torch.Generator().manual_seed(0), **given)
    blocks, loss = run(seen=seen)
    clean, clean_loss = run()
    n = read[0].size(1)
    assert [torch.equal(x, y[:, :n]) for x, y in zip(read, (seen, x0, x0))] == [True] * 3
    assert torch.equal(blocks.hidden, clean.hidden) and torch.equal(blocks.last, clean.last)
    assert torch.equal(blocks.x0, x0) and loss.requires_grad and not blocks.hidden.requires_grad
    assert abs(loss.item() - clean_loss.item()) > 1e-4
    assert torch.equal(run(seen=seen, viewed=False)[1], loss) and len(read) == 4, 'where no head learns it is read once'
