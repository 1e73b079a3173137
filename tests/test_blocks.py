"""Text beside masked blocks of itself: who sees what, and that one packed pass asks what decoding in blocks asks."""
import pytest
import torch

from blocks import lay_out, views
from conftest import read_block, tiny_batch, tiny_model
from diffusion import forward_blocks, head_losses

T = 24
LAYOUTS = [((0, 6, 12, 18), 6), ((3, 9), 5), ((5, 16), 7), ((1,), 23), ((4, 4, 6), 8), ((23,), 1)]


def texts(B=2, seed=0, length=T):
    return torch.randint(0, 11, (B, length), generator=torch.Generator().manual_seed(seed))


def test_layout_and_views_by_hand():
    layout = lay_out(3, (0, 2), 2)
    assert layout.positions.tolist() == [0, 1, 2, 0, 1, 2, 3] and (layout.n_text, layout.n_masks) == (3, 4)
    assert (layout.bias == 0).int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0],    # text, from left to right
        [0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0, 0],                           # the block at 0 sees itself
        [1, 1, 0, 0, 0, 1, 1], [1, 1, 0, 0, 0, 1, 1]]                           # the block at 2: two tokens and itself
    assert (layout.bias[layout.bias != 0] == float('-inf')).all()
    hidden = torch.tensor([10.0, 11, 12, 20, 21, 22, 23])[None, :, None]
    view, last = views(hidden, layout)
    assert view.flatten().tolist() == [20, 21, 11, 23] and last.flatten().tolist() == [0, 11]


@pytest.mark.parametrize('starts, size', LAYOUTS)
def test_nothing_sees_what_comes_later(starts, size):
    """A changed token i moves no state of text before i nor of a block that begins at or before i, and all others."""
    model, layout, x = tiny_model(), lay_out(T, starts, size), texts(1)
    starts = torch.tensor(starts)
    with torch.no_grad():
        before = model(x, layout)
        for i in range(T):
            changed = x.clone()
            changed[0, i] = (x[0, i] + 1) % 11
            after = model(changed, layout)
            moved = (after - before).abs().amax(-1)[0]
            later = torch.cat((torch.arange(T) >= i, (starts > i).repeat_interleave(size)))
            assert (moved[~later] < 1e-12).all() and (moved[later] > 1e-9).all(), i
            for a, b, n in zip(views(after, layout), views(before, layout), (size, 1)):
                moved, later = (a - b).abs().amax(-1)[0], (starts > i).repeat_interleave(n)
                assert (moved[~later] < 1e-12).all() and (moved[later] > 1e-9).all(), i


@pytest.mark.parametrize('starts, size', LAYOUTS)
def test_read_block_equals_the_packed_pass(starts, size):
    """Training packs many blocks into one pass, decoding reads one: the same view and state, whatever comes after."""
    model, x = tiny_model(), texts(3)
    with torch.no_grad():
        view, last = views(model(x, lay_out(T, starts, size)), lay_out(T, starts, size))
        for n, start in enumerate(starts):
            given = x.clone()
            given[:, start:] = model.mask_id
            found = read_block(model, given, start, start + size)
            torch.testing.assert_close(found[0], view[:, n * size:(n + 1) * size], atol=1e-10, rtol=0)
            torch.testing.assert_close(found[1], last[:, n], atol=1e-10, rtol=0)
            assert (found[1] == 0).all() == (start == 0)


@pytest.mark.parametrize('starts, size', LAYOUTS)
def test_packed_blocks_are_independent(starts, size):
    """Each block has the states that it has alone, and the text those that it has without any behind it."""
    model, x = tiny_model(), texts()
    with torch.no_grad():
        packed = model(x, lay_out(T, starts, size))
        for n, start in enumerate(starts):
            alone = model(x, lay_out(T, (start,), size))
            own = slice(T + n * size, T + (n + 1) * size)
            torch.testing.assert_close(packed[:, own], alone[:, T:], atol=1e-10, rtol=0)
            torch.testing.assert_close(packed[:, :T], alone[:, :T], atol=1e-10, rtol=0)


@pytest.mark.parametrize('starts, size', [*LAYOUTS, ((0, 3, 6, 9), 3)])
def test_the_convolution_respects_borders(starts, size):
    """By a plain loop: text takes from the left alone, a block from itself and from the text before it."""
    conv, layout = tiny_model().h[0].mlp.near, lay_out(T, starts, size)
    x = torch.randn(2, T + layout.n_masks, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = conv.conv.weight[:, 0]    # (C, 9)
    by_hand = x.clone()
    for offset in range(-4, 5):
        for i in range(T):
            if offset <= 0 <= i + offset:
                by_hand[:, i] += weight[:, offset + 4] * x[:, i + offset]
        for n, start in enumerate(starts):
            for p in range(size):
                if 0 <= p + offset < size:
                    source = T + n * size + p + offset
                elif offset < 0 <= start + p + offset:
                    source = start + p + offset
                else:
                    continue
                by_hand[:, T + n * size + p] += weight[:, offset + 4] * x[:, source]
    with torch.no_grad():
        torch.testing.assert_close(conv(x, layout), by_hand, atol=1e-12, rtol=0)


def block_choices(model, x, seeds):
    """[(layout, BlockBatch, loss)] of forward_blocks with these seeds."""
    found = []
    for seed in seeds:
        seen = []

        def trunk(x, layout):
            seen.append(layout)
            return model(x, layout)
        blocks, loss = forward_blocks(trunk, model, x, torch.Generator().manual_seed(seed))
        found.append((*seen, blocks, loss))
    return found


def test_loss_of_blocks_by_hand():
    """Half the text's cross-entropy and a quarter of the block's, weighted by 1 / sqrt(1 + position in it).

    Computed token by token: each from a pass that ends with the token before it, the block alone. Text and block are as
    long as the sequence, and over 200 seeds every size and place occurs.
    """
    model, x = tiny_model(), texts(3)
    nll = {}

    def ce(hidden, i):
        return torch.nn.functional.cross_entropy(model.lm_head(hidden), x[:, i]).double()
    with torch.no_grad():
        text = torch.stack([ce(read_block(model, x, i, i + 1)[1], i) for i in range(1, T)])
        for layout, blocks, loss in block_choices(model, x, range(200)):
            size, (start,) = layout.size, layout.starts.tolist()
            assert layout.n_text == T - size and start % size == 0
            if (size, start) not in nll:
                hidden = model(x[:, :start], lay_out(start, (start,), size))[:, start:]
                masked = torch.stack([ce(hidden[:, p], start + p) for p in range(size)])
                weight = torch.tensor([(1 + p) ** -0.5 for p in range(size)]).double()
                nll[size, start] = (masked * weight).sum() / weight.sum()
            by_hand = 0.5 * text[:T - size - 1].mean() + 0.25 * nll[size, start]
            assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert {at for at in nll if at[0] > 1} == {(size, start) for size in (6, 3) for start in range(0, T, size)}
    assert 10 < len(nll) - 12 <= T, 'and blocks of one position'


def test_what_blocks_show_to_the_sampler_head():
    """All positions of a block but its first, seen as read_block sees them; no gradient reaches the trunk by them."""
    model, x = tiny_model(), texts(3)
    for layout, blocks, loss in block_choices(model, x, range(12)):
        size, (start,) = layout.size, layout.starts.tolist()
        assert blocks.positions.tolist() == [start + p for p in range(1, size)]
        assert torch.equal(blocks.x0, x)
        with torch.no_grad():
            view, last = read_block(model, x, start, start + size)
        torch.testing.assert_close(blocks.hidden, view[:, 1:], atol=1e-10, rtol=0)
        torch.testing.assert_close(blocks.last, last[:, None].expand(-1, size - 1, -1), atol=1e-10, rtol=0)
        assert loss.requires_grad and not blocks.hidden.requires_grad and not blocks.last.requires_grad


@pytest.mark.parametrize('length, sizes', [(24, {1, 3, 6}), (20, {1, 2, 5}), (4, {1}), (3, {1}), (33, {2, 4, 8})])
def test_blocks_of_any_length(length, sizes):
    """A quarter, an eighth and a sixteenth of the sequence, at least one position; block_size=30 once stopped at
    `random_ expects 'from' to be less than 'to'`. Of one position only the trunk learns: the head does not fill it.
    """
    model, x = tiny_model(block_size=length), texts(2, length=length)
    found = set()
    for layout, blocks, loss in block_choices(model, x, range(40)):
        found.add(layout.size)
        assert loss.isfinite() and len(blocks.positions) == layout.size - 1
        assert layout.n_text + layout.n_masks == length and int(layout.starts) + layout.size <= length
    assert found == sizes


def test_blocks_of_one_position_leave_the_heads_loss_finite():
    model, x = tiny_model(), texts(2, length=4)
    batch = tiny_batch(model)
    batch.x0, batch.mask, batch.hidden = batch.x0[:, :4], batch.mask[:, :4], batch.hidden[:, :4]
    for _, blocks, _ in block_choices(model, x, range(2)):
        losses, _ = head_losses(model, batch, seed=0, sampler_rows=4, blocks=blocks)
        assert blocks.positions.numel() == 0 and losses['sampler'].isfinite()
