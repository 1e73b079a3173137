"""sample_simple.py as a user runs it: every flag of the guide, the file that --save writes, and what it refuses."""
import json
import re

import pytest


def samples(out):
    return re.findall(r'--- sample \d+.*?\n(.*?)\n(?=---)', out, re.S)


@pytest.fixture
def sample(script, trained):
    def call(*args, status=0):
        found, out, err = script('sample_simple.py', '--out-dir', trained, '--dtype', 'float64', '--no-progress', *args)
        assert found == status, err
        return err if status else out
    return call


def test_every_flag_of_the_guide(sample, trained):
    out = sample('--checkpoint-name', 'ckpt.pt', '--num-samples', 3, '--sequence-length', 64, '--iterations', 4, '--temperature', 0.8,
                 '--top-p', 0.95, '--schedule-mode', 'ratio', '--start-ratio', 0.95, '--end-ratio', 0.05, '--seed-text', 'the cat sat',
                 '--seed-placement', 'random', '--quality-metric', 'node', '--save', trained / 'o.json', '--verbose')
    texts = samples(out)
    assert len(texts) == 3 and all(len(t) == 64 and 'the cat sat' in t for t in texts)
    assert len({t.index('the cat sat') for t in texts}) > 1
    assert re.search(r'3 samples of 64 tokens in [\d.]+ s: 1[12] trunk passes, \d+ waves, [\d,]+ tokens/s', out)
    assert 'mean quality 0.' in out and '--- pass 4' in out and 'by wavefront' in out


def test_naive_and_wavefront_are_a_paired_comparison(sample):
    """The same seed and noise; where nothing lies beside a token the two place the same one."""
    first = ['--num-samples', 2, '--iterations', 1]
    wavefront, naive = samples(sample(*first)), samples(sample(*first, '--disable-sampler'))
    assert wavefront != naive
    assert samples(sample(*first)) == wavefront and samples(sample(*first, '--disable-sampler')) == naive
    assert samples(sample(*first, '--seed', 5)) != wavefront
    drawn = sample(*first, '--seed', -1)
    seed = re.search(r'^seed: (\d+)$', drawn, re.M).group(1)
    assert samples(sample(*first, '--seed', seed)) == samples(drawn)


def test_rows_do_not_depend_on_the_batch(sample):
    flags = ['--iterations', 3, '--seed-text', 'on a mat', '--seed-placement', 'random', '--randomness-strength', 1.0]
    whole = samples(sample('--num-samples', 5, *flags))
    assert samples(sample('--num-samples', 5, '--batch-size', 2, *flags)) == whole
    assert samples(sample('--num-samples', 2, *flags)) == whole[:2]


def test_prefix_stays_at_the_front(sample):
    assert all(t.startswith('the mat') for t in samples(sample('--seed-text', 'the mat', '--num-samples', 3, '--iterations', 2)))


@pytest.mark.parametrize('flags', [['--disable-sampler'], ['--order', 'critic'], ['--order', 'random'], ['--no-revise'],
                                   ['--corrections', 0], ['--corrections', 3, '--correction-ratio', 1],
                                   ['--schedule-mode', 'threshold', '--threshold', 0.9], ['--masking-ratios', '0.5,0.2'],
                                   ['--quality-metric', 'none'], ['--temperature', 0], ['--temperature', 1.2, '--end-temperature', 0], ['--dtype', 'bfloat16']])
def test_decoders_leave_no_mask(sample, flags):
    texts = samples(sample('--num-samples', 2, *flags))
    assert len(texts) == 2 and all(len(t) == 32 and '_' not in t for t in texts)


def test_saved_steps_tell_the_whole_story(sample, trained):
    sample('--num-samples', 2, '--iterations', 3, '--save', trained / 'o.json', '--seed-text', 'on')
    saved = json.loads((trained / 'o.json').read_text())
    assert list(saved)[0] == 'schema' and saved['settings']['seed'] == 1337 and saved['vocabulary']['name'] == 'toy'
    for s in saved['samples']:
        assert [step['iteration'] for step in s['iterations']] == [0, 1, 2]
        assert s['iterations'][-1]['output_unmasked'] == s['tokens'] and s['iterations'][-1]['remasked_indices'] == []
        for step, following in zip(s['iterations'], s['iterations'][1:]):
            masked = [i for i, token in enumerate(following['input_masked']) if token == saved['mask_id']]
            assert masked == step['remasked_indices'] and len(step['wave']) == len(step['wrongness']) == 32
            assert all(0 <= w <= 1 for w in step['wrongness'])


def test_plain_lines_where_there_is_no_terminal(script, trained):
    _, _, err = script('sample_simple.py', '--out-dir', trained, '--iterations', 2, '--num-samples', 2)
    assert re.search(r'rows 0-1, from token 0, pass 1: \d+ waves, 69% remasked', err) and '\r' not in err


@pytest.mark.parametrize('flags, message', [
    (['--iterations', 0], '--iterations is 0'), (['--num-samples', 0], '--num-samples is 0'), (['--start-ratio', 1.2], '--start-ratio is 1.2'),
    (['--masking-ratios', '0.5,2'], r'\[0.5, 2.0\]'), (['--masking-ratios', '0.5', '--iterations', 4], 'make 2 iterations'),
    (['--seed-text', 'the CAT'], "'ACT' is not in the vocabulary"), (['--seed-text', 'the ' * 20], '80 tokens'), (['--top-p', 0], '--top-p'),
    (['--corrections', -1], '--corrections is -1'), (['--correction-ratio', 2], '--correction-ratio is 2'),
    (['--temperature', -1], '--temperature'), (['--end-temperature', -1], '--end-temperature is -1'), (['--checkpoint-name', 'no.pt'], 'no checkpoint'), (['--out-dir', 'nowhere'], 'no checkpoint'),
    (['--save', 'nowhere/o.json'], "no folder 'nowhere'"), (['--device', 'abacus'], 'abacus'), (['--seed', -2], '--seed is -2')])
def test_bad_input_is_one_line(sample, flags, message):
    err = sample(*flags, status=2)
    assert re.search(message, err) and err.count('\n') == 1 and 'Traceback' not in err


@pytest.mark.parametrize('flags', [['--order', 'sideways'], ['--iterations', 'many'], ['--no-such-flag']])
def test_unknown_flags_and_words(sample, flags):
    assert 'usage' in sample(*flags, status=2)


def test_an_autoregressive_checkpoint_is_sent_to_evaluate(script, toy_data, tmp_path):
    from conftest import TINY
    status, out, err = script('train.py', *TINY, f'--data_dir={toy_data}', f'--out_dir={tmp_path}', '--attention_type=causal',
                              '--add_sampler_head=False', '--add_critic_head=False')
    assert status == 0, err
    assert 'Using causal attention' in out
    status, _, err = script('sample_simple.py', '--out-dir', tmp_path)
    assert status == 2 and 'evaluate.py' in err


def test_a_model_without_heads_decodes_naively(script, toy_data, tmp_path):
    from conftest import TINY
    script('train.py', *TINY, f'--data_dir={toy_data}', f'--out_dir={tmp_path}', '--add_sampler_head=False', '--add_critic_head=False')
    status, out, _ = script('sample_simple.py', '--out-dir', tmp_path, '--no-progress')
    assert status == 0 and 'naively' in out and 'quality' not in out
    for flags in (['--order', 'critic'], ['--quality-metric', 'node']):
        status, _, err = script('sample_simple.py', '--out-dir', tmp_path, *flags)
        assert status == 2 and 'no critic head' in err
