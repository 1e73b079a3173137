"""The instruments themselves: exact answers on a chain whose distribution is known, and a table that cannot be gamed."""
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import autoregressive
import diffusion
import metrics
from conftest import TINY
from diffusion import Decoder, decode_block, linear_ratios
from evaluate import admitted, frontier, grid, outdone, sentence

T, LETTERS = 48, 3
STEP = np.array([[0.8, 0.15, 0.05], [0.1, 0.7, 0.2], [0.25, 0.05, 0.7]])    # row: the last letter, column: the next one


def stationary():
    return np.linalg.matrix_power(STEP, 200)[0]


def entropy_per_token():
    p = stationary()
    rate = -(p[:, None] * STEP * np.log(STEP)).sum()
    return (-(p * np.log(p)).sum() + (T - 1) * rate) / T, rate


def chain_rows(n, seed):
    rng = np.random.default_rng(seed)
    x = np.empty((n, T), np.int64)
    x[:, 0] = rng.choice(LETTERS, n, p=stationary())
    for i in range(1, T):
        x[:, i] = (rng.random(n)[:, None] > STEP[x[:, i - 1]].cumsum(1)).sum(1)
    return torch.from_numpy(x)


class Perfect(torch.nn.Module):
    """The exact denoiser of the chain: a place's distribution given the nearest visible letters on both sides."""
    mask_id, sampler_head, critic_head = LETTERS, None, None
    config = SimpleNamespace(block_size=T)

    def __init__(self):
        super().__init__()
        self.powers = torch.from_numpy(np.stack([np.linalg.matrix_power(STEP, d) for d in range(T + 1)]))

    def forward(self, xt):
        B = len(xt)
        logits = torch.zeros(B, T, LETTERS, dtype=torch.float64)
        for b in range(B):
            visible = [i for i in range(T) if xt[b, i] != LETTERS]
            for i in range(T):
                left, right = [j for j in visible if j < i], [j for j in visible if j > i]
                p = self.powers[i - left[-1]][xt[b, left[-1]]] if left else torch.from_numpy(stationary())
                logits[b, i] = (p * (self.powers[right[0] - i][:, xt[b, right[0]]] if right else 1)).log()
        return logits

    def lm_head(self, hidden):
        return hidden


class PerfectCausal:
    def __call__(self, x):
        return torch.from_numpy(STEP).log()[x]

    def lm_head(self, hidden):
        return hidden


def evaluator_nll(x):
    return autoregressive.nll(PerfectCausal(), PerfectCausal(), x).mean(1)


def test_bound_of_a_perfect_denoiser_is_the_entropy():
    """With the exact conditionals the bound is tight: it equals the entropy of a row, to four standard errors."""
    result = diffusion.validate(Perfect(), chain_rows(400, 0), 50, seed=0)
    assert result['nelbo_error'] < 0.02
    assert abs(result['nelbo'] - entropy_per_token()[0]) < 4 * result['nelbo_error']


def test_evaluators_nll_of_exact_samples_is_the_entropy_rate():
    """Four standard errors: fails by luck once in 16,000, and the seed is fixed."""
    mean, error = metrics.mean_error(evaluator_nll(chain_rows(2000, 1)).tolist())
    assert error < 0.01 and abs(mean - entropy_per_token()[1]) < 4 * error


def test_a_decoder_known_to_be_wrong_scores_worse():
    """Even a perfect denoiser is wrong in one pass, where letters are drawn independently; one letter a pass is exact."""
    model, x = Perfect(), torch.full((60, T), LETTERS)
    def decode(passes):
        decoder = Decoder(use_sampler=False, order='random', ratios=tuple(linear_ratios(passes, 1 - 1 / passes, 1 / passes)))
        return metrics.mean_error(evaluator_nll(decode_block(model, x, x == LETTERS, decoder, range(60), range(T))[0]).tolist())
    (wrong, wrong_error), (exact, exact_error) = decode(1), decode(T)
    assert abs(exact - entropy_per_token()[1]) < 4 * exact_error
    assert wrong > exact + 0.3 and wrong_error < 0.1


REAL = ['the quick brown fox jumps over a lazy dog and then sleeps. ', 'a cat sat on the mat while it was raining hard outside. ',
        'we shall see what the morrow brings to them and to us all. ', 'her brother never wrote again, though he said he might do. ']


def test_a_degenerate_generator_is_exposed():
    """One phrase repeated has the best NLL and perfect spelling; its diversity keeps it off the frontier."""
    vocabulary = {w for text in REAL for w in metrics.words_of(text)}
    real = metrics.describe(REAL, [2.0, 2.1, 1.9, 2.0], vocabulary)
    phrase = metrics.describe(['the the the the the the the the the the the the the the th'] * 4, [0.1] * 4, vocabulary)
    assert phrase['nll'][0] < real['nll'][0] and phrase['spelt'][0] == 1
    assert phrase['entropy'][0] < real['entropy'][0] - 1 and phrase['distinct4'][0] < 0.1 * real['distinct4'][0]
    floor = {'entropy': real['entropy'][0] - 0.2, 'distinct4': 0.75 * real['distinct4'][0]}
    cells = [dict(decoder='naive', passes=4, **phrase), dict(decoder='wavefront', passes=4, **real)]
    assert [admitted(c, floor) for c in cells] == [False, True]
    lines = frontier(cells, floor)
    assert 'naive' not in lines and lines['wavefront'] == [cells[1]]
    assert sentence(lines).startswith('no comparison')


def test_the_sentence_counts_passes_and_seconds():
    cell = lambda decoder, passes, nll, seconds: dict(decoder=decoder, passes=passes, nll=[nll, 0.01], seconds=seconds, order='noise',
                                                      entropy=[3, 0], distinct4=[1, 0])
    cells = [cell('naive', 4, 3.0, 1.0), cell('naive', 64, 2.0, 12.0), cell('wavefront', 2, 2.5, 0.5), cell('wavefront', 4, 1.9, 1.2)]
    assert '16 times the passes and 10.0 times the seconds' in sentence(frontier(cells, {'entropy': 2}))
    assert 'does not reach' in sentence(frontier(cells[:3], {'entropy': 2}))
    corrected = cell('corrected', 1, 1.9, 1.5)
    assert '64 times the passes and 8.0 times the seconds' in sentence(frontier(cells + [corrected], {'entropy': 2}))


def test_every_naive_cell_must_be_beaten_at_everything_at_once():
    cell = lambda decoder, passes, nll, entropy: dict(decoder=decoder, passes=passes, nll=[nll, 0], entropy=[entropy, 0], distinct4=[1, 0], spelt=[1, 0])
    naive = [cell('naive', 1, 3.0, 3.3), cell('naive', 64, 2.0, 2.9)]
    assert outdone(naive + [cell('wavefront', 2, 1.9, 3.0)]) is None
    assert outdone(naive + [cell('wavefront', 2, 1.9, 3.0), cell('wavefront', 1, 2.9, 3.3)]) == 2
    assert outdone([cell('wavefront', 2, 1.9, 3.0)]) is None


def test_measures_by_hand():
    assert metrics.unigram_entropy(['ab', 'ab']) == pytest.approx(math.log(2))
    assert metrics.distinct_ngrams(['abcde', 'abcd']) == pytest.approx(2 / 3)
    assert metrics.distinct_ngrams(['aaaa' * 10], characters=8) == pytest.approx(1 / 5)
    assert metrics.whole_words("cut don't stop xyz at") == ["don't", 'stop', 'xyz']
    assert metrics.spelling(["cut don't stop xyz at"], {"don't", 'stop', 'cut'}) == pytest.approx((2 / 3, 3 / 12))
    assert metrics.mean_error([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1 / math.sqrt(3)))


def test_grid_has_one_cell_for_each_thing_that_differs():
    cells = grid(('naive', 'wavefront', 'corrected'), ('random', 'confidence', 'remask'), (1, 4), ((1.0, 1.0),))
    assert len({c.key for c in cells}) == len(cells) == 2 * (1 + 1 + 1 + 2) + (1 + 2)
    assert linear_ratios(4, 0.75, 0.25) == pytest.approx([0.75, 0.5, 0.25])


# -----------------------------------------------------------------------------
# by command line

@pytest.fixture(scope='module')
def models(tmp_path_factory, toy_data):
    """Folder with generator/, ar/ and judge/, trained a few steps."""
    import runpy
    import sys
    from conftest import ROOT
    folder = tmp_path_factory.mktemp('models')
    small = [*TINY, f'--data_dir={toy_data}']
    off = ['--add_sampler_head=False', '--add_critic_head=False']
    argv, sys.argv = sys.argv, None
    for name, args in (('generator', []), ('ar', [*off, '--attention_type=causal']),
                       ('judge', [*off, '--model_mode=sequence_scorer', f'--generator_checkpoint={folder}/generator/ckpt.pt'])):
        sys.argv = ['train.py', f'{ROOT}/{small[0]}', *small[1:], *args, f'--out_dir={folder}/{name}']
        runpy.run_path(f'{ROOT}/train.py', run_name='__main__')
    sys.argv = argv
    return folder


@pytest.fixture
def evaluate(script, models, toy_data, tmp_path):
    def call(*args, checkpoint='generator', evaluator='ar'):
        return script('evaluate.py', '--checkpoint', models / checkpoint / 'ckpt.pt', '--evaluator', models / evaluator / 'ckpt.pt',
                      '--data-dir', toy_data, '--out-dir', tmp_path, '--num-samples', 4, '--dtype', 'float32', *args)
    return call


def test_a_table_a_plot_and_a_file(evaluate, models, tmp_path):
    flags = ['--passes', '1,2', '--orders', 'random,remask,critic', '--temperatures', '1,1-0.2', '--judge', models / 'judge' / 'ckpt.pt',
             '--entropy-slack', 9, '--distinct-slack', 1]
    status, out, err = evaluate(*flags)
    assert status == 0, err
    assert re.search(r'validation NELBO \d\.\d+ ±\d\.\d+ nats per token, \d\.\d+ ±\d\.\d+ bits per character', out)
    assert '| real text |' in out and '| autoregressive, temperature 1 |' in out and '| wavefront, 2 trunk passes (' in out
    assert 'wavefront' in out.splitlines()[-1]
    result = json.loads((tmp_path / 'evaluation.json').read_text())
    assert len(result['cells']) == 2 * (1 + 2 * (1 + 2 + 2)) + 2 * (1 + 2 * 2) and all(0 <= c['judge'][0] <= 1 for c in result['cells'].values())
    assert (tmp_path / 'frontier.png').stat().st_size > 5000 and (tmp_path / 'frontier.svg').exists()

    # what is finished is kept: a grid that goes on, or is wider, measures the rest alone
    gone = sorted(result['cells'])[0]
    del result['cells'][gone]
    for cell in result['cells'].values():
        cell['seconds'] = 123.0
    (tmp_path / 'evaluation.json').write_text(json.dumps(result))
    assert evaluate(*flags)[0] == 0
    again = json.loads((tmp_path / 'evaluation.json').read_text())['cells']
    assert again[gone]['seconds'] != 123.0 and sum(c['seconds'] == 123.0 for c in again.values()) == len(again) - 1


@pytest.mark.parametrize('flags, models_of, message', [
    (['--num-samples', '0'], {}, '--num-samples is 0'), (['--orders', 'sideways'], {}, '--orders has sideways'), (['--passes', '1,x'], {}, "'1,x'"),
    (['--decoders', 'oracle'], {}, '--decoders has oracle'), (['--decoders', 'corrected', '--orders', 'random'], {}, 'nothing to measure'),
    (['--corrections', '0'], {}, '--corrections is 0'), (['--temperatures', '0.8-'], {}, "'0.8-'"), (['--temperatures', '1-0.8-x'], {}, "'1-0.8-x'"),
    (['--temperatures', '1,0.8-0'], {}, '--temperatures has 0.8-0'), (['--passes', '0'], {}, '--passes has 0'), ([], {'checkpoint': 'nowhere'}, 'no checkpoint'), ([], {'evaluator': 'generator'}, 'not causal'),
    ([], {'checkpoint': 'ar'}, 'autoregressive model, wanted'), (['--judge', 'nowhere.pt'], {}, 'no checkpoint')])
def test_bad_input(evaluate, flags, models_of, message):
    status, _, err = evaluate(*flags, **models_of)
    assert status == 2 and message in err and err.count('\n') == 1


def test_another_vocabulary_is_refused(evaluate, models, script, tmp_path):
    saved = torch.load(models / 'ar' / 'ckpt.pt', weights_only=True)
    saved['corpus'] = saved['corpus'] | {'name': 'other', 'chars': saved['corpus']['chars'][::-1]}
    torch.save(saved, tmp_path / 'ckpt.pt')
    status, _, err = evaluate('--evaluator', tmp_path / 'ckpt.pt')
    assert status == 2 and "'other', whose vocabulary" in err
    status, _, err = script('sample_simple.py', '--out-dir', models / 'generator', '--quality-metric', 'judge', '--judge-checkpoint-name', tmp_path / 'ckpt.pt')
    assert status == 2 and "'other', whose vocabulary" in err


# -----------------------------------------------------------------------------
# the judge

@pytest.mark.parametrize('name, meaning', [('judge', 'share of intact tokens, 0 to 1, high is good'), ('ar', 'bits per character.*low is good')])
def test_both_kinds_of_judge(script, models, name, meaning):
    status, out, err = script('sample_simple.py', '--out-dir', models / 'generator', '--num-samples', 3, '--sequence-length', 80, '--no-progress',
                              '--iterations', 2, '--quality-metric', 'judge', '--judge-checkpoint-name', models / name / 'ckpt.pt')
    assert status == 0, err
    assert re.search(meaning, out) and len(re.findall(r'--- sample \d, quality \d', out)) == 3


def test_what_cannot_judge(script, models):
    base = ['sample_simple.py', '--out-dir', models / 'generator', '--quality-metric', 'judge']
    for args, message in (([], 'wanted both'), (['--judge-checkpoint-name', 'ckpt.pt'], 'wanted a judge')):
        status, _, err = script(*base, *args)
        assert status == 2 and message in err


def test_judges_rows_say_what_is_intact():
    from conftest import tiny_model
    from judge import make_rows
    x0 = torch.randint(0, 11, (8, 24), generator=torch.Generator().manual_seed(0))
    x, intact = make_rows(tiny_model(), x0, np.random.default_rng(0))
    assert torch.equal(intact, x == x0) and (x < 11).all()
    assert intact.all(1).any(), 'one row stays whole'
    assert (intact.float().mean(1) < 0.6).any()


def test_a_judge_starts_from_its_generators_trunk():
    from conftest import tiny_model
    from judge import start_from
    generator = tiny_model(seed=1)
    fresh = tiny_model(seed=2, heads=False, model_mode='sequence_scorer')
    assert start_from(fresh, generator)
    x = torch.randint(0, 11, (2, 24), generator=torch.Generator().manual_seed(0))
    assert torch.equal(fresh(x), generator(x))
    assert not start_from(tiny_model(heads=False, model_mode='sequence_scorer', n_layer=1), generator)


def test_rank_correlation_by_hand():
    from judge import rank_correlation
    assert rank_correlation(torch.tensor([1.0, 2, 3, 10]), torch.tensor([0.1, 0.2, 0.3, 0.4])) == pytest.approx(1)
    assert rank_correlation(torch.tensor([3.0, 2, 1]), torch.tensor([0.1, 0.2, 0.3])) == pytest.approx(-1)
    assert rank_correlation(torch.tensor([1.0, 1, 2]), torch.tensor([1.0, 2, 3])) == pytest.approx(0.8660254)
