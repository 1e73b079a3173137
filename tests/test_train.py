"""train.py as a user runs it: stages, logs, schedules, the checkpoints it keeps, its noise, and what it refuses."""
import json
import re
import sys
import time
import types
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import objectives
from batches import Share
from conftest import NO_HEADS, TINY, checkpoint_in, contents_of, metrics_in, same_weights


def test_a_head_that_will_not_learn_is_said(train, tmp_path):
    """The critic of a short run had a stage, a loss in the log and nothing learned."""
    out = train(tmp_path, '--critic_interval=10', '--max_iters=9')
    assert 'note: the critic head learns from iteration 10 on, which max_iters=9 does not reach' in out
    assert out.count('does not reach') == 1


def test_three_stages(trained_once):
    out_dir, out = trained_once
    at = [out.index(line) for line in (
        'Initializing a new model from scratch\n', 'Using bidirectional attention\n',
        'Sampler head enabled (start_iter=3)\n', 'Critic head enabled (alpha=1.0)\n', 'number of parameters: 0.0',
        'stage 1: main model\n', 'stage 2: main model + sampler\n', 'stage 3: main model + sampler + critic\n')]
    assert at == sorted(at)
    assert 'global batch: 8 sequences = 1 process x 1 micro-step x 8 sequences\n' in out
    number = r'(\d+\.\d{4})'
    assert re.search(rf'iter 12: val NELBO {number} nats per token, {number} bits per character '
                     rf'\(main {number}, sampler {number}, one pass nll {number}, critic {number}', out)
    entries = metrics_in(out_dir)
    assert [e['iter'] for e in entries if 'split' not in e] == list(range(12))
    assert [(e['iter'], e['split']) for e in entries if 'split' in e] == [
        (it, split) for it in (0, 6, 12) for split in ('train', 'val')]


def test_the_loss_is_the_weighted_sum_of_its_parts(train, tmp_path):
    out = train(tmp_path, '--critic_alpha=0.5', '--end_critic_iteration=8')
    number = r'(\d+\.\d{4})'
    for it, critic in ((2, None), (3, None), (6, 0), (7, 0.25), (8, 0.5), (11, 0.5)):
        heads = ({'sampler': 1} if it > 2 else {}) | ({'critic': critic} if it > 5 else {})
        weights = {'main': 1, **heads, 'blocks': 1}
        parts = ', '.join(f'{name} {number}' for name in weights)
        found = re.search(rf'^iter {it}: loss {number} \({parts}\), time \d+\.\d\dms', out, re.M)
        total, *values = map(float, found.groups())
        assert total == pytest.approx(sum(w * v for w, v in zip(weights.values(), values)), abs=2e-4)


def test_schedules_by_hand_and_at_both_ends():
    import schedules
    import train
    config = SimpleNamespace(**train.settings | dict(add_sampler_head=True, add_critic_head=True))
    start = {'sampler': 1000, 'critic': 3000}
    assert [schedules.stage(config, start, it) for it in (0, 999, 1000, 2999, 3000, 10 ** 6)] == [1, 1, 2, 2, 3, 3]
    assert [schedules.critic_weight(config, start, it) for it in (0, 3000, 4000, 5000, 9000)] == [0, 0, 0.5, 1, 1]
    config.max_iters, config.warmup_iters = 1100, 100

    def lr_factor(it, start=0):
        return schedules.lr_factor(config, it, start)
    assert lr_factor(0) == pytest.approx(1 / 101) and lr_factor(100) == 1
    assert lr_factor(600) == pytest.approx(0.5) and lr_factor(1100) == lr_factor(5000) == 0
    assert lr_factor(499, 500) == 0 and lr_factor(600, 500) == 1, 'a head warms up when it begins'
    assert lr_factor(850, 500) == pytest.approx(0.5) and lr_factor(1100, 500) == 0


# -----------------------------------------------------------------------------
# checkpoints

def test_best_checkpoint_goes_by_the_bound_alone(trained_once):
    """Stages 2 and 3 add losses; best_val_loss is still the validation NELBO."""
    bounds = [e['nelbo'] for e in metrics_in(trained_once[0]) if e.get('split') == 'val']
    assert checkpoint_in(trained_once[0])['best_val_loss'] == min(bounds)


@pytest.fixture
def best_at_6(monkeypatch):
    """Validation finds the model at iteration 6 better than the one at 12, whatever they are."""
    figures = iter([5.0, 4.0, 5.0, 2.0, 5.0, 3.0])    # train and val at iterations 0, 6, 12
    monkeypatch.setattr(objectives.DiffusionObjective, 'validate', lambda *args: {'nelbo': next(figures)})


def test_the_best_checkpoint_holds_the_weights_of_the_best_evaluation(train, half_once, tmp_path, best_at_6):
    """No test had ever opened ckpt_best.pt: here it is the model that stopped at iteration 6, bit for bit."""
    train(tmp_path, '--dropout=0.1')
    best, latest = checkpoint_in(tmp_path, 'ckpt_best.pt'), checkpoint_in(tmp_path)
    assert (best['iter_num'], best['best_val_loss']) == (6, 2.0)
    assert (latest['iter_num'], latest['best_val_loss']) == (12, 2.0)
    assert same_weights(best['model'], checkpoint_in(half_once)['model'])
    assert not same_weights(best['model'], latest['model'])


def test_without_always_save_checkpoint_the_best_alone_is_kept(train, half_once, tmp_path, best_at_6):
    train(tmp_path, '--dropout=0.1', '--always_save_checkpoint=False')
    assert sorted(contents_of(tmp_path)) == ['ckpt.pt', 'metrics.jsonl']
    assert checkpoint_in(tmp_path)['iter_num'] == 6
    assert same_weights(checkpoint_in(tmp_path)['model'], checkpoint_in(half_once)['model'])


def test_eval_only_leaves_no_trace(train, trained, tmp_path):
    """With a checkpoint at its last iteration, and in a folder that does not exist: figures, and nothing written."""
    before, found = contents_of(trained), metrics_in(trained)[-1]
    out = train(trained, '--init_from=resume', '--eval_only=True')
    assert f'iter 12: val NELBO {found["nelbo"]:.4f} ' in out and 'saved' not in out
    assert contents_of(trained) == before
    out = train(trained, '--init_from=resume', '--eval_only=True', '--max_iters=5')
    assert 'iter 12: val NELBO' in out, 'whatever max_iters is'
    out = train(tmp_path / 'nowhere', '--eval_only=True')
    assert 'iter 0: val NELBO' in out and 'iter 0: loss' not in out and not (tmp_path / 'nowhere').exists()


# -----------------------------------------------------------------------------
# noise

def test_every_iteration_has_noise_of_its_own(train, tmp_path, monkeypatch):
    """And every micro-step dropout of its own; the rest belongs to the global batch (test_batches.py)."""
    seen, plain = [], objectives.DiffusionObjective.forward
    monkeypatch.setattr(objectives.DiffusionObjective, 'validate', lambda *args: {'nelbo': 1.0})
    monkeypatch.setattr(objectives.DiffusionObjective, 'forward', lambda self, x0, seed, share, *rows: seen.append(
        (seed, torch.initial_seed(), share, rows)) or plain(self, x0, seed, share, *rows))
    train(tmp_path, '--max_iters=3', '--start_sampler_iteration=0', '--start_critic_iteration=0', '--eval_interval=100',
          '--gradient_accumulation_steps=4', '--sampler_rows=3', '--critic_rows=2')
    assert len(seen) == 12
    seeds, dropout, shares, rows = map(list, zip(*seen))
    assert len(set(seeds)) == 3 and all(len(set(seeds[i:i + 4])) == 1 for i in (0, 4, 8)) and len(set(dropout)) == 12
    assert shares[:4] == [Share(32, micro, 4) for micro in range(4)] and set(rows) == {(12, 8, 16)}


def test_the_critic_learns_in_every_so_many_iterations(train, tmp_path):
    """Log lines in between show what is learned then; its moments count its own steps."""
    out = train(tmp_path, '--critic_interval=4', '--max_iters=13', '--start_critic_iteration=5',
                '--end_critic_iteration=9')
    learned = {it: re.findall(r'(main|sampler|critic|blocks) \d', line) for it, line in
               re.findall(r'^iter (\d+): loss (.*)$', out, re.M)}
    both = ['main', 'sampler', 'blocks']
    assert [learned[str(it)] for it in (2, 3, 4, 5, 8, 11, 12)] == [
        both[::2], both, both, both, [*both[:2], 'critic', 'blocks'], both, [*both[:2], 'critic', 'blocks']]
    steps = {part: {int(state['step']) for state in groups[1]['state'].values()}
             for part, groups in checkpoint_in(tmp_path)['optimizer'].items()}
    assert steps == {'trunk': {13}, 'sampler': {10}, 'critic': {2}}


# -----------------------------------------------------------------------------
# kinds of run

def test_bfloat16_trains_every_stage(train, tmp_path):
    """Every loss and every weight is a number, each part has moved, and the loss falls."""
    train(tmp_path, '--dtype=bfloat16')
    entries, saved = metrics_in(tmp_path), checkpoint_in(tmp_path)
    assert all(np.isfinite(value) for entry in entries for value in entry.values() if isinstance(value, float))
    assert all(w.dtype == torch.float32 and w.isfinite().all() for w in saved['model'].values())
    assert saved['config']['dtype'] == 'bfloat16' and not saved['scaler']
    first, last = (next(e for e in entries if e['iter'] == it and 'split' not in e) for it in (0, 11))
    assert last['main'] < first['main'] - 0.1 and {'main', 'sampler', 'critic'} <= set(last)
    assert all(saved['model'][name].abs().sum() > 0 for name in ('sampler_head.out.1.weight', 'critic_head.out.weight'))


def test_a_run_that_never_gets_better_says_that_it_left_nothing(train, tmp_path, monkeypatch):
    """With always_save_checkpoint=False no checkpoint is written then, which went unsaid."""
    values = iter([1.0, 1.0, 2.0, 2.0, 3.0, 3.0])    # of both splits
    monkeypatch.setattr(objectives.DiffusionObjective, 'validate', lambda *args: {'nelbo': next(values)})
    out = train(tmp_path, *NO_HEADS, '--always_save_checkpoint=False', '--save_interval=0')
    assert 'no evaluation was better than the first: there is no checkpoint' in out
    assert not list(tmp_path.glob('*.pt'))


def test_float16_trains_every_stage(train, tmp_path):
    """Scaled losses: every part learns, every loss is a number, and the scaler's state is in the checkpoint."""
    train(tmp_path, '--dtype=float16')
    entries = metrics_in(tmp_path)
    assert all(np.isfinite(value) for entry in entries for value in entry.values() if isinstance(value, float))
    assert {'main', 'sampler', 'critic'} <= set(entries[-3])
    first, last = (next(e for e in entries if e['iter'] == it and 'split' not in e)['main'] for it in (0, 11))
    assert last < first - 0.1
    saved = checkpoint_in(tmp_path)
    assert saved['scaler']['scale'] > 0 and saved['scaler']['_growth_tracker'] == 12, 'twelve steps, none skipped'
    assert saved['model']['sampler_head.out.1.weight'].abs().sum() > 0
    steps = [state['step'] for part in ('trunk', 'sampler', 'critic')
             for state in saved['optimizer'][part][1]['state'].values()]
    assert set(map(float, steps)) == {12.0, 9.0, 6.0}


class FakeWandb(types.ModuleType):
    """As wandb does, a later figure of the same step and key replaces an earlier one."""

    def __init__(self):
        super().__init__('wandb')
        self.figures, self.started = {}, {}

    def init(self, **settings):
        self.started = settings

    def log(self, figures, step):
        for key, value in figures.items():
            assert (step, key) not in self.figures, f'{key} of step {step} is overwritten'
            self.figures[step, key] = value

    def finish(self):
        self.finished = True


def test_figures_on_wandb_do_not_collide(train, tmp_path, monkeypatch):
    """Batch, training split and validation split wrote to the same keys at the same step: one of three survived."""
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, 'wandb', wandb)
    train(tmp_path, '--wandb_log=True', '--wandb_run_name=mine')
    assert wandb.finished and wandb.started['name'] == 'mine' and wandb.started['config']['n_layer'] == 2
    entries = metrics_in(tmp_path)
    assert len(wandb.figures) == sum(len(set(entry) - {'iter', 'split'}) for entry in entries)
    val = next(entry for entry in entries if entry['iter'] == 6 and entry.get('split') == 'val')
    assert wandb.figures[6, 'val/nelbo'] == val['nelbo'] != wandb.figures[6, 'train/nelbo']


def test_the_autoregressive_config(script, toy_data, tmp_path):
    """config/train_char_ar.py as it is, but tiny: a causal model, its best checkpoint alone."""
    status, out, err = script('train.py', 'config/train_char_ar.py', *TINY[1:], *NO_HEADS, f'--data_dir={toy_data}',
                              f'--out_dir={tmp_path}')
    assert status == 0, err
    assert 'Using causal attention' in out and re.search(r'iter 12: val NLL \d', out)
    assert checkpoint_in(tmp_path)['model_args']['attention_type'] == 'causal'
    assert not (tmp_path / 'ckpt_best.pt').exists()
    status, _, err = script('sample_simple.py', '--out-dir', tmp_path)
    assert status == 2 and 'evaluate.py' in err and err.count('\n') == 1


def test_one_batch_overfits(script, tmp_path):
    """A corpus hardly longer than its sequences is learned by heart: the bound falls below a quarter of its start."""
    from corpus import prepare_text
    text = 'a small text that a small model can learn by heart. '
    prepare_text('one', text[:40] + text[:36], 'test', data_dir=str(tmp_path))
    ids = np.fromfile(tmp_path / 'one' / 'train.bin', np.uint16)[:33]
    for split in ('train', 'val'):
        ids.tofile(tmp_path / 'one' / f'{split}.bin')
    meta = json.loads((tmp_path / 'one' / 'meta.json').read_text())
    (tmp_path / 'one' / 'meta.json').write_text(json.dumps(
        {name: value for name, value in meta.items() if 'crc32' not in name} | {'train_tokens': 33, 'val_tokens': 33}))
    status, out, err = script('train.py', *TINY, *NO_HEADS, '--dataset=one', f'--data_dir={tmp_path}',
                              f'--out_dir={tmp_path / "out"}', '--max_iters=200', '--eval_interval=200',
                              '--n_embd=64', '--log_interval=50')
    assert status == 0, err
    bounds = [float(b) for b in re.findall(r'val NELBO (\S+) nats', out)]
    assert bounds[-1] < bounds[0] / 4


def test_an_out_dir_that_cannot_be_written(refused):
    assert "cannot write out_dir '/dev/null/x'" in refused('/dev/null/x')


def test_log_lines_tell_the_time_of_training_alone(train, tmp_path, monkeypatch):
    """A line straight after a save told the time of one iteration, of which the ten before it were said to be."""
    real, skipped = time.time, [0.0]
    monkeypatch.setattr(time, 'time', lambda: real() + skipped[0])
    plain = objectives.DiffusionObjective.validate

    def validate(*args):
        skipped[0] += 1000    # an evaluation that takes long
        return plain(*args)
    monkeypatch.setattr(objectives.DiffusionObjective, 'validate', validate)
    train(tmp_path, *NO_HEADS, '--log_interval=4', '--save_interval=3')
    lines = [entry for entry in metrics_in(tmp_path) if 'ms' in entry]
    assert [entry['iter'] for entry in lines] == [0, 4, 8] and all(entry['ms'] < 50_000 for entry in lines)
