"""The benchmark at a tiny size: every row and ratio is there, pairs are interleaved, nanoGPT's model.py fits in."""
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import bench
import time_to_loss
import timing
from conftest import NO_HEADS, tiny_model
from decoding import default_config, generate

SIZE = ['--n_layer=1', '--n_head=1', '--n_embd=16', '--block_size=16', '--batch_size=4', '--sampler_rows=4',
        '--block_rows=2', '--critic_rows=1', '--device=cpu', '--dtype=float32', '--sampler_width=8',
        '--sampler_state=8', '--sampler_context=2']
NANOGPT = '''
from dataclasses import dataclass
import torch
import torch.nn as nn
import torch.nn.functional as F

@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)

    def forward(self, idx, targets):
        logits = F.linear(self.wte(idx), self.wte.weight)
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        print('using fused AdamW')
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)
'''


@pytest.mark.parametrize('rounds', [-5, 0])
def test_rounds_that_cannot_be_are_one_line(script, tmp_path, rounds):
    """-5 was an IndexError."""
    status, _, err = script('bench.py', *SIZE, '--quick', f'--rounds={rounds}', '--out-dir', tmp_path)
    assert status == 2 and err == f'error: --rounds is {rounds}, wanted 1 to 10000\n'


def test_one_command_writes_every_ratio(script, tmp_path):
    (tmp_path / 'model.py').write_text(NANOGPT)
    status, out, err = script('bench.py', '--quick', '--rounds', 1, '--nanogpt', tmp_path, '--out-dir', tmp_path, *SIZE)
    assert status == 0, err
    result = json.loads((tmp_path / 'bench.json').read_text())
    assert set(result['ratios']) == {*bench.RATIOS, 'wavefront_over_naive_15_memory_batch32'}
    missing = {name for name, value in result['ratios'].items() if value is None}
    assert missing == {'revising_over_naive_15_batch32'}, 'too slow for --quick'
    assert 'corrected 4, batch 1' in result['rows'] and 'corrected 4, batch 32' not in result['rows']
    assert all(value >= 0 for name, value in result['ratios'].items() if name not in missing)
    rows = result['rows']
    steps = {'total', 'forward', 'backward', 'optimizer'}
    assert set(rows['stage 3']['seconds']) == steps | {'batch'} and set(rows['nanoGPT']['seconds']) == steps
    assert 1 < rows['wavefront 4, batch 32']['passes'] <= 4 and rows['wavefront 4, batch 32']['steps'] >= 16
    assert rows['naive 15, batch 1']['steps'] == 15 and rows['autoregressive, batch 1']['passes'] == 15
    assert set(rows['wavefront 15, batch 1']['seconds']) == {'total', 'trunk', 'waves', 'checking', 'sampling'}
    assert set(rows['autoregressive, batch 1']['seconds']) == {'total', 'trunk', 'sampling'}
    assert set(rows['corrected 4, batch 1']['seconds']) == {'total', 'trunk', 'waves', 'corrections', 'remasking',
                                                            'sampling'}
    assert all(0 < n for figures in rows.values() for n in figures['seconds'].values())
    assert 'stage 1' in out and 'few_over_naive_4_batch32' in out and 'torch' in out
    assert 'of a matrix product\'s speed' in out and 'peak memory of naive 15, batch 32' in out
    assert 'using fused' not in out


def test_rows_run_in_turn_and_warm_up_is_left_out():
    order = []
    rows = {name: lambda clock, name=name: order.append(name) for name in 'abc'}
    found = timing.in_turn(rows, 2, 'cpu')
    assert order == [*'abc', *'cba', *'abc'] and all(len(found[name]) == 2 for name in 'abc')


def test_ratios_are_taken_within_rounds():
    rounds = {'a': [{'total': 2.0}, {'total': 40.0}, {'total': 6.0}],
              'b': [{'total': 1.0}, {'total': 10.0}, {'total': 3.0}]}
    assert timing.ratio(rounds, 'a', 'b') == 2.0 and timing.ratio(rounds, 'a', 'c') is None
    assert timing.medians(rounds['a']) == {'total': 6.0}


def test_timing_parts_changes_no_token():
    model, clock = tiny_model(), timing.Clock('cpu')
    x = torch.full((2, 24), model.mask_id)

    def decoded():
        return generate(model, x, x == model.mask_id, default_config(model, 3), range(2)).x
    plain = decoded()
    with bench.parts_timed(clock):
        assert torch.equal(decoded(), plain)
    assert set(clock.seconds) == {'trunk', 'waves', 'checking', 'sampling'}
    assert torch.equal(decoded(), plain) and bench.HeadFiller.fill.__name__ == 'fill'


def test_what_a_part_calls_of_another_is_counted_once(monkeypatch):
    """Waves of 3 seconds, of which sampling takes one, and corrections of as much."""
    now = [0.0]
    monkeypatch.setattr(timing.time, 'perf_counter', lambda: now[0])

    def tick(seconds, inner=lambda: None):
        now[0] += seconds
        inner()
    monkeypatch.setattr(bench.filling, 'sample', lambda: tick(1))
    for name in ('fill', 'correct'):
        monkeypatch.setattr(bench.HeadFiller, name, lambda self: tick(2, lambda: bench.filling.sample()))
    clock, filler = timing.Clock('cpu'), object.__new__(bench.HeadFiller)
    with bench.parts_timed(clock):
        filler.fill()
        filler.correct()
    assert clock.seconds == {'waves': 2, 'sampling': 2, 'corrections': 2}


def test_rows_of_the_full_run():
    """Lengths beyond the block for every decoder, at batch 1 and 32."""
    config = SimpleNamespace(device='cpu', dtype='float64')
    rows = bench.decoding_rows(SimpleNamespace(quick=False), config, tiny_model(), tiny_model(
        heads=False, attention_type='causal'))
    assert {f'{name}, batch {B}, length 1024' for B in (1, 32) for name in (
        'naive 15', 'wavefront 15', 'corrected 4', 'autoregressive')} <= set(rows)
    assert {f'autoregressive, batch 1, length {n}' for n in (128, 512, 1024, 2048, 4096)} <= set(rows)
    assert {*bench.MEMORY, *bench.FULL_MEMORY} <= set(rows)
    assert [rows[f'{name}, batch 1'].decoder.corrections for name in ('corrected 4', 'revising 15')] == [8, 0]


def test_seconds_to_a_bound_by_hand(script, tmp_path):
    """10 ms an iteration up to 5, 20 from there on; what lies behind the last line takes as long as that line's."""
    entries = [{'iter': 0, 'split': 'val', 'nelbo': 4.0}, {'iter': 0, 'ms': 10.0, 'loss': 4.0},
               {'iter': 5, 'ms': 10.0, 'loss': 3.0}, {'iter': 8, 'split': 'train', 'nelbo': 2.0},
               {'iter': 8, 'split': 'val', 'nelbo': 2.5}, {'iter': 10, 'ms': 20.0, 'loss': 2.0},
               {'iter': 1016, 'split': 'val', 'nll': 2.25}]
    (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(entry) + '\n' for entry in entries))
    assert time_to_loss.training_seconds(entries, 0) == 0
    assert time_to_loss.training_seconds(entries, 8) == pytest.approx(6 * 0.01 + 2 * 0.02)
    assert time_to_loss.training_seconds(entries, 1016) == pytest.approx(6 * 0.01 + 1010 * 0.02)
    status, out, err = script('bench.py', '--run', tmp_path)
    assert status == 0, err
    assert [line.split() for line in out.splitlines()[1:]] == [
        ['0', '0.0', 's', 'nelbo', '4.0000'], ['8', '0.1', 's', 'nelbo', '2.5000'],
        ['1016', '20.3', 's', 'nll', '2.2500']]


@pytest.mark.parametrize('arguments, message', [
    (['--run', 'nowhere'], "no 'nowhere'"), (['--run', 'nowhere', '--quick'], 'found --quick with --run'),
    (['--nanogpt', 'README.md'], 'no model.py'), (['--checkpoint='], '--checkpoint is empty'),
    (['--out-dir', 'README.md/out'], 'cannot write'), (['--nanogpt', '/nowhere'], '--nanogpt'),
    (['--n_layers=3'], 'n_layers'), (['--nanogpt', 'model.py'], "is not nanoGPT's model.py"),
    (['--out_dir=foo'], 'wanted --out-dir'), (['--config', 'config/fit_sampler.py'], 'no stages to time')])
def test_bad_input_is_one_line(script, arguments, message):
    status, _, err = script('bench.py', *arguments, *([] if '--run' in arguments else SIZE[:-1]))
    assert status == 2 and message in err and err.count('\n') == 1


def test_a_file_of_another_program_is_not_replaced(script, tmp_path):
    (tmp_path / 'bench.json').write_text('{"mine": 1}')
    status, _, err = script('bench.py', '--quick', '--out-dir', tmp_path, *SIZE)
    assert status == 2 and 'holds something else' in err and (tmp_path / 'bench.json').read_text() == '{"mine": 1}'


def test_a_model_that_memory_cannot_hold_is_one_line(script, tmp_path):
    status, _, err = script('bench.py', '--quick', '--out-dir', tmp_path, *SIZE, '--n_embd=65536', '--n_layer=99')
    assert status == 2 and 'GiB of memory' in err and err.count('\n') == 1


def test_a_checkpoint_without_a_head_is_one_line(script, train, tmp_path):
    train(tmp_path, *NO_HEADS, '--max_iters=1')
    status, _, err = script('bench.py', '--quick', '--checkpoint', tmp_path / 'ckpt.pt', '--out-dir', tmp_path, *SIZE)
    assert status == 2 and 'no sampler head that has learned' in err and err.count('\n') == 1


def test_another_model_than_nanogpts_is_one_line(script, tmp_path):
    (tmp_path / 'model.py').write_text('class GPTConfig:\n    def __init__(self, bias): pass\nGPT = print\n')
    status, _, err = script('bench.py', '--quick', '--nanogpt', tmp_path, '--out-dir', tmp_path, *SIZE)
    assert status == 2 and "is not nanoGPT's model.py (TypeError: " in err and err.count('\n') == 1


@pytest.mark.skipif(sys.platform == 'win32', reason='there is no peak memory to read')
def test_peak_memory_is_that_of_the_process_alone():
    large = torch.ones(200 * 2 ** 20, dtype=torch.uint8)    # here, not in the process that measures
    code = ('import torch, timing; before = timing.peak_memory("cpu"); x = torch.ones(50 * 2 ** 20, dtype=torch.uint8);'
            'print(timing.peak_memory("cpu") - before)')
    grown = int(subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True).stdout)
    assert 45 * 2 ** 20 < grown < 2 * len(large) / 4
