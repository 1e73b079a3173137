"""An iteration's global batch is the same in however many parts it is taken: rows, masks, noise, losses, gradients."""
import math
from types import SimpleNamespace

import pytest
import torch

import objectives
from batches import Share
from conftest import tiny_model
from corpus import Corpus

G = 12


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
        named = {'main': 1, 'blocks': rows[2], 'sampler': rows[0], 'critic': rows[1]}
        assert list(whole) == list(values) == [name for name, on in named.items() if on]
        for name, value in whole.items():
            assert values[name] == pytest.approx(value, rel=1e-6), name
        assert set(gradients) == set(shared)
        for name, gradient in gradients.items():
            torch.testing.assert_close(shared[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text: f'{name}: {text}')


@pytest.mark.parametrize('text_masking', [0.0, 0.1, 0.5])
def test_masked_text_is_read_and_clean_text_is_learned(text_masking):
    """The share masked goes from 0 to twice the setting, from sequence to sequence; no target is a mask."""
    model, x0 = tiny_model(), torch.randint(0, 11, (400, 25), generator=torch.Generator().manual_seed(0))
    config, seen = SimpleNamespace(compile=False, device='cpu', text_masking=text_masking), []
    objective = objectives.AutoregressiveObjective(model, config)
    objective.trunk = lambda x: seen.append(x) or torch.zeros(*x.shape, 32)
    model.lm_head = lambda hidden: hidden.new_zeros(*hidden.shape[:-1], model.mask_id)
    assert objective(x0, 3, Share(400))['main'].item() == pytest.approx(math.log(model.mask_id), rel=1e-5)
    masked = seen[0] == model.mask_id
    assert torch.equal(seen[0][~masked], x0[:, :-1][~masked])
    share = masked.float().mean(1)
    assert share.mean().item() == pytest.approx(text_masking, abs=4 * 0.6 * text_masking / 20)
    assert (share > 1.5 * text_masking).any() == (share < 0.5 * text_masking).any() == (text_masking > 0)


def test_blocks_are_learned_behind_masked_text():
    """The trunk sees masks in the text, the losses' targets and the heads' text have none."""
    model, x0 = tiny_model(), torch.randint(0, 11, (G, 24), generator=torch.Generator().manual_seed(0))
    texts = []
    config = SimpleNamespace(compile=False, device='cpu', text_masking=0.4)
    objective = objectives.DiffusionObjective(model, config)
    objective.trunk = lambda x, layout=None: (texts.append(x) if layout else None) or model(x, layout)
    objective(x0, 3, Share(G), 0, 0, 6)
    assert (texts[0] == model.mask_id).any() and len(texts[0]) == 6
    known = texts[0] != model.mask_id
    assert torch.equal(texts[0][known], x0[6:, :texts[0].size(1)][known])
