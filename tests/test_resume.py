"""Resuming: the same run where nothing is changed, what the settings say where something is, else one line."""
import json
import os
import re

import pytest
import torch

import metrics_log
from conftest import NO_HEADS, checkpoint_in, contents_of, metrics_in, same_weights
from corpus import Corpus, prepare_text

RESUME = ['--init_from=resume', '--dropout=0.1']


def flat(optimizer):
    return json.dumps(optimizer, default=lambda t: t.tolist())


def test_resumed_equals_never_interrupted(train, half, tmp_path):
    """Stopped in stage 2 and resumed: the same weights, optimizer state and figures, bit for bit."""
    train(tmp_path / 'whole', '--dropout=0.1')
    assert 'at iteration 6' in train(half, *RESUME)
    whole, parts = checkpoint_in(tmp_path / 'whole'), checkpoint_in(half)
    assert same_weights(whole['model'], parts['model']) and flat(whole['optimizer']) == flat(parts['optimizer'])
    assert whole['best_val_loss'] == parts['best_val_loss'] and whole['start_iter'] == parts['start_iter']

    def figures(out_dir):
        return [{k: v for k, v in entry.items() if k != 'ms'} for entry in metrics_in(out_dir)]
    assert figures(tmp_path / 'whole') == figures(half)


def test_resumed_equals_never_interrupted_with_micro_steps(train, tmp_path):
    """Three micro-steps an iteration, each with noise of its own: bit for bit, across the border of stage 3."""
    flags = ['--gradient_accumulation_steps=3', '--batch_size=4', '--dropout=0.1']
    train(tmp_path / 'whole', *flags)
    train(tmp_path / 'parts', *flags, '--max_iters=5', '--start_critic_iteration=5', '--lr_decay_iters=12')
    train(tmp_path / 'parts', *flags, '--init_from=resume')
    whole, parts = (checkpoint_in(tmp_path / name) for name in ('whole', 'parts'))
    assert same_weights(whole['model'], parts['model']) and flat(whole['optimizer']) == flat(parts['optimizer'])


def test_metrics_hold_every_iteration_once_after_a_resume(train, half):
    """A killed run leaves entries beyond its checkpoint and a torn line: those iterations were written twice."""
    before = metrics_in(half)
    with open(half / 'metrics.jsonl', 'a') as f:
        for it in (6, 7, 8):
            f.write(json.dumps({'iter': it, 'loss': 99.0}) + '\n')
        f.write('{"iter": 9, "lo')
    train(half, *RESUME)
    entries = metrics_in(half)
    keys = [(entry['iter'], entry.get('split')) for entry in entries]
    assert len(set(keys)) == len(keys) and entries[:len(before)] == before
    assert sorted(it for it, split in keys if split is None) == list(range(12))
    assert all(entry.get('loss') != 99.0 for entry in entries)


@pytest.mark.parametrize('kind, message', [('folder', 'no file'), ('pipe', 'no file'), ('locked', 'Permission denied')])
def test_metrics_that_cannot_be_read_are_one_line(half, refused, kind, message, monkeypatch):
    """They were a traceback, or a wait for ever."""
    path = half / 'metrics.jsonl'
    if kind == 'locked':    # chmod hinders no root
        def no_open(name, *args, **more):
            raise PermissionError(13, 'Permission denied', name)
        monkeypatch.setattr(metrics_log, 'open', no_open, raising=False)
    else:
        path.unlink()
        (os.mkdir if kind == 'folder' else os.mkfifo)(path)
    err = refused(half, *RESUME)
    assert 'metrics.jsonl' in err and message in err


# -----------------------------------------------------------------------------
# changed settings

@pytest.mark.parametrize('max_iters', [1, 11, 12])
def test_nothing_left_to_train_is_said(trained, refused, max_iters):
    """The documented --freeze_trunk command ended at once, without a word, at the size of the config."""
    before = contents_of(trained)
    assert f'at iteration 12, so max_iters={max_iters}' in refused(trained, '--init_from=resume',
                                                                  f'--max_iters={max_iters}')
    assert contents_of(trained) == before


def test_a_frozen_trunk_waits_for_no_head(train, refused, tmp_path):
    """A resumed run once trained nothing, under the name of an empty stage, until its first head began."""
    train(tmp_path, *NO_HEADS, '--max_iters=4')
    message = refused(tmp_path, '--init_from=resume', '--freeze_trunk=True', '--start_sampler_iteration=5')
    assert 'begins at iteration 5' in message and 'wanted a start at 4' in message


@pytest.mark.parametrize('change', ['--start_sampler_iteration=5', '--start_critic_iteration=100'])
def test_a_head_that_has_begun_does_not_begin_again(trained, refused, change):
    before = contents_of(trained)
    message = refused(trained, '--init_from=resume', '--max_iters=18', '--end_critic_iteration=110', change)
    assert change.split('=')[0][2:] in message and 'has been learning since' in message
    assert contents_of(trained) == before


@pytest.mark.parametrize('start', [8, 10])
def test_a_head_that_has_not_begun_begins_where_it_is_told(train, half, tmp_path, start):
    """Stage and learning rate once went by different numbers: a loss was on at learning rate 0.

    The resumed run is the one that had the new start from the beginning, bit for bit.
    """
    changed = [f'--start_critic_iteration={start}', '--end_critic_iteration=11']
    train(tmp_path / 'whole', '--dropout=0.1', *changed)
    out = train(half, *RESUME, *changed)
    assert re.search(rf'^iter {start - 1}: loss \S+ \(main \S+ sampler \S+ blocks [^,]*\)', out, re.M)
    assert re.search(rf'^iter {start}: loss .* critic ', out, re.M)
    whole, parts = checkpoint_in(tmp_path / 'whole'), checkpoint_in(half)
    assert parts['start_iter'] == whole['start_iter'] == {'trunk': 0, 'sampler': 3, 'critic': start}
    assert same_weights(whole['model'], parts['model'])


@pytest.mark.parametrize('change', ['--seed=7', '--eval_rows=14'])
def test_a_best_is_not_compared_across_yardsticks(train, half, refused, change):
    """best_val_loss of other rows or masks once decided about ckpt_best.pt: now the run is refused, or begins anew."""
    before = contents_of(half)
    assert f'has {change[2:].split("=")[0]} ' in refused(half, *RESUME, change) and contents_of(half) == before
    saved = checkpoint_in(half)
    saved['best_val_loss'] = 0.1
    torch.save(saved, half / 'ckpt.pt')
    train(half, *RESUME, change, '--overwrite=True')
    assert checkpoint_in(half)['best_val_loss'] > 0.1 and checkpoint_in(half, 'ckpt_best.pt')['iter_num'] == 12


def test_another_text_of_the_same_vocabulary_is_refused(half, refused, toy_data, tmp_path):
    toy = Corpus('toy', str(toy_data))
    text = toy.tokenizer.decode(toy.splits['train'][::-1].tolist())
    prepare_text('toy', text, 'reversed', data_dir=str(tmp_path / 'data'))
    assert 'the text' in refused(half, *RESUME, f'--data_dir={tmp_path / "data"}')


def test_a_head_told_to_begin_in_the_past_begins_now(train, half):
    """It warms up from here, and the weight of its loss rises from here."""
    out = train(half, *RESUME, '--start_critic_iteration=4')
    assert checkpoint_in(half)['start_iter']['critic'] == 6
    total, main, sampler, _, blocks = map(float, re.search(
        r'^iter 6: loss (\S+) \(main (\S+), sampler (\S+), critic (\S+), blocks (\S+)\)', out, re.M).groups())
    assert total == pytest.approx(main + sampler + blocks, abs=2e-4), 'weight 0 at first'


def test_new_optimizer_settings_are_honoured(train, half):
    """load_state_dict put the old ones back without a word."""
    train(half, *RESUME, '--weight_decay=0.3', '--beta1=0.8', '--beta2=0.95', '--learning_rate=0.002')
    groups = {part: [o['param_groups'][0] for o in both] for part, both in checkpoint_in(half)['optimizer'].items()}
    assert set(groups) == {'trunk', 'sampler', 'critic'}
    for muon, adam in groups.values():
        assert muon['weight_decay'] == 0.3 and tuple(adam['betas']) == (0.8, 0.95)
    assert groups['trunk'][1]['lr'] == pytest.approx(groups['trunk'][0]['lr'] / 10), 'Muon has 0.02'


@pytest.mark.parametrize('change, message', [
    ('--n_layer=3', 'has n_layer=2, this run 3'), ('--add_sampler_head=False', 'has add_sampler_head=True'),
    ('--sampler_width=64', 'has sampler_width=32, this run 64'), ('--sampler_state=8', 'has sampler_state=16'),
    ('--dataset=nowhere', "no corpus 'nowhere'"),
    ('--n_head=3', 'n_head=3'), ('--attention_type=causal', 'bidirectional'), ('--nlayer=3', "'nlayer'.*'n_layer'"),
    ('--block_size=100000', 'block_size=100000'), ('--device=abacus', 'abacus'), ('--dtype=int8', 'int8'),
    ('--init_from=gpt2', 'gpt2')])
def test_bad_input_changes_nothing(trained, refused, change, message):
    before = contents_of(trained)
    assert re.search(message, refused(trained, '--init_from=resume', '--max_iters=18', change))
    assert contents_of(trained) == before


# -----------------------------------------------------------------------------
# checkpoints with something missing

@pytest.mark.parametrize('missing', ['optimizer', 'scaler', 'start_iter', 'best_val_loss', 'model', 'model_args',
                                     'iter_num', 'config', 'corpus'])
def test_a_checkpoint_that_lacks_something_is_one_line(half, refused, missing):
    """Older checkpoints gave a traceback."""
    saved = checkpoint_in(half)
    del saved[missing]
    torch.save(saved, half / 'ckpt.pt')
    before = contents_of(half)
    assert f'lacks {missing}' in refused(half, *RESUME)
    assert contents_of(half) == before


@pytest.mark.parametrize('name', ['h.0.attn.qkv.weight', 'wte.weight', 'sampler_head.gate.bias',
                                  'sampler_head.reader.weight_hh_l0', 'extra'])
def test_weights_that_are_missing_or_unknown_are_one_line(half, refused, name):
    """Trunk weights that a checkpoint lacked stayed at their random start, without a word."""
    saved = checkpoint_in(half)
    if saved['model'].pop(name, None) is None:
        saved['model'][name] = torch.zeros(3)
    torch.save(saved, half / 'ckpt.pt')
    before = contents_of(half)
    assert name in refused(half, *RESUME) and contents_of(half) == before


def test_a_resume_without_a_checkpoint(refused, tmp_path):
    assert 'no checkpoint' in refused(tmp_path, '--init_from=resume') and not list(tmp_path.iterdir())


# -----------------------------------------------------------------------------
# more than the checkpoint has

def test_a_head_is_fitted_to_a_finished_model(train, tmp_path):
    """A head that the checkpoint lacks is added and announced; with freeze_trunk the trunk stays bit for bit."""
    train(tmp_path, *NO_HEADS)
    before = checkpoint_in(tmp_path)['model']
    out = train(tmp_path, '--init_from=resume', '--max_iters=18', '--freeze_trunk=True')
    assert 'no sampler head: a fresh one is added' in out and 'no critic head: a fresh one is added' in out
    saved = checkpoint_in(tmp_path)
    assert all(torch.equal(before[k], saved['model'][k]) for k in before)
    assert saved['model']['sampler_head.out.1.weight'].abs().sum() > 0
    assert saved['start_iter'] == {'trunk': 0, 'sampler': 12, 'critic': 12}


def test_the_scalers_state_goes_on(train, tmp_path):
    """float16: the scale and the steps since it last changed are those of the run that was stopped."""
    train(tmp_path, '--dtype=float16', '--max_iters=4', '--eval_interval=4', '--start_critic_iteration=4')
    saved = checkpoint_in(tmp_path)
    assert saved['scaler']['_growth_tracker'] == 4
    saved['scaler']['scale'] = 512.0
    torch.save(saved, tmp_path / 'ckpt.pt')
    train(tmp_path, '--dtype=auto', '--init_from=resume', '--max_iters=6')
    after = checkpoint_in(tmp_path)
    assert (after['scaler']['scale'], after['scaler']['_growth_tracker']) == (512.0, 6)
    assert after['config']['dtype'] == 'float16'
