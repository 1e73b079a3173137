"""The judge: what it learns from, what it starts from, and both kinds of it on the command line."""
import re
import shutil

import numpy as np
import pytest
import torch

import judge
import trunk
from configurator import read_file
from conftest import ROOT, TINY, tiny_model
from filling import HeadFiller


def text(B=16, T=24):
    return torch.randint(0, 11, (B, T), generator=torch.Generator().manual_seed(0))


def always(monkeypatch, token):
    """The decoder knows one token."""
    one_hot = torch.nn.functional.one_hot(torch.tensor([token]), 11).float() * 99
    monkeypatch.setattr(HeadFiller, 'logits', lambda self, view, *rest: one_hot.expand(len(view), -1))


def test_examples_are_real_in_part_in_whole_and_not_at_all():
    """A quarter of the sequences stays real; the others are written in part or, in a quarter of the batches, whole."""
    x0, whole = text(), []
    for seed in range(8):
        x, real = judge.make_examples(tiny_model(), x0, np.random.default_rng(seed))
        assert torch.equal(x[real], x0[real]) and (x < 11).all()
        assert real.all(1).sum() == 4, "real tokens are the text's"
        whole.append(int((~real).all(1).sum()) == 12)
        if not whole[-1]:
            assert 8 <= (real.any(1) & ~real.all(1)).sum() <= 12
    assert 0 < sum(whole) < 8


def test_a_token_that_the_decoder_got_right_is_still_generated(monkeypatch):
    """With `x == x0` as target a generated token that happens to be the text's own counted as real."""
    x0 = torch.zeros(16, 24, dtype=torch.long)
    generator = tiny_model()
    always(monkeypatch, 0)
    for seed in range(4):
        x, real = judge.make_examples(generator, x0, np.random.default_rng(seed))
        if (x == x0).all():
            break
    assert (x == x0).all() and not real.all()


def test_examples_come_from_the_shipped_decoder(monkeypatch):
    """Its own defaults, in as many iterations as users run, with and without the sampler head, cool and hot."""
    seen, decode_window = [], judge.decode_window
    def watch(model, x, free, config, *args):
        seen.append((config, free))
        return decode_window(model, x, free, config, *args)
    monkeypatch.setattr(judge, 'decode_window', watch)
    generator = tiny_model()
    for seed in range(60):
        judge.make_examples(generator, text(4), np.random.default_rng(seed))
    configs = [config for config, _ in seen]
    assert {c.passes for c in configs} == set(judge.ITERATIONS) and {c.use_sampler for c in configs} == {True, False}
    assert len({c.temperature for c in configs}) == 60
    assert all(judge.TEMPERATURES[0] <= c.temperature <= judge.TEMPERATURES[1] for c in configs)
    whole = [free[free.any(1)].all().item() for _, free in seen]
    assert 0 < sum(whole) < 60, 'some batches are written whole, others in part'
    assert all(not free.any(1).all() for _, free in seen), 'in each some sequences stay real'
    for w, (c, _) in zip(whole, seen):    # as sample_simple.py would
        default = judge.default_config(generator, c.passes, c.use_sampler, w)
        assert (c.plan, c.plan_passes, c.mask_ratios) == (default.plan, default.plan_passes, default.mask_ratios)
    assert {(c.use_sampler, w, c.plan) for w, (c, _) in zip(whole, seen)} == {
        (True, True, 'speculative'), (True, False, 'wavefront'), (False, True, 'interleaved'),
        (False, False, 'wavefront')}


@pytest.mark.parametrize('B', [1, 2, 3])
def test_small_batches(B):
    x, real = judge.make_examples(tiny_model(), text(B), np.random.default_rng(1))
    assert x.shape == real.shape == (B, 24)


def test_a_generator_without_heads_is_enough():
    x, real = judge.make_examples(tiny_model(heads=False), text(4), np.random.default_rng(2))
    assert (x < 11).all() and not real.all()


def test_a_judge_starts_from_its_generators_trunk():
    generator = tiny_model(seed=1)
    fresh = tiny_model(seed=2, heads=False, model_mode='sequence_scorer')
    assert trunk.copy(generator, fresh)
    x = text(2)
    assert torch.equal(fresh(x), generator(x))
    assert not trunk.copy(generator, tiny_model(heads=False, model_mode='sequence_scorer', n_layer=1))


class Tells(torch.nn.Module):
    """A judge that knows: generated sequences hold the last letter, which the text lacks."""
    def forward(self, x):
        return torch.where(x == 10, -5.0, 5.0)[..., None]

    score_head = torch.nn.Identity()


def test_validation_ranks_by_the_share_of_real_tokens(monkeypatch):
    generator = tiny_model()
    always(monkeypatch, 10)
    x0 = text(40) % 10
    result = judge.validate(Tells(), generator, x0, 8, np.random.default_rng(0))
    assert result['rank_correlation'] > 0.8 and 0 < result['loss'] < 5


def test_a_score_is_the_mean_chance_of_being_real():
    model = tiny_model(heads=False, model_mode='sequence_scorer')
    scorer = judge.Judge(model, 'judge', {'val_tokens': 1, 'val_chars': 1})
    x = text(3, 30)    # longer than a block of 24
    with torch.no_grad():
        logits = torch.cat([judge.token_logits(model, model, part) for part in (x[:, :24], x[:, 24:])], 1)
    scores = scorer.score(x)
    torch.testing.assert_close(scores, torch.sigmoid(logits).mean(1))
    assert (0 <= scores).all() and (scores <= 1).all() and 'high is good' in scorer.meaning


def test_one_batch_overfits():
    """The loss falls on fixed examples, so the targets belong to the tokens."""
    model = tiny_model(heads=False, model_mode='sequence_scorer').float()
    x, real = judge.make_examples(tiny_model(), text(8), np.random.default_rng(3))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        loss = judge.loss(model, model, x, real)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# -----------------------------------------------------------------------------
# by command line

@pytest.fixture(scope='module')
def judges(script, toy_data, trained_once, tmp_path_factory):
    """A folder with the generator's ckpt.pt, and judge_model.pt and ar.pt, trained a few steps by their own configs.

    So few that the judge's best is the one that it begins with, hence always_save_checkpoint.
    """
    folder = tmp_path_factory.mktemp('judges')
    shutil.copy(trained_once[0] / 'ckpt.pt', folder)
    tiny = [arg for arg in TINY[1:] if not arg.startswith(('--start_', '--end_', '--sampler_'))]
    common = [*tiny, f'--data_dir={toy_data}', f'--out_dir={folder}']
    for args in (['config/train_judge.py', *common, f'--generator_checkpoint={folder}/ckpt.pt',
                  '--always_save_checkpoint=True'],
                 ['config/train_char_ar.py', *common, '--checkpoint_name=ar.pt']):
        status, out, err = script('train.py', *args)
        assert status == 0, err
    return folder


def test_both_configs_write_what_they_say(judges):
    saved = {name: torch.load(judges / name, weights_only=True) for name in ('judge_model.pt', 'ar.pt')}
    assert saved['judge_model.pt']['model_args']['model_mode'] == 'sequence_scorer'
    assert saved['ar.pt']['model_args']['attention_type'] == 'causal'


def test_a_judge_goes_on_with_its_generator_and_batch_alone(script, judges, toy_data, tmp_path):
    """Another generator at the same path went unnoticed; the same one elsewhere is the same."""
    shutil.copytree(judges, tmp_path, dirs_exist_ok=True)
    shutil.copy(judges / 'ckpt.pt', tmp_path / 'moved.pt')
    tiny = [arg for arg in TINY[1:] if not arg.startswith(('--start_', '--end_', '--sampler_'))]

    def resume(generator, *args):
        status, _, err = script('train.py', 'config/train_judge.py', *tiny, f'--data_dir={toy_data}',
                                f'--out_dir={tmp_path}', f'--generator_checkpoint={tmp_path / generator}',
                                '--init_from=resume', '--max_iters=14', '--always_save_checkpoint=True', *args)
        return status, err
    status, err = resume('ckpt.pt', '--batch_size=4')
    assert status == 2 and 'batch_size 8, this run 4' in err
    saved = torch.load(tmp_path / 'ckpt.pt', weights_only=True)
    saved['model']['wte.weight'][0, 0] += 1
    torch.save(saved, tmp_path / 'ckpt.pt')
    status, err = resume('ckpt.pt')
    assert status == 2 and 'has generator_weights ' in err and '--overwrite=True' in err and err.count('\n') == 1
    assert resume('moved.pt') == (0, '')


def test_the_judges_config_leads_to_its_command():
    """`--judge-checkpoint-name judge_model.pt` is looked up in the default --out-dir: the config writes it there."""
    settings = read_file(f'{ROOT}/config/train_judge.py')
    assert (settings['out_dir'], settings['checkpoint_name']) == ('out-char-diffusion', 'judge_model.pt')
    assert settings['generator_checkpoint'] == 'out-char-diffusion/ckpt.pt'


@pytest.mark.parametrize('name, meaning', [('judge_model.pt', '0 to 1, high is good'),
                                           ('ar.pt', 'bits per character.*low is good')])
def test_both_kinds_of_judge(script, judges, name, meaning):
    status, out, err = script('sample_simple.py', '--out-dir', judges, '--num-samples', 3, '--sequence-length', 80,
                              '--no-progress', '--iterations', 2, '--quality-metric', 'judge',
                              '--judge-checkpoint-name', name)
    assert status == 0, err
    assert re.search(meaning, out) and len(re.findall(r'--- sample \d, quality \d', out)) == 3


def test_a_causal_judge_needs_a_second_token(script, judges):
    """It was a convolution on empty input; a scorer judges one token as well."""
    flags = ['sample_simple.py', '--out-dir', judges, '--sequence-length', 1, '--no-progress', '--num-samples', 2]
    status, _, err = script(*flags, '--judge-checkpoint-name', 'ar.pt')
    assert status == 2 and err.startswith('error: --sequence-length is 1, and a causal judge') and err.count('\n') == 1
    status, out, err = script(*flags, '--judge-checkpoint-name', 'judge_model.pt')
    assert status == 0 and out.count('quality 0.') >= 2, err


def test_what_cannot_judge(script, judges):
    base = ['sample_simple.py', '--out-dir', judges, '--quality-metric', 'judge']
    for args, message in (([], 'judge'), (['--judge-checkpoint-name', 'ckpt.pt'], 'wanted a judge')):
        status, _, err = script(*base, *args)
        assert status == 2 and message in err and err.count('\n') == 1
