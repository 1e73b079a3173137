"""What a pass of decoding asks of a device: fixed shapes, nothing that the host must wait for or that nobody wants.

Where a plan is followed, no shape and no branch depends on what was drawn, so a pass could be one CUDA graph; a
speculative one asks once how far the text has come.
"""
import collections

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import speculative
from conftest import blank, tiny_model
from critic import CriticHead
from decoding import DecoderConfig, decode_window, default_config
from filling import HeadFiller

T = 24
WAITS = ('_local_scalar_dense', 'nonzero', 'masked_select', 'unique', '_unique2', 'unique_dim', 'item', 'is_nonzero',
         'bincount', 'equal', 'repeat_interleave.Tensor')


class Calls(TorchDispatchMode):
    """Counts operations: waits are those whose result the host must see, or whose shape depends on data."""

    def __init__(self):
        super().__init__()
        self.count = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix('aten.')
        by_mask = name.startswith('index') and len(args) > 1 and any(
            getattr(i, 'dtype', None) == torch.bool for i in (args[1] if isinstance(args[1], (list, tuple)) else ()))
        self.count['wait' if by_mask or name.startswith(WAITS) else name] += 1
        return function(*args, **kwargs or {})

    @property
    def waits(self):
        return self.count['wait']

    def __enter__(self):
        self.copies = Copies(self.count)
        self.copies.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.copies.__exit__(*error)


class Copies(TorchFunctionMode):
    """Counts what would wait for a copy between host and device, were the device another: on a CPU it costs nothing."""
    MAKE = (torch.tensor, torch.as_tensor, torch.from_numpy)
    MOVE = (torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.cpu)

    def __init__(self, count):
        super().__init__()
        self.count = count

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        moves = function in self.MOVE and (function is not torch.Tensor.to or any(
            isinstance(a, (torch.device, str, torch.Tensor)) for a in (*args[1:], *kwargs.values())))
        made = function in self.MAKE and not isinstance(args[0], torch.Tensor)
        self.count['wait'] += moves or made
        return function(*args, **kwargs)


def calls(model, config, length=T):
    with Calls() as found:
        decode_window(model, *blank(model, 3, length), config, range(3), range(length))
    return found


def test_the_count_sees_what_waits():
    x = torch.arange(4)
    for wait in (lambda: x.sum().item(), lambda: x[x > 1], lambda: (x > 1).nonzero(), lambda: x.unique(),
                 lambda: bool(x.any()), lambda: x.masked_select(x > 1), lambda: x.bincount(),
                 lambda: x.to(torch.device('cpu')), lambda: x.to(device='cpu'), lambda: x.cpu(),
                 lambda: torch.tensor([1], device=x.device), lambda: torch.as_tensor([1])):
        with Calls() as found:
            wait()
        assert found.waits
    with Calls() as found:
        x[torch.arange(2)], x[1:], torch.where(x > 1, x, 0), x.to(torch.float32), torch.full((2,), 3)
    assert not found.waits


@pytest.mark.parametrize('plan', ['blocks', 'left-to-right'])
@pytest.mark.parametrize('max_tabled', [8192, 0])
def test_a_pass_of_ancestral_decoding_waits_for_nothing(plan, max_tabled, monkeypatch):
    """However many passes there are and however long the text is, the host waits equally often: before the first pass,
    when the plan is made, and after the last one. A large vocabulary (no tables) too.
    """
    monkeypatch.setattr(HeadFiller, 'max_tabled', max_tabled)
    model = tiny_model()
    passes = (1, 3, 12) if plan == 'blocks' else (1,)
    waits = [calls(model, DecoderConfig(plan=plan, plan_passes=n, mask_ratios=()), length).waits
             for n in passes for length in (12, T)]
    assert len(set(waits)) == 1, waits


def test_filling_from_left_to_right_never_waits():
    model = tiny_model()
    plain, found = HeadFiller.fill_from_left, []

    def fill_from_left(*args):
        with Calls() as calls:
            result = plain(*args)
        found.append(calls.waits)
        return result
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeadFiller, 'fill_from_left', fill_from_left)
        config = default_config(model, 4, plan='blocks')
        decode_window(model, *blank(model), config, range(3), range(T))
    assert found == [0] * 4


def test_a_speculative_pass_waits_once(monkeypatch):
    monkeypatch.setattr(speculative, 'DRAFT', 2)    # so that no text is done in four passes
    model, waits = tiny_model(), []
    for passes in (2, 3, 4):
        config = DecoderConfig(plan='speculative', plan_passes=passes, mask_ratios=())
        with Calls() as calls:
            assert decode_window(model, *blank(model), config, range(3), range(T)).passes == passes
        waits.append(calls.waits)
    assert waits[1] - waits[0] == waits[2] - waits[1] == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('plan, passes', [('blocks', 4), ('fronts-3', 1)])
def test_a_gpu_is_never_waited_for(plan, passes):
    """From the first pass to the last; the passes before have filled what is kept, such as layouts of blocks."""
    model = tiny_model().float().cuda()
    x, free = (z.cuda() for z in blank(model))
    config = DecoderConfig(plan=plan, plan_passes=passes, mask_ratios=())
    plain = HeadFiller.fill_from_left
    expected = decode_window(model, x, free, config, range(3), range(T)).x

    def fill_from_left(*args):
        torch.cuda.set_sync_debug_mode('error')    # until the last pass is over
        return plain(*args)

    def on_pass(step):
        if step['pass'] == passes - 1:
            torch.cuda.set_sync_debug_mode('default')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeadFiller, 'fill_from_left', fill_from_left)
        try:
            decoded = decode_window(model, x, free, config, range(3), range(T), on_pass)
        finally:
            torch.cuda.set_sync_debug_mode('default')
    assert torch.equal(decoded.x, expected)


@pytest.mark.parametrize('max_tabled', [8192, 0])
def test_a_step_is_few_operations(max_tabled, monkeypatch):
    """Each further position costs a fixed number of kernels; 37 when each step gathered its neighbours."""
    monkeypatch.setattr(HeadFiller, 'max_tabled', max_tabled)
    views = ('view', '_unsafe_view', 'select', 'slice', 'split', 'unbind', 't.', 'transpose', 'unsqueeze', 'squeeze',
             'expand', 'detach', 'alias', 'permute', '_reshape_alias', 'split_with_sizes', 'scalar_tensor',
             'narrow', 'chunk', 'to.dtype')
    config = DecoderConfig(plan='left-to-right', mask_ratios=())
    kernels = [sum(n for name, n in calls(tiny_model(), config, length).count.items() if not name.startswith(views))
               for length in (12, T)]
    assert (kernels[1] - kernels[0]) / 12 <= 27, kernels


def counted(function, name, calls):
    def call(*args):
        calls[name] += 1
        return function(*args)
    return call


@pytest.mark.parametrize('wanted, rescored, judged', [
    ((), 0, 0), (['hidden'], 0, 0), (['remask_score'], 4, 4), (['p_generated'], 0, 1)])
def test_what_nobody_wants_is_not_computed(wanted, rescored, judged, monkeypatch):
    """Every pass rescored all tokens, ran the critic and copied the trunk's view for whoever wanted to count passes."""
    model, calls, steps = tiny_model(), collections.Counter(), []
    for owner, name in ((HeadFiller, 'rescore'), (CriticHead, 'forward')):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name), name, calls))
    config = DecoderConfig(plan='blocks', plan_passes=4, mask_ratios=(), order='critic')
    decode_window(model, *blank(model), config, range(3), range(24), steps.append, wanted=wanted)
    assert calls['rescore'] == rescored and calls['forward'] == judged
    told = {'pass', 'start', 'xt', 'x', 'wave', 'remasked', 'corrected', *wanted} - {'p_generated'}
    assert len(steps) == 4 and set(steps[0]) == told
