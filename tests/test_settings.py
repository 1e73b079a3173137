"""The table of settings: complete, said once, and what contradicts itself or fits into no memory is named."""
import re
import sys
from types import SimpleNamespace

import pytest

import memory
import settings
import train
from configurator import configure
from conftest import TINY
from errors import InputError
from model import GPT, GPTConfig
from schedules import lr_factor


def test_every_number_has_a_range_and_every_default_lies_in_it():
    numbers = {name for name, value in train.settings.items() if type(value) in (int, float)}
    assert set(settings.RANGES) == numbers | {'vocab_size'}
    assert set(settings.CHOICES) | set(settings.NAMES) | set(settings.NOT_EMPTY) <= set(train.settings)
    settings.check(SimpleNamespace(**train.settings))


@pytest.mark.parametrize('wanted, inside, outside, text', [
    (settings.Range(1), (1, 5, 10 ** 400), (0, -1, float('inf'), float('nan')), 'at least 1'),
    (settings.Range(0, 1), (0, 0.5, 1), (1.1, -1e-9, float('nan')), '0 to 1'),
    (settings.Range(0, 1, below=True), (0, 0.999), (1, float('-inf')), '0 to below 1')])
def test_ranges_by_hand(wanted, inside, outside, text):
    assert all(value in wanted for value in inside) and not any(value in wanted for value in outside)
    assert str(wanted) == text


def test_help_says_each_setting_with_its_range_and_the_comment_beside_it(script):
    status, out, _ = script('train.py', '--help')
    lines = dict(line.split('=', 1) for line in out.splitlines())
    assert status == 0 and set(lines) == {f'--{name}' for name in train.settings}
    assert lines['--dropout'] == ('0.0  [0 to below 1]  chance that an output of attention or MLP is left out in '
                                  'training')
    assert 'float32 or bfloat16' in lines['--dtype']


@pytest.mark.parametrize('flags, named', [
    (['--start_critic_iteration=2', '--end_critic_iteration=2'], 'start_critic_iteration=2 comes before'),
    (['--end_critic_iteration=5'], 'end_critic_iteration=5 comes before'),
    (['--max_iters=5', '--start_critic_iteration=5'], ''), (['--max_iters=5'], 'start_critic_iteration=6 is never'),
    (['--start_sampler_iteration=13', '--start_critic_iteration=13', '--end_critic_iteration=13'], 'sampler.* never'),
    (['--shard=True', '--dtype=float16'], 'shard=True with dtype=float16'),
    (['--text_masking=0.1', '--block_rows=0'], 'nothing is read from left to right'),
    (['--text_masking=0.1', '--freeze_trunk=True'], 'with freeze_trunk=True'), (['--text_masking=0.6'], '=0.6'),
    (['--text_masking=0.1'], ''),
    (['--lr_decay_iters=2'], 'lr_decay_iters=2 comes before'), (['--dtype=float64'], "dtype='float64'"),
    (['--n_embd=65536', '--n_layer=100', '--n_head=2'], 'more than .* GiB of memory'),
    (['--batch_size=9999999', '--n_layer=100'], 'more than .* GiB of memory')])
def test_contradictions_and_sizes_are_one_line(train, refused, tmp_path, flags, named):
    if not named:    # a run may end where a stage begins
        train(tmp_path, *flags)
        return
    assert re.search(named, refused(tmp_path, *flags)) and not list(tmp_path.iterdir())


@pytest.mark.parametrize('flags, named', [
    (['--lr_decay_iters=8'], 'the critic head begins at iteration 6'), (['--lr_decay_iters=9'], ''),
    (['--lr_decay_iters=4', '--final_lr_ratio=0.1'], ''), (['--lr_decay_iters=4'], 'the sampler head begins at'),
    (['--learning_rate=0', '--muon_learning_rate=0'], 'train nothing'), (['--learning_rate=0'], '')])
def test_a_part_that_would_never_learn_is_named(flags, named):
    """A head that begins as the decay ends learned at a rising rate, then at 0 to the end."""
    config = SimpleNamespace(**configure(train.settings, [*TINY, *flags]))
    if named:
        with pytest.raises(InputError, match=named):
            settings.check(config)
    else:
        settings.check(config)
        its = range(config.start_critic_iteration, config.max_iters)
        rates = [lr_factor(config, it, config.start_critic_iteration) for it in its]
        assert sum(a > b for a, b in zip(rates, rates[1:])) > 0 and max(rates) > 0.5, 'it decays, from a height'


def test_a_resumed_run_whose_learning_has_ended_is_named(half, refused):
    assert 'goes on from iteration 6: nothing would train' in refused(half, '--init_from=resume', '--lr_decay_iters=6')
    assert 'the critic head begins at iteration 7' in refused(
        half, '--init_from=resume', '--lr_decay_iters=9', '--start_critic_iteration=7')


def test_wandb_that_is_not_there_and_devices_that_are_not(refused, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    assert 'pip install wandb' in refused(tmp_path, '--wandb_log=True')
    for device in ('cpu:abc', 'cpu:1', 'cpu:', 'cuda:99', 'meta'):
        assert f'device {device!r}' in refused(tmp_path, f'--device={device}')
    assert not list(tmp_path.iterdir())


def test_memory_is_counted_without_taking_any():
    config = GPTConfig(vocab_size=12, block_size=24, n_layer=2, n_head=2, n_embd=16, add_sampler_head=True)
    whole = GPT(config)
    tensors = [*whole.parameters(), *whole.buffers()]
    assert memory.of_model(config) == 4 * sum(t.numel() for t in tensors)
    assert all(p.device.type == 'meta' for p in memory.skeleton(config).parameters())
    with pytest.raises(InputError, match='a thing needs more than 1,000,000.0 GiB of memory, cpu has'):
        memory.require(10 ** 6 * 2 ** 30, 'cpu', 'a thing')


def test_a_divided_critic_needs_the_sampler_head(refused, tmp_path):
    """Processes that decode nothing for the critic read a blank sequence for the sampler head, all alike."""
    assert 'no sampler head' in refused(tmp_path, '--shard=True', '--add_sampler_head=False')
