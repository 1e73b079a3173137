"""The key-value cache: reading on from what was read changes nothing but the work."""
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cache import CachedTrunk
from conftest import blank, read_block, tiny_model
from decoding import DecoderConfig, decode_window
from likelihood import log_likelihood
from plans import make_plan

T = 24


def texts(B=3, seed=0):
    return torch.randint(0, 11, (B, T), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize('dtype, bound', [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize('attention_type', ['causal', 'bidirectional'])
@pytest.mark.parametrize('cuts', [[24], [1, 2, 3, 10, 24], [9, 9, 10, 23, 24], [*range(1, 25)]])
def test_text_read_piece_by_piece_has_the_states_of_text_read_at_once(cuts, attention_type, dtype, bound):
    model, x = tiny_model(attention_type=attention_type).to(dtype), texts()
    whole = CachedTrunk(model, 3, T).read(x)
    reader = CachedTrunk(model, 3, T)
    pieces = [reader.read(x[:, start:end]) for start, end in zip([0, *cuts], cuts) if end > start]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=bound, rtol=bound)
    if attention_type == 'causal':
        torch.testing.assert_close(whole, model(x), atol=bound, rtol=bound)


@torch.no_grad()
@pytest.mark.parametrize('dtype, bound', [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize('blocks', [[(0, 24)], [(0, 6), (6, 12), (12, 18), (18, 24)], [(3, 4), (4, 5), (9, 24)],
                                    [(0, 1), (5, 9), (5, 9), (23, 24)]])
def test_blocks_are_seen_as_by_a_whole_forward_pass(blocks, dtype, bound):
    """Whatever was read before, masks leave nothing behind, and nothing that comes later is seen."""
    model, x = tiny_model().to(dtype), texts()
    reader = CachedTrunk(model, 3, T)
    for start, end in blocks:
        given = x.clone()
        given[:, start:] = model.mask_id
        for found, plain in zip(reader.read_block(given, start, end), read_block(model, x, start, end)):
            torch.testing.assert_close(found, plain, atol=bound, rtol=bound)


class Uncached:
    """The plain reference: reads everything again in every pass."""

    def __init__(self, model, B, length):
        self.model = model

    def read_block(self, x, start, end):
        return read_block(self.model, x, start, end)


@pytest.mark.parametrize('passes, n_given', [(1, 5), (2, 0), (3, 5), (7, 1), (24, 0)])
def test_decoding_and_likelihood_are_those_without_cache(passes, n_given, monkeypatch):
    """Token for token in float64; where revising follows, too."""
    model = tiny_model()
    x, free = blank(model)
    x[:, :n_given], free[:, :n_given] = texts()[:, :n_given], False
    plan = make_plan('blocks', T, passes)

    def both():
        config = DecoderConfig(plan='blocks', plan_passes=passes, mask_ratios=(0.3,), order='critic')
        return decode_window(model, x, free, config, range(3), range(T), wanted=['p_generated']), \
            log_likelihood(model, texts(), plan)
    decoded, likelihood = both()
    monkeypatch.setattr('model.CachedTrunk', Uncached)
    plain, plain_likelihood = both()
    assert torch.equal(decoded.x, plain.x)
    torch.testing.assert_close(decoded.p_generated, plain.p_generated)
    torch.testing.assert_close(likelihood, plain_likelihood, atol=1e-5, rtol=0)    # logits are float32


def trunk_flops(model, passes):
    reader, x = CachedTrunk(model, 3, T), texts()
    with FlopCounterMode(display=False) as counter:
        for start in range(0, T, T // passes):
            reader.read_block(x, start, start + T // passes)
    return counter.get_total_flops()


def test_many_passes_cost_less_than_two():
    """Every token is read once as text and once as a mask, in however many passes."""
    model = tiny_model()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(texts())
    assert all(trunk_flops(model, passes) <= 2 * counter.get_total_flops() for passes in (2, 6, 12, 24))
