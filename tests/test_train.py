"""train.py as a user runs it: stages, logs, resume, several processes, and what it refuses."""
import json
import os
import re
import subprocess
import sys

import pytest
import torch

from conftest import ROOT, TINY


def weights(out_dir):
    return torch.load(out_dir / 'ckpt.pt', weights_only=True)


def test_three_stages_as_the_guide_prints_them(script, toy_data, tmp_path):
    status, out, err = script('train.py', *TINY, f'--data_dir={toy_data}', f'--out_dir={tmp_path}', '--critic_alpha=0.5')
    assert status == 0, err
    at = [out.index(line) for line in (
        'Initializing a new model from scratch\n', 'Using bidirectional attention\n', 'Sampler head enabled (start_iter=3)\n',
        'Critic head enabled (alpha=0.5)\n', 'number of parameters: 0.0', 'stage 1: main model\n', 'stage 2: main model + sampler\n',
        'stage 3: main model + sampler + critic\n')]
    assert at == sorted(at)
    number = r'(\d+\.\d{4})'
    for it, names in ((2, ['main']), (3, ['main', 'sampler']), (11, ['main', 'sampler', 'critic'])):
        found = re.search(rf'^iter {it}: loss {number} \({", ".join(f"{n} {number}" for n in names)}\), time \d+\.\d\dms', out, re.M)
        total, *parts = map(float, found.groups())
        weighted = sum(parts[:2]) + 0.5 * sum(parts[2:])
        assert total == pytest.approx(weighted, abs=2e-4)
    assert re.search(rf'iter 12: val NELBO {number} nats per token, {number} bits per character \(main {number}, sampler {number}, critic {number}', out)
    entries = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert {e['iter'] for e in entries} == set(range(13))


def test_schedules_by_hand_and_at_both_ends():
    sys.argv = ['train.py']
    import train
    train.add_sampler_head = train.add_critic_head = True
    assert [train.stage(it) for it in (0, 999, 1000, 2999, 3000, 10 ** 6)] == [1, 1, 2, 2, 3, 3]
    assert [train.critic_weight(it) for it in (0, 3000, 4000, 5000, 9000)] == [0, 0, 0.5, 1, 1]
    train.max_iters, train.warmup_iters = 1100, 100
    assert train.lr_factor(0) == pytest.approx(1 / 101) and train.lr_factor(100) == 1
    assert train.lr_factor(600) == pytest.approx(0.5) and train.lr_factor(1100) == train.lr_factor(5000) == 0
    assert train.lr_factor(499, begin=500) == 0 and train.lr_factor(600, begin=500) == 1, 'a head warms up when it begins'
    assert train.lr_factor(850, begin=500) == pytest.approx(0.5) and train.lr_factor(1100, begin=500) == 0


def test_resumed_equals_never_interrupted(script, toy_data, tmp_path):
    """Stopped in stage 2 and resumed: the same weights and optimizer state, bit for bit."""
    base = [*TINY, f'--data_dir={toy_data}', '--dropout=0.1']
    script('train.py', *base, f'--out_dir={tmp_path / "whole"}')
    script('train.py', *base, f'--out_dir={tmp_path / "parts"}', '--max_iters=6', '--lr_decay_iters=12')
    status, out, err = script('train.py', *base, f'--out_dir={tmp_path / "parts"}', '--init_from=resume')
    assert status == 0, err
    assert 'at iteration 6' in out
    whole, parts = weights(tmp_path / 'whole'), weights(tmp_path / 'parts')
    assert all(torch.equal(whole['model'][k], parts['model'][k]) for k in whole['model'])
    flat = lambda o: json.dumps(o, default=lambda t: t.tolist())
    assert flat(whole['optimizer']) == flat(parts['optimizer']) and whole['best_val_loss'] == parts['best_val_loss']


def test_a_head_is_fitted_to_a_finished_model(script, toy_data, tmp_path):
    """A head that the checkpoint lacks is added and announced; with freeze_trunk the trunk stays bit for bit."""
    base = [*TINY, f'--data_dir={toy_data}', f'--out_dir={tmp_path}']
    script('train.py', *base, '--add_sampler_head=False', '--add_critic_head=False')
    before = weights(tmp_path)['model']
    status, out, err = script('train.py', *base, '--init_from=resume', '--max_iters=18', '--freeze_trunk=True')
    assert status == 0, err
    assert 'no sampler head: a fresh one is added' in out and 'no critic head: a fresh one is added' in out
    after = weights(tmp_path)['model']
    assert all(torch.equal(before[k], after[k]) for k in before) and any('sampler_head' in k for k in after)
    assert after['sampler_head.out.weight'].abs().sum() > 0


def test_best_checkpoint_goes_by_the_bound_alone(script, toy_data, tmp_path):
    """Stage 2 and 3 add losses; best_val_loss is still the validation NELBO."""
    script('train.py', *TINY, f'--data_dir={toy_data}', f'--out_dir={tmp_path}')
    bounds = [e['nelbo'] for e in map(json.loads, (tmp_path / 'metrics.jsonl').read_text().splitlines()) if e.get('split') == 'val']
    assert weights(tmp_path)['best_val_loss'] == min(bounds)


@pytest.mark.parametrize('change, message', [
    ('--n_layer=3', 'has n_layer=2, this run 3'), ('--add_sampler_head=False', 'has add_sampler_head=True'),
    ('--dataset=nowhere', "no corpus 'nowhere'"), ('--n_head=3', 'n_head=3'), ('--attention_type=causal', 'bidirectional'),
    ('--nlayer=3', "'nlayer'.*'n_layer'"), ('--block_size=100000', 'block_size=100000'), ('--device=abacus', 'abacus'),
    ('--dtype=int8', 'int8'), ('--init_from=gpt2', 'gpt2')])
def test_bad_input_changes_nothing(script, trained, toy_data, change, message):
    before = {p: p.read_bytes() for p in trained.iterdir()}
    status, _, err = script('train.py', *TINY, f'--data_dir={toy_data}', f'--out_dir={trained}', '--init_from=resume', change)
    assert status == 2 and re.search(message, err) and err.count('\n') == 1, err
    assert {p: p.read_bytes() for p in trained.iterdir()} == before


def test_an_out_dir_that_cannot_be_written(script, toy_data):
    status, _, err = script('train.py', *TINY, f'--data_dir={toy_data}', '--out_dir=/dev/null/x')
    assert status == 2 and "cannot write out_dir '/dev/null/x'" in err and err.count('\n') == 1


def test_a_resume_without_a_checkpoint(script, toy_data, tmp_path):
    status, _, err = script('train.py', *TINY, f'--data_dir={toy_data}', f'--out_dir={tmp_path}', '--init_from=resume')
    assert status == 2 and 'no checkpoint' in err and not list(tmp_path.iterdir())


def test_one_batch_overfits(script, tmp_path):
    """A corpus hardly longer than its rows is learned by heart: the masked loss falls below a quarter of its start."""
    from corpus import prepare_text
    text = 'a small text that a small model can learn by heart. '
    prepare_text('one', text[:40] + text[:36], 'test', data_dir=str(tmp_path))
    import numpy as np
    ids = np.fromfile(tmp_path / 'one' / 'train.bin', np.uint16)[:33]
    for split in ('train', 'val'):
        ids.tofile(tmp_path / 'one' / f'{split}.bin')
    meta = json.loads((tmp_path / 'one' / 'meta.json').read_text())
    (tmp_path / 'one' / 'meta.json').write_text(json.dumps(meta | {'train_tokens': 33, 'val_tokens': 33}))
    status, out, err = script('train.py', *TINY, '--dataset=one', f'--data_dir={tmp_path}', f'--out_dir={tmp_path / "out"}', '--max_iters=300',
                              '--eval_interval=300', '--n_embd=64', '--log_interval=50')
    assert status == 0, err
    bounds = [float(b) for b in re.findall(r'val NELBO (\S+) nats', out)]
    assert bounds[-1] < bounds[0] / 4


def test_two_processes_agree(toy_data, tmp_path):
    """torchrun with two processes trains, and both work on the same corpus."""
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'train.py', *TINY,
                           '--gradient_accumulation_steps=2', f'--data_dir={toy_data}', f'--out_dir={tmp_path}'],
                          cwd=ROOT, capture_output=True, text=True, env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr
    assert '2 processes' in done.stdout and done.stdout.count('iter 12: val NELBO') == 1
    assert 'is not' not in done.stdout and weights(tmp_path)['iter_num'] == 12


def test_byte_pairs_end_to_end(script, toy_data, tmp_path, monkeypatch):
    """Byte pairs, here single bytes, for GPT-2's table needs a network: prepare, train, sample."""
    import tiktoken
    import corpus
    ranks = {bytes([i]): i for i in range(256)}
    encoding = tiktoken.Encoding('bytes', pat_str=r'.|\n', mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(corpus, 'gpt2_encoding', lambda: encoding)
    monkeypatch.setattr(corpus, 'BPE_SIZE', 3000)    # most ids never occur, as with GPT-2's 50,257
    corpus.prepare_text('bpe', 'déjà vu and a cat sat on the mat.\n' * 40, 'test', kind='gpt2', data_dir=str(tmp_path))
    status, out, err = script('train.py', *TINY, '--dataset=bpe', f'--data_dir={tmp_path}', f'--out_dir={tmp_path / "out"}', '--max_iters=7')
    assert status == 0, err
    nats, bits = map(float, re.search(r'iter 7: val NELBO (\S+) nats per token, (\S+) bits per character', out).groups())
    assert bits == pytest.approx(nats / 0.6931472 * 36 / 34, rel=0.02), '36 bytes for 34 characters'
    monkeypatch.setattr(encoding, 'decode', lambda ids: ''.join(f'<{i}>' for i in ids))    # ids beyond the bytes have no text
    status, out, err = script('sample_simple.py', '--out-dir', tmp_path / 'out', '--iterations', 2, '--num-samples', 1, '--seed-text', 'cat')
    assert status == 0, err
    assert '<99><97><116>' in out
