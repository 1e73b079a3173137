"""NaN and infinity stop a run before anything is saved, and are named; float16's overflows are the scaler's affair."""
import json
import re

import pytest
import torch

import checkpoint
import objectives
from conftest import NO_HEADS, TINY, checkpoint_in, contents_of, metrics_in
from errors import InputError
from finite import Watch, check_scaler


def test_the_first_of_several_is_named():
    watch = Watch()
    fine, bad = torch.tensor(1.0), torch.tensor(float('inf'))
    for it, main, gradient in ((0, fine, fine), (1, fine, bad), (2, bad, bad), (3, fine, fine)):
        watch.note(it, {'the main loss': main, 'the gradient of the trunk': gradient})
    with pytest.raises(InputError, match="iteration 1, stage 7: the gradient of the trunk is not finite; nothing is "
                                         "saved, the last good checkpoint is 'x'"):
        watch.check(lambda it: 6 + it, "'x'")
    Watch().check(None, '')


def poisoned(monkeypatch, name, at, times=1):
    """Losses of a name are NaN from the at-th micro-step on."""
    plain, calls = objectives.DiffusionObjective.forward, []

    def forward(self, *args):
        losses = plain(self, *args)
        calls.append(1)
        if at <= len(calls) < at + times:
            losses[name] = losses[name] * float('nan')
        return losses
    monkeypatch.setattr(objectives.DiffusionObjective, 'forward', forward)


@pytest.mark.parametrize('name, stage, log_interval', [('main', 3, 100), ('sampler', 3, 1), ('critic', 3, 100)])
def test_a_bad_loss_ends_the_run_before_it_is_saved(script, toy_data, tmp_path, monkeypatch, name, stage, log_interval):
    """A run once trained NaN to the end, saved it and reported a critic AUC of 1."""
    poisoned(monkeypatch, name, at=9)
    status, out, err = script('train.py', *TINY, f'--data_dir={toy_data}', f'--out_dir={tmp_path}',
                              f'--log_interval={log_interval}')
    assert status == 2 and err.count('\n') == 1
    assert f'iteration 8, stage {stage}: the {name} loss is not finite' in err
    assert re.search(r"last good checkpoint is '.*ckpt.pt' of iteration 6", err)
    assert checkpoint_in(tmp_path)['iter_num'] == 6 and 'iter 12' not in out


def test_one_bad_batch_in_float16_is_skipped(train, tmp_path, monkeypatch):
    poisoned(monkeypatch, 'main', at=2)
    train(tmp_path, *NO_HEADS, '--dtype=float16', '--max_iters=4', '--eval_interval=4')
    saved = checkpoint_in(tmp_path)
    assert saved['scaler']['scale'] == 2 ** 15 and all(w.isfinite().all() for w in saved['model'].values())


def test_a_loss_scale_that_falls_for_ever_is_named():
    scaler = torch.amp.GradScaler('cpu', init_scale=2.0 ** -30)
    scaler.scale(torch.ones(()))
    with pytest.raises(InputError, match='loss scale of float16'):
        check_scaler(scaler, 5, '')


def test_weights_that_are_not_finite_are_neither_written_nor_loaded(half, refused, tmp_path):
    saved = checkpoint_in(half)
    saved['model']['wte.weight'][0, 0] = float('nan')
    with pytest.raises(InputError, match='model.wte.weight'):
        checkpoint.save(str(tmp_path / 'new.pt'), saved)
    assert not (tmp_path / 'new.pt').exists()
    torch.save(saved, half / 'ckpt.pt')
    with pytest.raises(InputError, match='wte.weight'):
        checkpoint.load_model(str(half / 'ckpt.pt'))
    before = contents_of(half)
    assert 'wte.weight' in refused(half, '--init_from=resume') and contents_of(half) == before


def test_metrics_are_strict_json(train, tmp_path, monkeypatch):
    """The rank correlation of constant scores is no number: it is null, which plot.py leaves out."""
    monkeypatch.setattr(objectives.DiffusionObjective, 'validate',
                        lambda *args: {'nelbo': 1.0, 'nelbo_error': float('nan')})
    train(tmp_path, *NO_HEADS, '--max_iters=2')

    def strict(name):
        raise AssertionError(name)
    for line in (tmp_path / 'metrics.jsonl').read_text().splitlines():
        json.loads(line, parse_constant=strict)
    assert metrics_in(tmp_path)[0]['nelbo_error'] is None
