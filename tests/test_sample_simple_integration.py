"""sample_simple.py as a user runs it: every flag, the file that --save writes, and what it refuses."""
import collections
import json
import os
import re
import shutil

import pytest
import torch

import sample_simple
from conftest import NO_HEADS, TINY
from critic import CriticHead
from filling import HeadFiller


def samples(out):
    return re.findall(r'--- sample \d+.*?\n(.*?)\n(?=---)', out, re.S)


@pytest.fixture
def sample(script, trained_once):
    """sample('--flag') runs sample_simple.py on the trained model: stdout, or standard error where status is not 0."""
    def call(*args, status=0):
        found, out, err = script('sample_simple.py', '--out-dir', trained_once[0], '--dtype', 'float64',
                                 '--no-progress', *args)
        assert found == status, err
        return err if status else out
    return call


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no device that is always full')
def test_samples_are_shown_where_they_cannot_be_saved(script, trained_once):
    status, out, err = script('sample_simple.py', '--out-dir', trained_once[0], '--no-progress', '--save', '/dev/full')
    assert status == 2 and len(samples(out)) == 4 and err.startswith("error: cannot write '/dev/full'"), err


def test_every_flag(sample, tmp_path):
    out = sample('--checkpoint-name', 'ckpt.pt', '--num-samples', 3, '--sequence-length', 64, '--iterations', 4,
                 '--temperature', 0.8, '--top-p', 0.95, '--schedule-mode', 'ratio', '--start-ratio', 0.95,
                 '--end-ratio', 0.05, '--seed-text', 'the cat sat', '--seed-placement', 'random',
                 '--quality-metric', 'node', '--save', tmp_path / 'o.json', '--verbose')
    texts = samples(out)
    assert len(texts) == 3 and all(len(t) == 64 and 'the cat sat' in t for t in texts)
    assert len({t.index('the cat sat') for t in texts}) > 1
    assert re.search(r'3 samples of 64 tokens in [\d.]+ s: 1[12] forward passes, \d+ waves, [\d,]+ tokens/s', out)
    assert 'mean quality 0.' in out and '--- pass 4' in out and '░' in out and 'with the sampler head, plan' in out


def test_naive_and_wavefront_are_a_paired_comparison(sample):
    """The same seed and noise for both, another for another seed; --seed -1 says which one it drew."""
    first = ['--num-samples', 2, '--iterations', 1]
    wavefront, naive = samples(sample(*first)), samples(sample(*first, '--disable-sampler'))
    assert wavefront != naive
    assert samples(sample(*first)) == wavefront and samples(sample(*first, '--disable-sampler')) == naive
    assert samples(sample(*first, '--seed', 5)) != wavefront
    drawn = sample(*first, '--seed', -1)
    seed = re.search(r'^seed: (\d+)$', drawn, re.M).group(1)
    assert samples(sample(*first, '--seed', seed)) == samples(drawn)


def test_sequences_do_not_depend_on_the_batch(sample):
    flags = ['--iterations', 3, '--seed-text', 'on a mat', '--seed-placement', 'random', '--randomness-strength', 1.0]
    whole = samples(sample('--num-samples', 5, *flags))
    assert samples(sample('--num-samples', 5, '--batch-size', 2, *flags)) == whole
    assert samples(sample('--num-samples', 2, *flags)) == whole[:2]


def test_prefix_stays_at_the_front(sample):
    texts = samples(sample('--seed-text', 'the mat', '--num-samples', 3, '--iterations', 2))
    assert len(texts) == 3 and all(t.startswith('the mat') for t in texts)


def test_a_seed_text_that_fills_the_sequence_is_said(sample):
    """It once generated nothing, "mean quality 1.000"."""
    out = sample('--seed-text', 'the cat', '--sequence-length', 7)
    assert 'note: --seed-text fills the sequence, nothing is left to generate' in out and 'quality' not in out
    assert samples(out) == ['the cat'] * 4
    assert 'nothing is left' not in sample('--seed-text', 'the cat', '--sequence-length', 8, '--num-samples', 1)


@pytest.mark.parametrize('flags', [
    ['--disable-sampler'], ['--order', 'critic'], ['--order', 'random'], ['--no-revise'], ['--corrections', 0],
    ['--corrections', 3, '--correction-ratio', 1], ['--schedule-mode', 'threshold', '--threshold', 0.9],
    ['--masking-ratios', '0.5,0.2'], ['--quality-metric', 'none'], ['--temperature', 0],
    ['--temperature', 1.2, '--end-temperature', 0], ['--dtype', 'bfloat16']])
def test_decoders_leave_no_mask(sample, flags):
    texts = samples(sample('--num-samples', 2, *flags))
    assert len(texts) == 2 and all(len(t) == 32 and '_' not in t for t in texts)


def test_top_p_reaches_the_samples(sample):
    """A nucleus of one token is greedy decoding; the default keeps every token."""
    flags = ['--num-samples', 3, '--iterations', 3]
    greedy = samples(sample(*flags, '--temperature', 0))
    assert samples(sample(*flags, '--top-p', 1e-6)) == greedy
    assert samples(sample(*flags, '--top-p', 1.0)) == samples(sample(*flags)) != greedy


def test_threshold_obeys_no_revise_and_noise(sample, tmp_path):
    """It once gave the same text with and without these flags."""
    flags = ['--num-samples', 3, '--schedule-mode', 'threshold', '--threshold', 0.8, '--iterations', 6]
    plain = samples(sample(*flags))
    assert samples(sample(*flags, '--randomness-strength', 3.0)) != plain
    sample(*flags, '--no-revise', '--save', tmp_path / 'o.json')
    for s in json.loads((tmp_path / 'o.json').read_text())['samples']:
        masked = [set(step['remasked_indices']) for step in s['iterations']]
        assert all(later <= earlier for earlier, later in zip(masked, masked[1:])) and masked[0]


@pytest.mark.parametrize('flags', [(), ('--plan', 'blocks')])
def test_saved_steps_tell_the_whole_story(sample, tmp_path, flags):
    sample('--num-samples', 2, '--iterations', 3, '--save', tmp_path / 'o.json', '--seed-text', 'on', *flags)
    saved = json.loads((tmp_path / 'o.json').read_text())
    assert list(saved)[0] == 'schema' and saved['settings']['seed'] == 1337 and saved['vocabulary']['name'] == 'toy'
    for s in saved['samples']:
        assert [step['iteration'] for step in s['iterations']] == [0, 1, 2]
        assert s['iterations'][-1]['output_unmasked'] == s['tokens'] and s['iterations'][-1]['remasked_indices'] == []
        for step, following in zip(s['iterations'], s['iterations'][1:]):
            masked = [i for i, token in enumerate(following['input_masked']) if token == saved['mask_id']]
            assert masked == step['remasked_indices'] and len(step['wave']) == len(step['remask_score']) == 32
            assert all(0 <= score <= 1 for score in step['remask_score'])
        for step in s['iterations']:
            masked = {i for i, token in enumerate(step['input_masked']) if token == saved['mask_id']}
            assert masked >= set(step['corrected_indices']) and (not step['corrected_indices'] or not flags)


def test_saved_steps_tell_which_tokens_were_corrected(sample, tmp_path):
    """Of the second block too, whose positions count on; each was filled in that pass."""
    sample('--num-samples', 1, '--iterations', 2, '--sequence-length', 64, '--corrections', 2, '--save',
           tmp_path / 'o.json')
    saved, seen = json.loads((tmp_path / 'o.json').read_text()), set()
    for step in saved['samples'][0]['iterations']:
        masked = {p for p, token in enumerate(step['input_masked'], step['block_start']) if token == saved['mask_id']}
        assert step['corrected_indices'] and masked >= set(step['corrected_indices'])
        seen |= set(step['corrected_indices'])
    assert max(seen) > 32


@pytest.mark.parametrize('flags, rescored, judged', [
    (['--quality-metric', 'none'], 0, 0), ([], 0, 1), (['--no-progress', '--verbose'], 0, 1),
    (['--save', 'o.json', '--order', 'critic'], 4, 5)])
def test_only_what_the_flags_show_is_computed(sample, tmp_path, monkeypatch, flags, rescored, judged):
    """Four passes in blocks: scores are made after each of them to be saved, quality once; a bar needs neither."""
    calls = collections.Counter()
    for owner, name in ((HeadFiller, 'rescore'), (CriticHead, 'forward')):
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, plain=plain, name=name: calls.update([name]) or plain(*args))
    flags = [tmp_path / flag if flag == 'o.json' else flag for flag in flags]
    shown = sample('--num-samples', 2, '--iterations', 4, '--plan', 'blocks', '--plan-passes', 4, *flags)
    assert calls['rescore'] == rescored and calls['forward'] == judged and ('quality' in shown) == (judged > 0)


def test_plain_lines_where_there_is_no_terminal(script, trained_once):
    """A line for every tenth pass, with --verbose for every one: a pipe was full of them."""
    flags = ['--out-dir', trained_once[0], '--num-samples', 2, '--plan', 'blocks']
    _, _, err = script('sample_simple.py', *flags, '--iterations', 12)
    assert err.count('\n') == 1 and 'pass 10: ' in err
    _, _, err = script('sample_simple.py', *flags, '--iterations', 2, '--verbose')
    assert re.search(r'samples 0-1, from token 0, pass 1: 50% left to fill', err) and '\r' not in err


@pytest.mark.parametrize('flags, said', [
    ([], 'with the sampler head, plan speculative, at most 15 forward passes, '),
    (['--iterations', 1], 'with the sampler head, plan speculative, 1 forward pass, '),
    (['--order', 'critic', '--iterations', 3], 'with the sampler head, plan left-to-right, 3 forward passes, '),
    (['--disable-sampler', '--iterations', 2], 'naively, plan interleaved, 2 forward passes, '),
        (['--disable-sampler', '--plan-passes', 2, '--iterations', 3], 'naively, plan interleaved, 3 forward passes, '),
        (['--disable-sampler', '--start-ratio', 0.5, '--iterations', 2], 'naively, 2 forward passes, '),
    (['--disable-sampler', '--plan', 'random', '--iterations', 2], 'naively, plan random, 2 forward passes, '),
    (['--sequence-length', 64, '--iterations', 2], '2 forward passes over each of 3 windows, ')])
def test_the_first_line_says_how_it_decodes(sample, flags, said):
    """It said 'by wavefront' of text that is written from left to right."""
    line = sample('--num-samples', 1, *flags).split('\n')[0]
    assert said in line and ' wavefront' not in line


def test_the_first_line_tells_what_the_iterations_count(sample, trained, script):
    """The shipped model said 3000 of a trunk with 10,000."""
    assert 'ckpt.pt: iteration 12, trained on toy; ' in sample('--num-samples', 1, '--iterations', 1)
    saved = torch.load(trained / 'ckpt.pt', weights_only=True)
    saved['config']['freeze_trunk'] = True
    torch.save(saved, trained / 'ckpt.pt')
    _, out, _ = script('sample_simple.py', '--out-dir', trained, '--num-samples', 1, '--iterations', 1)
    assert 'ckpt.pt: heads of iteration 12 on a finished trunk, trained on toy; ' in out


@pytest.mark.parametrize('flags, message', [
    (['--iterations', 0], '--iterations is 0'), (['--num-samples', 0], '--num-samples is 0'),
    (['--start-ratio', 1.2], '--start-ratio is 1.2'), (['--masking-ratios', '0.5,2'], r'\[0.5, 2.0\]'),
    (['--masking-ratios', '0.5', '--iterations', 4], 'make 2 iterations'),
    (['--seed-text', 'the CAT'], "'ACT' is not in the vocabulary"), (['--seed-text', 'the ' * 20], '80 tokens'),
    (['--top-p', 0], '--top-p'), (['--corrections', -1], '--corrections is -1'),
    (['--correction-ratio', 2], '--correction-ratio is 2'), (['--temperature', -1], '--temperature'),
    (['--end-temperature', -1], '--end-temperature is -1'), (['--checkpoint-name', 'no.pt'], 'no checkpoint'),
    (['--out-dir', 'nowhere'], 'no checkpoint'), (['--save', 'nowhere/o.json'], "no folder 'nowhere'"),
    (['--device', 'abacus'], 'abacus'), (['--seed', -2], '--seed is -2'),
    (['--threshold', 0.5], '--threshold needs --schedule-mode threshold'),
    (['--schedule-mode', 'threshold', '--order', 'random'], 'neither --order random'),
    (['--schedule-mode', 'threshold', '--masking-ratios', '0.5'], 'nor --masking-ratios'),
    (['--schedule-mode', 'threshold', '--threshold', 1.5], '--threshold is 1.5'),
    (['--quality-metric', 'judge'], 'train_judge.py'),
    (['--quality-metric', 'node', '--judge-checkpoint-name', 'judge.pt'], 'both or neither'),
    (['--judge-checkpoint-name', 'judge.pt'], "no checkpoint '.*judge.pt'; train one with .* config/train_judge.py")])
def test_bad_input_is_one_line(sample, flags, message):
    err = sample(*flags, status=2)
    assert re.search(message, err) and err.count('\n') == 1 and 'Traceback' not in err


@pytest.mark.parametrize('flags, message', [
    ('--schedule-mode threshold --end-ratio 0.1', 'goes by --threshold'),
    ('--masking-ratios 0.5 --start-ratio 0.9', 'beside --masking-ratios'),
    ('--corrections 2 --disable-sampler', 'with --disable-sampler'),
    ('--correction-ratio 0.5', 'without --corrections'),
    ('--order random --randomness-strength 2', 'with --order random'),
    ('--order random --remask-kept 0.1 --iterations 2', 'with 1 of 2 iterations to revise'),
    ('--remask-kept 0.1', 'without --order random'), ('--order random --remask-kept 0.1 --no-revise', 'no kept token'),
    ('--order random --no-revise', 'leave out --no-revise'), ('--no-revise --iterations 2', 'with 1 of 2 iterations'),
    ('--end-ratio 0.1 --iterations 2', 'with 1 of 2 iterations'),
    ('--masking-ratios 0.5 --no-revise', 'give more --masking-ratios'),
    ('--iterations 6 --plan-passes 5 --end-ratio 0.1', 'with 1 of 6 iterations'),
    ('--end-temperature 0.5 --iterations 1', '--end-temperature with one iteration'),
    ('--iterations 4 --plan-passes 4 --order random', 'leaves none to revise'),
    ('--no-revise --iterations 1', 'nothing is revised'), ('--start-ratio 0.5 --iterations 1', 'nothing is revised'),
    ('--blank %', 'without --template'), ('--seed-placement random', 'without --seed-text')])
def test_flags_that_would_be_ignored_are_named(sample, flags, message):
    err = sample(*flags.split(), status=2)
    assert err.startswith(('error: found --', 'error: plan')) or 'one iteration' in err
    assert message in err and err.count('\n') == 1


def test_a_head_that_has_not_begun_to_learn_is_left_out(script, half_once):
    """Samples were ordered and scored by random weights; the advice was to leave out the head that had learned."""
    _, out, _ = script('sample_simple.py', '--out-dir', half_once, '--num-samples', 1)
    assert 'note: the critic head had not begun' in out and 'with the sampler head' in out and 'quality' not in out
    status, _, err = script('sample_simple.py', '--out-dir', half_once, '--order', 'critic')
    assert status == 2 and 'no critic head' in err


def test_corrections_need_a_head(script, train, tmp_path):
    train(tmp_path, *NO_HEADS, '--max_iters=1')
    status, _, err = script('sample_simple.py', '--out-dir', tmp_path, '--corrections', 2)
    assert status == 2 and 'no sampler head that has learned, which --corrections needs' in err


@pytest.mark.parametrize('flags', [
    '--num-samples 16 --sequence-length 1024 --iterations 15', '--num-samples 16 --save sampler_enabled.json',
    '--num-samples 16 --save sampler_disabled.json --disable-sampler',
    '--num-samples 16 --sequence-length 1024 --iterations 15 --temperature 0.8 --top-p 0.95 --schedule-mode ratio '
    '--start-ratio 0.95 --end-ratio 0.05 --seed-text words --seed-placement random --quality-metric judge '
    '--judge-checkpoint-name judge_model.pt --save output.json --verbose'])
def test_flags_go_together(flags):
    """Those of its four commands, as it writes them."""
    args = sample_simple.parser().parse_args(f'--out-dir out-char-diffusion --checkpoint-name ckpt.pt {flags}'.split())
    sample_simple.check(args)
    assert (args.blank, args.correction_ratio, args.iterations) == ('_', 0.6, 15)


@pytest.mark.parametrize('flags', [['--order', 'sideways'], ['--iterations', 'many'], ['--no-such-flag']])
def test_unknown_flags_and_words(sample, flags):
    assert 'usage' in sample(*flags, status=2)


def test_help_fits_two_screens_of_80_columns(sample, monkeypatch):
    """It had 126 lines."""
    monkeypatch.setenv('COLUMNS', '80')
    lines = sample('--help').splitlines()
    assert 40 < len(lines) <= 90 and max(map(len, lines)) < 80 and lines[0] == 'usage: sample_simple.py [flags]'
    groups = [line for line in lines if line.endswith(':') and not line.startswith(' ')]
    assert groups == ['options:', 'what to generate:', 'how to decode: order:', 'how to decode: tokens:',
                      'how to decode: revising:', 'output:', 'machine:']


def test_help_tells_each_default_once(sample):
    """It once said "(default: None)" after "(default: 15)"."""
    text = sample('--help')
    options = re.split(r'\n  (?=-)', text.split('show this help')[1])[1:]
    assert len(options) > 25
    for option in options:
        assert len(re.findall(r'\bdefaults?\b', option)) <= 1 and 'None' not in option and 'False' not in option, option
    assert '(default: 15)' in text and '(default: 0.8)' in text


def test_commands_for_a_judge(script, toy_data, trained_once, tmp_path):
    """config/train_judge.py writes the file that --judge-checkpoint-name names, and the name alone implies the metric.

    Nothing wrote a judge_model.pt, and --judge-checkpoint-name without --quality-metric judge was refused.
    """
    shutil.copy(trained_once[0] / 'ckpt.pt', tmp_path)
    flags = ['--num-samples', 2, '--iterations', 2, '--no-progress', '--dtype', 'float32']
    status, out, err = script(
        'train.py', 'config/train_judge.py', *TINY[1:], *NO_HEADS, f'--data_dir={toy_data}', f'--out_dir={tmp_path}',
        f'--generator_checkpoint={tmp_path / "ckpt.pt"}', '--max_iters=4', '--eval_interval=2')
    assert status == 0 and "starts from the generator's trunk" in out, err
    judge = ['--judge-checkpoint-name', 'judge_model.pt']
    outs = []
    for metric in ([], ['--quality-metric', 'judge']):
        status, out, err = script('sample_simple.py', '--out-dir', tmp_path, *flags, *judge, *metric)
        assert status == 0 and re.search(r'mean quality 0\.\d+, by judge_model.pt', out), err
        outs.append(samples(out) + re.findall(r'quality ([\d.]+)', out))
    assert outs[0] == outs[1] and len(outs[0]) == 2 + 3


def test_a_model_without_heads_decodes_naively(script, train, tmp_path):
    train(tmp_path, *NO_HEADS, '--max_iters=2', '--eval_interval=2')
    status, out, _ = script('sample_simple.py', '--out-dir', tmp_path, '--no-progress')
    assert status == 0 and 'naively' in out and 'quality' not in out
    for flags in (['--order', 'critic'], ['--quality-metric', 'node']):
        status, _, err = script('sample_simple.py', '--out-dir', tmp_path, *flags)
        assert status == 2 and 'no critic head' in err and err.count('\n') == 1


def test_byte_pairs_end_to_end(script, tmp_path, monkeypatch):
    """Byte pairs, here single bytes, for GPT-2's table needs a network: prepare, train, sample."""
    import tiktoken
    import corpus
    ranks = {bytes([i]): i for i in range(256)}
    encoding = tiktoken.Encoding('bytes', pat_str=r'.|\n', mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(corpus, 'gpt2_encoding', lambda: encoding)
    monkeypatch.setattr(corpus, 'BPE_SIZE', 3000)    # most ids never occur, as with GPT-2's 50,257
    text = 'déjà vu and a cat sat on the mat.\n' * 40
    corpus.prepare_text('bpe', text, 'test', kind='gpt2', data_dir=str(tmp_path))
    status, out, err = script('train.py', *TINY, '--dataset=bpe', f'--data_dir={tmp_path}',
                              f'--out_dir={tmp_path / "out"}', '--max_iters=7')
    assert status == 0, err
    found = re.search(r'iter 7: val NELBO (\S+) nats per token, (\S+) bits per character', out).groups()
    nats, bits = map(float, found)
    assert bits == pytest.approx(nats / 0.6931472 * 36 / 34, rel=0.02), '36 bytes for 34 characters'
    # ids beyond the bytes have no text
    monkeypatch.setattr(encoding, 'decode', lambda ids: ''.join(f'<{i}>' for i in ids))
    status, out, err = script('sample_simple.py', '--out-dir', tmp_path / 'out', '--iterations', 2, '--num-samples', 1,
                              '--seed-text', 'cat')
    assert status == 0, err
    assert '<99><97><116>' in out
