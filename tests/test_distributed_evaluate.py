"""torchrun evaluate.py: processes share settings and plans, and what is printed and written is that of one process."""
import json
import signal
import time

import pytest

from conftest import NO_HEADS, contents_of, start_both, start_two


@pytest.fixture(scope='module')
def flags(train, trained_once, toy_data, tmp_path_factory):
    """Those of evaluate.py for a tiny generator and a causal evaluator."""
    evaluator = tmp_path_factory.mktemp('ar')
    train(evaluator, *NO_HEADS, '--attention_type=causal', '--max_iters=2', '--eval_interval=2')
    return ['--checkpoint', trained_once[0] / 'ckpt.pt', '--evaluator', evaluator / 'ckpt.pt', '--data-dir', toy_data,
            '--dtype', 'float32', '--no-progress']


def without_seconds(value):
    """The same of nested dicts and lists, without what the clock says and the command."""
    if isinstance(value, dict):
        return {k: without_seconds(v) for k, v in value.items() if not k.startswith('seconds') and k != 'command'}
    return [without_seconds(v) for v in value] if isinstance(value, list) else value


def read(path):
    return json.loads(path.read_text())


def test_shared_settings_equal_those_of_one_process(script, flags, tmp_path):
    """Real text, bound and three of six settings are gone from the file: two processes measure them, and no others."""
    flags = [*flags, '--num-samples', 4, '--passes', 2, '--decoders', 'naive-random,wavefront', '--temperatures',
             '0.8,1']
    one, two = tmp_path / 'one', tmp_path / 'two'
    status, printed, err = script('evaluate.py', *flags, '--out-dir', one)
    assert not status, err
    result = read(one / 'evaluation.json')
    kept = dict(list(result['settings'].items())[::2])
    del result['validation']
    two.mkdir()
    (two / 'evaluation.json').write_text(json.dumps(
        result | {'reference': {}, 'settings': {key: value | {'seconds_1': 1e6} for key, value in kept.items()}}))
    out = start_two('evaluate.py', *flags, '--out-dir', two)

    again, result = read(two / 'evaluation.json'), read(one / 'evaluation.json')
    assert without_seconds(again) == without_seconds(result) and len(result['settings']) == 6
    assert {key for key, setting in again['settings'].items() if setting['seconds_1'] == 1e6} == set(kept)
    assert without_seconds(read(two / 'report.json')) == without_seconds(read(one / 'report.json'))
    assert set(contents_of(one)) == set(contents_of(two)) and out.count('\n') == printed.count('\n')
    assert out.splitlines()[0] == printed.splitlines()[0]


def test_shared_plans_equal_those_of_one_process(script, flags, tmp_path):
    flags = ['--likelihood', *flags, '--passes', 2]
    status, printed, err = script('evaluate.py', *flags, '--out-dir', tmp_path / 'one')
    assert not status, err
    out = start_two('evaluate.py', *flags, '--out-dir', tmp_path / 'two')
    one, two = (read(tmp_path / name / 'likelihood.json') for name in ('one', 'two'))
    assert without_seconds(one) == without_seconds(two) and [e['decoder'] for e in two[:2]] == ['nelbo', 'ar_baseline']
    columns = [[line.split('|')[:-3] for line in text.splitlines() if line.startswith('|')] for text in (printed, out)]
    assert columns[0] == columns[1] and len(columns[0]) == 2 + len(one)
    assert set(contents_of(tmp_path / 'one')) == set(contents_of(tmp_path / 'two'))


def test_a_signal_to_one_process_keeps_what_all_have_measured(flags, tmp_path):
    """Both end their setting, the first writes the two, and both leave with the signal's status."""
    temperatures = ','.join(f'{0.5 + i / 100:g}' for i in range(100))
    started = start_both('evaluate.py', *flags, '--num-samples', 4, '--passes', 2, '--decoders', 'naive-random',
                         '--out-dir', tmp_path, '--temperatures', temperatures)
    path, end = tmp_path / 'evaluation.json', time.time() + 60
    while not path.exists() or not read(path)['settings']:
        assert time.time() < end
        time.sleep(0.01)
    started[1].send_signal(signal.SIGTERM)
    (out, err), (others, noted) = (process.communicate(timeout=60) for process in started)
    assert [process.returncode for process in started] == [143, 143], err
    assert out == 'SIGTERM: what is measured is kept, the same command goes on with it\n' and others == ''
    assert 'ending after this setting' in noted and len(read(path)['settings']) in range(2, 200, 2)
