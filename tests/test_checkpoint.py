"""Checkpoints: self-contained, whole after a kill, never executed, never replaced by accident."""
import os
import pickle

import pytest
import torch

import checkpoint
import metrics_log
from conftest import NO_HEADS, checkpoint_in, contents_of, metrics_in, tiny_model
from errors import InputError


def test_what_a_checkpoint_says_of_its_heads(trained):
    ckpt = torch.load(trained / 'ckpt.pt', map_location='cpu', weights_only=False)
    assert ckpt['model_args'].get('add_sampler_head', False) is True
    assert ckpt['model_args'].get('start_sampler_iteration', 'N/A') == 3
    sampler_params = [k for k in ckpt['model'].keys() if 'sampler_head' in k]
    assert len(sampler_params) >= 5
    assert {'model_args', 'model', 'optimizer', 'iter_num', 'best_val_loss', 'config'} <= set(ckpt)


def test_it_loads_without_pickle_and_without_its_corpus(trained):
    model, tokenizer, saved = checkpoint.load_model(str(trained / 'ckpt.pt'))
    assert saved['iter_num'] == 12 and saved['corpus']['name'] == 'toy'
    assert tokenizer.decode(tokenizer.encode('the cat')) == 'the cat'
    assert model.sampler_head is not None and not model.training


class Bomb:
    def __reduce__(self):
        return os.system, ('touch exploded',)


def test_a_pickle_bomb_does_not_go_off(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({'model': Bomb()}, 'zip.pt')
    with open('plain.pt', 'wb') as f:
        pickle.dump(Bomb(), f, protocol=2)
    for name in ('zip.pt', 'plain.pt'):
        with pytest.raises(InputError, match='no checkpoint of this project'):
            checkpoint.load(name)
    assert not os.path.exists('exploded')


@pytest.mark.parametrize('damage', ['missing', 'truncated', 'empty', 'text', 'another dict', 'no dict', 'a folder',
                                    'other weights', 'other arguments'])
def test_damage_is_one_clear_line(trained, damage):
    path = trained / 'ckpt.pt'
    data = path.read_bytes()
    saved = checkpoint.load(str(path))
    if damage == 'missing':
        path = trained / 'nowhere.pt'
    elif damage == 'a folder':
        path = trained
    elif damage in ('truncated', 'empty', 'text'):
        path.write_bytes({'truncated': data[:len(data) // 2], 'empty': b'', 'text': b'hello world'}[damage])
    else:
        torch.save({'another dict': {'weights': torch.zeros(3)}, 'no dict': [1, 2],
                    'other weights': saved | {'model': tiny_model().state_dict()},
                    'other arguments': saved | {'model_args': {'depth': 3}}}[damage], path)
    with pytest.raises(InputError) as error:
        checkpoint.load_model(str(path))
    assert str(path) in str(error.value) and '\n' not in str(error.value)


def test_torchs_old_format_has_no_checksums_and_is_refused(trained):
    """It loaded, whatever bytes of the weights were flipped."""
    path = str(trained / 'ckpt.pt')
    torch.save(checkpoint.load(path), path, _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match='no checkpoint of this project, which is a zip file'):
        checkpoint.load_model(path)


def test_a_kill_while_saving_leaves_the_previous_one(tmp_path, monkeypatch):
    path = str(tmp_path / 'ckpt.pt')
    checkpoint.save(path, {'iter_num': 1})

    def killed(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(checkpoint.os, 'fsync', killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, {'iter_num': 2})
    assert torch.load(path, weights_only=True) == {'iter_num': 1}


def test_a_new_run_does_not_replace_a_checkpoint(trained, refused, train):
    """A forgotten --init_from=resume once overwrote days of training: now nothing changes unless it is asked for."""
    before = contents_of(trained)
    message = refused(trained, *NO_HEADS, '--max_iters=2')
    assert all(way in message for way in ('--init_from=resume', '--out_dir', '--overwrite=True'))
    assert contents_of(trained) == before
    train(trained, *NO_HEADS, '--max_iters=2', '--overwrite=True', '--eval_interval=2')
    assert checkpoint_in(trained)['iter_num'] == 2
    assert {entry['iter'] for entry in metrics_in(trained)} == {0, 1, 2}, 'metrics.jsonl begins anew with it'


def test_a_new_run_keeps_the_figures_of_one_whose_checkpoint_was_moved(trained, train):
    """They were erased without a word."""
    before = (trained / 'metrics.jsonl').read_text()
    for n in (1, 2):
        for name in ('ckpt.pt', 'ckpt_best.pt'):
            os.remove(trained / name)
        assert f"are kept as '{trained / 'metrics.jsonl'}.{n}'" in train(trained)
    assert (trained / 'metrics.jsonl.1').read_text() == before and (trained / 'metrics.jsonl.2').exists()
    train(trained, '--overwrite=True')
    assert not (trained / 'metrics.jsonl.3').exists()


def test_a_link_to_figures_stays_where_they_are_kept_aside(tmp_path):
    (tmp_path / 'elsewhere').write_text('old')
    os.symlink(tmp_path / 'elsewhere', tmp_path / 'metrics.jsonl')
    metrics_log.keep_aside(str(tmp_path / 'metrics.jsonl'))
    assert os.path.islink(tmp_path / 'metrics.jsonl') and (tmp_path / 'elsewhere.1').read_text() == 'old'


def test_weights_that_overflow_are_refused(script, trained):
    """Finite as float64, infinite as they are computed with: text of one letter, and quality nan."""
    saved = checkpoint_in(trained)
    saved['model']['wte.weight'] = saved['model']['wte.weight'].double() * 1e45
    torch.save(saved, trained / 'big.pt')
    status, _, err = script('sample_simple.py', '--out-dir', trained, '--checkpoint-name', 'big.pt')
    assert status == 2 and 'not finite' in err and err.count('\n') == 1


def test_a_new_run_beside_a_checkpoint_of_another_name_goes_on(trained, train):
    before = contents_of(trained)
    train(trained, *NO_HEADS, '--max_iters=1', '--checkpoint_name=second.pt')
    after = contents_of(trained)
    assert all(after[name] == data for name, data in before.items())
    assert set(after) - set(before) == {'second.pt', 'second_best.pt', 'second_metrics.jsonl'}


def test_an_overwritten_run_leaves_nothing_to_resume(train, trained):
    """Its ckpt.pt stayed until the new run had a better one, and --init_from=resume took it for the new run's."""
    train(trained, *NO_HEADS, '--always_save_checkpoint=False', '--eval_interval=50', '--overwrite=True',
          '--save_interval=2', '--max_iters=4')
    left = {path.name for path in trained.iterdir() if path.suffix == '.pt'}
    assert left == {'ckpt.pt'} or left == {'ckpt_last.pt'}, 'one run'


def test_the_only_best_is_not_replaced_by_the_latest(train, refused, tmp_path):
    """A resumed run wrote the latest over ckpt.pt, which was the best, and nobody had that any more."""
    train(tmp_path, *NO_HEADS, '--max_iters=6', '--always_save_checkpoint=False')
    kept = contents_of(tmp_path)
    flags = ['--init_from=resume', *NO_HEADS, '--always_save_checkpoint=True', '--max_iters=9', '--eval_interval=3']
    assert 'is the best of a run with always_save_checkpoint=False' in refused(tmp_path, *flags)
    assert contents_of(tmp_path) == kept
    train(tmp_path, *flags, '--overwrite=True', '--learning_rate=0', '--muon_learning_rate=1e-9')
    assert checkpoint_in(tmp_path, 'ckpt_best.pt')['iter_num'] == 9, 'a new best begins'


def test_a_run_that_keeps_only_the_best_from_now_on_loses_nothing(train, tmp_path):
    train(tmp_path, *NO_HEADS, '--max_iters=6')
    best = (tmp_path / 'ckpt_best.pt').read_bytes()
    train(tmp_path, '--init_from=resume', *NO_HEADS, '--always_save_checkpoint=False', '--max_iters=9')
    assert (tmp_path / 'ckpt_best.pt').read_bytes() == best


def test_a_resumed_run_says_that_it_takes_no_other_trunk(trained, train):
    """The setting was recorded and the file never read, without a word."""
    out = train(trained, '--init_from=resume', '--max_iters=14', '--trunk_checkpoint=nowhere.pt')
    assert 'trunk_checkpoint  -> nowhere.pt (which is not read)' in out


def test_frozen_heads_do_not_replace_a_better_trunk(train, trained):
    best = torch.load(trained / 'ckpt_best.pt', weights_only=True)
    best['best_val_loss'] = 0.5
    torch.save(best, trained / 'ckpt_best.pt')
    latest = torch.load(trained / 'ckpt.pt', weights_only=True)
    latest['best_val_loss'] = 0.5
    torch.save(latest, trained / 'ckpt.pt')
    before = (trained / 'ckpt_best.pt').read_bytes()
    train(trained, '--init_from=resume', '--freeze_trunk=True', '--max_iters=18')
    assert (trained / 'ckpt_best.pt').read_bytes() == before
    assert torch.load(trained / 'ckpt.pt', weights_only=True)['iter_num'] == 18
