"""The instruments: exact answers on a chain whose distribution is known, and a comparison that cannot be gamed."""
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import autoregressive
import diffusion
import evaluate
import metrics
import recipes
import report
from conftest import NO_HEADS
from decoding import DecoderConfig, decode_window, linear_ratios
from errors import InputError

T, LETTERS = 48, 3
STEP = np.array([[0.8, 0.15, 0.05], [0.1, 0.7, 0.2], [0.25, 0.05, 0.7]])    # [last letter, next letter]


def stationary():
    return np.linalg.matrix_power(STEP, 200)[0]


def entropy_per_token():
    p = stationary()
    rate = -(p[:, None] * STEP * np.log(STEP)).sum()
    return (-(p * np.log(p)).sum() + (T - 1) * rate) / T, rate


def chain_sequences(n, seed):
    rng = np.random.default_rng(seed)
    x = np.empty((n, T), np.int64)
    x[:, 0] = rng.choice(LETTERS, n, p=stationary())
    for i in range(1, T):
        x[:, i] = (rng.random(n)[:, None] > STEP[x[:, i - 1]].cumsum(1)).sum(1)
    return torch.from_numpy(x)


class Perfect(torch.nn.Module):
    """The exact denoiser of the chain: each position's distribution given the nearest visible letters on both sides."""
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
        return hidden.float()


class PerfectCausal:
    def __call__(self, x):
        return torch.from_numpy(STEP).log()[x]

    def lm_head(self, hidden):
        return hidden


def evaluator_nll(x):
    return autoregressive.nll(PerfectCausal(), PerfectCausal(), x).mean(1)


def test_bound_of_a_perfect_denoiser_is_the_entropy():
    """With the exact conditionals the bound is tight: it equals a sequence's entropy, to four standard errors."""
    result = diffusion.validate(Perfect(), chain_sequences(400, 0), 50, seed=0)
    assert result['nelbo_error'] < 0.02
    assert abs(result['nelbo'] - entropy_per_token()[0]) < 4 * result['nelbo_error']


def test_evaluators_nll_of_exact_samples_is_the_entropy_rate():
    """Four standard errors: fails by luck once in 16,000, and the seed is fixed."""
    mean, error = metrics.mean_error(evaluator_nll(chain_sequences(2000, 1)).tolist())
    assert error < 0.01 and abs(mean - entropy_per_token()[1]) < 4 * error


def test_a_decoder_known_to_be_wrong_scores_worse():
    """Even a perfect denoiser is wrong in one pass, where letters are drawn alone; one letter a pass is exact."""
    model, x = Perfect(), torch.full((24, T), LETTERS)

    def decode(passes):
        ratios = tuple(recipes.mask_ratios('even', passes))
        config = DecoderConfig(use_sampler=False, order='random', mask_ratios=ratios)
        decoded = decode_window(model, x, x == LETTERS, config, range(24), range(T))
        return metrics.mean_error(evaluator_nll(decoded.x).tolist())
    (wrong, wrong_error), (exact, exact_error) = decode(1), decode(T)
    assert abs(exact - entropy_per_token()[1]) < 4 * exact_error
    assert wrong > exact + 0.3 and wrong_error < 0.1


# -----------------------------------------------------------------------------
# what is measured

def test_every_setting_differs_in_what_it_does():
    settings = recipes.list_settings(list(recipes.RECIPES), (), (0.8, 1.0), length=256)
    assert len({s.key for s in settings}) == len(settings)
    assert len({s.curve for s in settings}) == len(settings) / 2
    configs = [str(s.decoder_config(1)) for s in settings if s.decoder != recipes.BASELINE]
    assert len(set(configs)) == len(configs)
    assert set(report.COLORS) == {*recipes.RECIPES, recipes.BASELINE}
    assert all(s.decoder_config(1).passes == s.passes for s in settings if s.decoder != recipes.BASELINE)
    assert sum(s.decoder == recipes.BASELINE for s in settings) == 2 and settings[0].passes == 255


def test_passes_that_are_asked_for_are_measured():
    settings = recipes.list_settings(['wavefront'], (64,), (1.0,), length=256)
    assert [s.passes for s in settings] == [255, 64]
    assert all(s.passes <= 16 for s in recipes.list_settings(['wavefront'], (), (1.0,), length=256)[1:])
    with pytest.raises(InputError, match='naive-confidence nothing to do'):
        recipes.list_settings(['naive-confidence'], (1,), (1.0,), length=256)
    unnamed = recipes.list_settings(['naive-confidence', 'wavefront'], (1,), (1.0,), length=256, named=False)
    assert [s.decoder for s in unnamed] == [recipes.BASELINE, 'wavefront']
    assert evaluate.names('wavefront, naive-random') == ('wavefront', 'naive-random')


def test_schedules_by_hand():
    assert recipes.mask_ratios('even', 4) == pytest.approx([0.75, 0.5, 0.25])
    assert recipes.mask_ratios('cosine', 3) == pytest.approx([math.cos(math.pi / 6), math.cos(math.pi / 3)])
    assert recipes.mask_ratios('0.7-0.1', 4) == pytest.approx([0.7, 0.4, 0.1]) == linear_ratios(4, 0.7, 0.1)
    assert all(recipes.mask_ratios(name, 1) == [] for name in ('even', 'cosine', '0.7-0.1'))


# -----------------------------------------------------------------------------
# reading curves: likelihood and diversity both vary with temperature

def measure(value, spread=0.01, seed=0):
    """A measure with this value and eight replicates around it."""
    noise = np.random.default_rng(seed).standard_normal(8)
    return {'value': value, 'error': spread, 'replicates': list(value + spread * (noise - noise.mean()) / 3)}


def real_text():
    return {'nll': measure(1.5), 'nll_ngram': measure(1.6), 'distinct4': measure(0.5, 0.001),
            'entropy': measure(3.3, 0.001)}


def setting(decoder, passes, temperature, nll, distinct, entropy=3.3, seconds=1.0, schedule='even', seed=0):
    return {'decoder': decoder, 'passes': passes, 'schedule': schedule, 'noise': 0.0, 'temperature': temperature,
            'curve': f'{decoder} {passes} {schedule}', 'seconds_1': seconds / 4, 'seconds_batch': seconds,
            'measures': {'nll': measure(nll, seed=seed), 'nll_ngram': measure(nll + 0.1, seed=seed + 50),
                         'distinct4': measure(distinct, 0.003, seed + 100),
                         'entropy': measure(entropy, 0.003, seed + 200)}}


def line(decoder, passes, offset=0.0, slope=2.0, distinct=(0.3, 0.42, 0.54, 0.66), **more):
    """A curve on which NLL rises with temperature and diversity: nll = 1 + offset + slope (distinct - 0.3)."""
    return [setting(decoder, passes, 0.6 + 0.2 * i, 1 + offset + slope * (d - 0.3), d, **more)
            for i, d in enumerate(distinct)]


def test_a_figure_is_read_off_where_the_curve_enters_the_band():
    """0.45 distinct 4-grams, nine tenths of real text's, lie a quarter of the way from 0.42 to 0.54."""
    point = report.read_curve(line('naive-random', 4), real_text())
    assert point['distinct4'] == pytest.approx(0.45) and point['nll'] == pytest.approx(1.3)
    assert point['temperature'] == pytest.approx(0.85) and point['nll_ngram'] == pytest.approx(1.4)


def test_the_band_has_two_sides_and_two_measures():
    read = lambda **curve: report.read_curve(line('naive-random', 4, **curve), real_text())
    assert read(distinct=(0.1, 0.2, 0.3, 0.44)) is None, 'never diverse enough'
    assert read(distinct=(0.56, 0.6, 0.7, 0.8)) is None, 'noise is diverse too'
    assert read(entropy=3.19) is None and read(entropy=3.41) is None
    assert read(entropy=3.21) is not None
    assert read(distinct=(0.2, 0.8))['distinct4'] == pytest.approx(0.45), 'between two points outside'
    both = [setting('x', 4, 0.8, 1.0, 0.45, 3.0), setting('x', 4, 1.0, 2.0, 0.55, 3.4)]    # entropy enters later
    assert report.read_curve(both, real_text())['nll'] == pytest.approx(1.5)


def test_one_temperature_counts_where_it_lies_in_the_band():
    assert report.read_curve(line('naive-random', 4)[:1], real_text()) is None
    assert report.read_curve([setting('x', 4, 1.0, 1.7, 0.5)], real_text())['nll'] == 1.7


def test_repetition_buys_no_figure():
    """One phrase repeated has the best NLL and only known words; its diversity leaves it without a figure."""
    texts = ['the quick brown fox jumps over a lazy dog and then sleeps. ',
             'a cat sat on the mat while it was raining hard outside. ',
             'we shall see what the morrow brings to them and to us all. ',
             'her brother never wrote again, though he said he might do. ']
    reference = metrics.Reference.of(' '.join(texts), texts)
    scores = {'nll': [2.0, 2.1, 1.9, 2.0], 'nll_ngram': [2.0, 2.1, 1.9, 2.0]}
    real = metrics.describe(texts, scores, reference)
    phrase = metrics.describe(['the ' * 14] * 4, {'nll': [0.1] * 4, 'nll_ngram': [0.1] * 4}, reference)
    assert phrase['nll']['value'] < real['nll']['value'] and phrase['in_vocabulary_words']['value'] == 1
    assert phrase['repeated_within']['value'] > 0.8 and phrase['repeated_across']['value'] == 1
    named = dict(decoder='naive-random', passes=4, schedule='', noise=0.0, curve='', temperature=1.0, seconds_1=1,
                 seconds_batch=1)
    assert report.best_points([named | {'measures': phrase}], real) == {('naive-random', 4): None}
    assert report.best_points([named | {'measures': real}], real)[('naive-random', 4)]['nll']['value'] == 2.0


def test_a_decoder_gets_its_best_schedule():
    settings = line('naive-remask', 4, 0.3) + line('naive-remask', 4, 0.1, schedule='cosine')
    points = report.best_points(settings + line('wavefront', 1, distinct=(0.1, 0.2)), real_text())
    assert points[('naive-remask', 4)]['schedule'] == 'cosine' and points[('wavefront', 1)] is None


def test_errors_count_where_the_curve_enters_the_band():
    """With every replicate's NLL the same, its error at the band comes from diversity alone; outside, it is nan."""
    curve = line('naive-random', 4)
    for s in curve:
        s['measures']['nll']['replicates'] = [s['measures']['nll']['value']] * 8
    point = report.at_real_diversity(curve, real_text())
    assert point['nll']['error'] > 0
    barely = line('naive-random', 4, distinct=(0.2, 0.3, 0.4, 0.4501))
    assert math.isnan(report.at_real_diversity(barely, real_text())['nll']['error'])


def test_the_error_of_a_difference_is_that_of_repeated_experiments():
    """Two decoders share noise: the jackknife's error of their difference against its spread over 80 trials."""
    rng, differences, errors, n, groups = np.random.default_rng(3), [], [], 64, 8

    def replicated(samples):
        parts = [samples[np.arange(n) % groups != g].mean() for g in range(groups)]
        return {'value': samples.mean(), 'error': 0, 'replicates': parts}
    for _ in range(80):
        common, points = rng.standard_normal((n, 2)), []
        real = real_text() | {'distinct4': replicated(0.5 + 0.02 * rng.standard_normal(n))}
        for offset in (0.0, 0.2):
            curve = []
            for s in line('x', 4, offset):
                own = common * 0.5 + 0.5 * rng.standard_normal((n, 2))
                s['measures']['nll'] = replicated(s['measures']['nll']['value'] + 0.2 * own[:, 0])
                s['measures']['distinct4'] = replicated(s['measures']['distinct4']['value'] + 0.1 * own[:, 1])
                curve.append(s)
            real['nll'] = curve[0]['measures']['nll']
            for s in curve:
                s['measures']['entropy'] = replicated(np.full(n, 3.3))
            points.append(report.at_real_diversity(curve, real | {'entropy': replicated(np.full(n, 3.3))}))
        value, error = report.difference(*points, 'nll')
        differences.append(value)
        errors.append(error)
    assert np.mean(differences) == pytest.approx(0.2, abs=0.02)
    assert 0.7 < np.sqrt(np.mean(np.square(errors))) / np.std(differences, ddof=1) < 1.4


def test_the_sentences_compare_both_evaluators_and_seconds():
    curves = [line('naive-random', 4, 0.5), line('naive-remask', 64, 0.2, seconds=12.0, seed=1),
              line('wavefront', 1, 0.4, seed=2), line('wavefront-critic', 4, 0.1, seconds=1.5, seed=3),
              line('wavefront-critic', 16, seconds=4.0, seed=4), line('ar_baseline', 255, -0.1, seconds=2.0, seed=5)]
    text = report.sentences(report.best_points(sum(curves, []), real_text()), batch=32)
    assert 'naive-remask with 64 forward passes, has 1.50' in text
    error = r' ±0\.0\d+'
    assert re.search(rf'wavefront-critic with 4 forward passes has 1\.40\d{error}: 0\.(10|09)\d{error} lower by', text)
    assert '1.50 s against 12.00 s for 32 samples and 0.38 s against 3.00 s for one' in text
    assert 'Its best, wavefront-critic with 16 forward passes' in text
    assert re.search(rf'autoregressive baseline has 1\.20.*is 0\.(10|09)\d{error} higher by', text, re.S)


def test_no_claim_without_real_diversity():
    real, flat = real_text(), dict(distinct=(0.1, 0.15, 0.2, 0.25))
    say = lambda *curves: report.sentences(report.best_points(sum(curves, []), real), batch=32)
    naive = line('naive-random', 4)
    assert 'no claim' in say(naive, line('wavefront', 4, **flat))
    assert say(line('naive-random', 4, **flat), line('wavefront', 4, -0.5)).startswith('No naive decoder')
    assert re.search(r'0\.(50|49)\d ±0\.0\d+ higher by the autoregressive', say(naive, line('wavefront', 4, 0.5)))
    points = report.best_points(naive + line('wavefront', 4, **flat), real)
    assert report.entries(points)[1] == {'decoder': 'wavefront', 'passes': 4}
    assert report.entries(points)[0]['nll'] == pytest.approx(1.3) and report.entries(points)[0]['nll_error'] > 0
    lines = report.table(real, points, 32).splitlines()
    assert len({text.count('|') for text in lines}) == 1
    assert lines[-1] == '| wavefront, 4 forward passes | - | - | - | - | - | - | - |'


# -----------------------------------------------------------------------------
# by command line

def test_a_table_two_figures_and_a_file(evaluated, models, tmp_path):
    flags = ['--passes', '1,2', '--decoders', 'naive-random,wavefront', '--temperatures', '0.8,1',
             '--judge', models / 'judge' / 'ckpt.pt']
    status, out, err = evaluated(*flags)
    assert status == 0, err
    assert re.search(r'validation NELBO \d\.\d+ ±\d\.\d+ nats per token, \d\.\d+ ±\d\.\d+ bits per character', out)
    for name in ('real text |', 'wavefront, 2 forward passes', 'ar_baseline, 31 forward passes |'):
        assert f'| {name}' in out
    result = json.loads((tmp_path / 'evaluation.json').read_text())
    assert len(result['settings']) == 2 * (1 + 2 + 2)
    for setting in result['settings'].values():
        assert 0 <= setting['measures']['judge']['value'] <= 1
        assert setting['seconds_1'] > 0 and setting['seconds_batch'] > 0
    for name in ('curves', 'frontier'):
        assert (tmp_path / f'{name}.png').stat().st_size > 5000 and (tmp_path / f'{name}.svg').exists()
    assert '| real text |' in (tmp_path / 'report.md').read_text()
    entries = json.loads((tmp_path / 'report.json').read_text())
    assert [(e['decoder'], e['passes']) for e in entries][0] == ('ar_baseline', 31) and len(entries) == 5

    # what is measured is kept: a run that goes on measures the rest alone
    gone = sorted(result['settings'])[0]
    del result['settings'][gone]
    for setting in result['settings'].values():
        setting['seconds_batch'] = 123.0
    (tmp_path / 'evaluation.json').write_text(json.dumps(result))
    assert evaluated(*flags)[0] == 0
    again = json.loads((tmp_path / 'evaluation.json').read_text())['settings']
    assert [key for key, setting in again.items() if setting['seconds_batch'] != 123.0] == [gone]

    # results of another seed, or of other code, are not replaced unless that is asked for
    before = (tmp_path / 'evaluation.json').read_bytes()
    status, _, err = evaluated(*flags, '--seed', 7)
    assert status == 2 and err.count('\n') == 1 and '--overwrite' in err
    assert 'seed 1337, now 7' in err and 'code' not in err
    result['identity']['code'] = 'another'
    (tmp_path / 'evaluation.json').write_text(json.dumps(result))
    status, _, err = evaluated(*flags)
    assert status == 2 and 'code another, now' in err and 'seed' not in err
    (tmp_path / 'evaluation.json').write_bytes(before)
    assert evaluated('--passes', 1, '--decoders', 'wavefront', '--temperatures', 1, '--seed', 7, '--overwrite')[0] == 0
    assert json.loads((tmp_path / 'evaluation.json').read_text())['identity']['seed'] == 7


@pytest.mark.parametrize('flags, models_of, message', [
    (['--num-samples', '0'], {}, '--num-samples is 0'), (['--passes', '1,x'], {}, "'1,x'"),
    (['--passes', '0'], {}, "'0'"),
    (['--decoders', 'oracle'], {}, '--decoders has oracle'), (['--seed', '-1'], {}, '--seed is -1'),
    (['--decoders', 'naive-remask', '--passes', '1'], {}, 'naive-remask nothing to do'),
    (['--temperatures', '0.8,-1'], {}, "'0.8,-1'"), (['--temperatures', 'nan'], {}, "'nan'"),
    ([], {'checkpoint': 'nowhere'}, 'config/train_char_diffusion_sampler.py'),
    ([], {'evaluator': 'nowhere'}, 'train one with python train.py config/train_char_ar.py'),
    ([], {'evaluator': 'generator'}, 'not causal'),
    ([], {'checkpoint': 'ar'}, 'autoregressive model, wanted'),
    (['--judge', 'nowhere.pt'], {}, 'train one with python train.py config/train_judge.py')])
def test_bad_input(evaluated, flags, models_of, message):
    status, _, err = evaluated(*flags, **models_of)
    assert status == 2 and message in err and err.count('\n') == 1


def test_a_head_that_is_missing(evaluated, models, train):
    if not (models / 'plain').exists():
        train(models / 'plain', *NO_HEADS)
    status, _, err = evaluated('--decoders', 'wavefront', checkpoint='plain')
    assert status == 2 and 'no sampler head, which --decoders wavefront needs' in err
    args = SimpleNamespace(decoders=tuple(recipes.RECIPES), named=False)
    plain = SimpleNamespace(sampler_head=None, critic_head=None)
    assert all(name.startswith('naive') for name in evaluate.usable_decoders(args, plain))


def test_heads_that_have_not_learned_are_said(evaluated, models, half_once):
    """Random heads were measured without a word."""
    if not (models / 'half').exists():
        (models / 'half').symlink_to(half_once)
    status, out, _ = evaluated('--passes', 1, '--decoders', 'wavefront', '--temperatures', 1, checkpoint='half')
    assert status == 0 and out.count('note: the critic head had not begun to learn') == 1 and out.count('note:') == 1
    status, out, _ = evaluated('--passes', 1, '--decoders', 'wavefront', '--temperatures', 1, '--overwrite')
    assert status == 0 and 'note:' not in out


def test_decoders_that_passes_leave_idle_are_said(evaluated):
    status, out, err = evaluated('--passes', 1, '--temperatures', 1, '--num-samples', 2)
    assert status == 0, err
    assert 'left out: naive-confidence, naive-margin, naive-remdm, naive-remask, naive-planned, wavefront-planned, ' \
        'speculative, wavefront-critic, to which --passes 1 leaves nothing to do' in out


def test_float64_is_what_it_says(evaluated, tmp_path, monkeypatch):
    """It once was float32, recorded as float64."""
    dtypes, plain = set(), evaluate.decoding.generate

    def generate(model, *args, **more):
        dtypes.update({p.dtype for p in model.parameters()} | {model(args[0]).dtype})
        return plain(model, *args, **more)
    monkeypatch.setattr(evaluate.decoding, 'generate', generate)
    status, out, err = evaluated('--passes', 1, '--decoders', 'wavefront', '--temperatures', 1, '--dtype', 'float64')
    assert status == 0 and 'cpu, float64' in out, err
    assert json.loads((tmp_path / 'evaluation.json').read_text())['identity']['dtype'] == 'float64'
    assert dtypes == {torch.float64}


def test_another_vocabulary_is_refused(evaluated, models, script, tmp_path):
    saved = torch.load(models / 'ar' / 'ckpt.pt', weights_only=True)
    saved['corpus'] = saved['corpus'] | {'name': 'other', 'chars': saved['corpus']['chars'][::-1]}
    torch.save(saved, tmp_path / 'ckpt.pt')
    status, _, err = evaluated('--evaluator', tmp_path / 'ckpt.pt')
    assert status == 2 and "'other', whose vocabulary" in err
    status, _, err = script('sample_simple.py', '--out-dir', models / 'generator', '--quality-metric', 'judge',
                            '--judge-checkpoint-name', tmp_path / 'ckpt.pt')
    assert status == 2 and "'other', whose vocabulary" in err


def test_help_names_every_default_once(script):
    status, out, _ = script('evaluate.py', '--help')
    assert status == 0 and 'None' not in out and ' '.join(out.split()).count('(default: out-evaluation)') == 1
