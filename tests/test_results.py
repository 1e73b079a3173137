"""Files of results: read back whole, never replaced by those of other models, text or code."""
import json
import math
import os

import pytest

import figures
import likelihood_table
import report
import results
from conftest import imported_by
from errors import InputError, WriteError
from test_evaluate import line, real_text


def test_results_that_cannot_be_read_are_not_replaced(evaluated, tmp_path):
    (tmp_path / 'evaluation.json').write_text('{"half')
    status, _, err = evaluated('--passes', 1, '--decoders', 'wavefront')
    assert status == 2 and 'cannot be read as results' in err and (tmp_path / 'evaluation.json').read_text() == '{"half'


@pytest.mark.parametrize('name, flags', [('evaluation.json', []), ('likelihood.json', ['--likelihood'])])
def test_a_pipe_in_place_of_results_is_not_waited_for(evaluated, models, tmp_path, name, flags):
    os.mkfifo(tmp_path / name)
    status, _, err = evaluated(*flags, samples=not flags)
    assert status == 2 and f'{name}\': it is no file' in err and err.count('\n') == 1


def test_a_folder_that_cannot_be_written_is_found_before_anything_is_measured(evaluated, tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'access', lambda path, mode: path != str(tmp_path))    # root may write anywhere
    for flags in ([], ['--likelihood'], ['--gaps']):
        status, out, err = evaluated(*flags, samples=not flags, evaluator='' if '--gaps' in flags else 'ar')
        assert status == 2 and 'it is read-only; wanted a folder' in err and not out and not os.listdir(tmp_path)


def test_likelihoods_of_another_model_are_not_replaced(evaluated, models, tmp_path, monkeypatch):
    """They went without a word."""
    monkeypatch.setattr(likelihood_table, 'SEQUENCES', 2)
    monkeypatch.setattr(likelihood_table, 'BATCH', 2)
    flags = ['--likelihood', '--passes', '1,2']
    assert evaluated(*flags, samples=False)[0] == 0
    found, of = (json.loads((tmp_path / f'likelihood{name}.json').read_text()) for name in ('', '_identity'))
    assert found[0]['decoder'] == 'nelbo' and of['identity']['passes'] == [1, 2]
    assert set(found[-1]) == {'decoder', 'plan', 'passes', 'passes_made', 'waves', 'nats_per_token', 'error',
                              'minus_baseline', 'minus_baseline_error', 'bits_per_character', 'seconds', 'seconds_1'}
    assert [entry['minus_baseline'] for entry in found[:2]] == [None, None], 'the bound and the baseline'
    for entry in found[2:]:
        assert entry['minus_baseline'] == pytest.approx(entry['nats_per_token'] - found[1]['nats_per_token'])
    assert all(entry[key] > 0 for entry in found[1:] for key in ('seconds', 'seconds_1'))
    assert [entry['passes_made'] for entry in found if entry['decoder'] == 'naive'][:2] == [1, 2]
    assert (tmp_path / 'likelihood.png').exists() and (tmp_path / 'likelihood.svg').exists()
    assert evaluated(*flags, samples=False)[0] == 0, 'the same again'
    before = (tmp_path / 'likelihood.json').read_bytes()
    for change, named in ((['--seed', 7], 'seed 1337, now 7'), (['--passes', 1], 'passes [1, 2], now [1]'),
                          (['--plans', 'random'], "plans [], now ['random']")):
        status, _, err = evaluated(*flags, *change, samples=False)
        assert status == 2 and named in err and (tmp_path / 'likelihood.json').read_bytes() == before
    assert evaluated(*flags, '--seed', 7, '--overwrite', samples=False)[0] == 0
    assert json.loads((tmp_path / 'likelihood_identity.json').read_text())['identity']['seed'] == 7
    (tmp_path / 'likelihood_identity.json').unlink()
    status, _, err = evaluated(*flags, '--seed', 7, samples=False)
    assert status == 2 and 'is not known' in err


def test_a_short_text_is_not_measured_twice_and_seconds_are_those_of_whole_batches(evaluated, models, tmp_path,
                                                                                    monkeypatch):
    lengths, plain = set(), likelihood_table.Sampling.__init__
    monkeypatch.setattr(likelihood_table, 'BATCH', 4)
    monkeypatch.setattr('corpus.Corpus.room', lambda self, split, n, length: 2)
    monkeypatch.setattr(likelihood_table.Sampling, '__init__', lambda self, evaluation, first, entry: lengths.add(
        len(first)) or plain(self, evaluation, first, entry))
    status, out, _ = evaluated('--likelihood', '--passes', '2', '--plans', 'interleaved', samples=False)
    assert status == 0 and '\n2 validation sequences of 32 tokens' in out and lengths == {1, 4}


def test_a_table_of_the_plans_that_are_asked_for(evaluated, models, tmp_path, monkeypatch):
    monkeypatch.setattr(likelihood_table, 'SEQUENCES', 2)
    monkeypatch.setattr(likelihood_table, 'BATCH', 2)
    flags = ['--likelihood', '--passes', '2', '--plans']
    assert evaluated(*flags, 'interleaved,speculative', samples=False)[0] == 0
    found = json.loads((tmp_path / 'likelihood.json').read_text())
    assert [(entry['decoder'], entry['plan']) for entry in found[2:]] == [
        ('naive', 'interleaved'), ('sampler_head', 'interleaved'), ('sampler_head', 'speculative'),
        ('sampler_head', 'speculative')]
    status, _, err = evaluated(*flags, 'zigzag', samples=False)
    assert status == 2 and "--plans has 'zigzag', wanted some of random,interleaved" in err
    status, out, _ = evaluated('--likelihood', '--passes', '2,1000', '--plans', 'interleaved', '--overwrite',
                               samples=False)
    assert status == 0 and 'left out: 1000 passes, for a sequence has 32 tokens' in out
    status, _, err = evaluated('--plans', 'random')
    assert status == 2 and '--plans goes with --likelihood' in err


@pytest.mark.parametrize('flags', [['--judge', 'x'], ['--decoders', 'wavefront'], ['--temperatures', '1'],
                                   ['--num-samples', '4']])
def test_flags_that_a_likelihood_ignores_are_named(evaluated, flags):
    status, _, err = evaluated('--likelihood', *flags, samples=False)
    assert status == 2 and f'--likelihood goes without {flags[0]}' in err


def whole_result():
    """An evaluation.json that report.py can read."""
    settings = line('naive-random', 2) + line('wavefront', 2)
    identity = {'num_samples': 8, 'length': 32, 'seed': 1, 'hardware': 'x', 'device': 'cpu', 'dtype': 'float32',
                'torch': '2'}
    return {'identity': identity,
            'reference': {'real text': real_text()}, 'settings': {str(i): entry for i, entry in enumerate(settings)},
            'validation': dict.fromkeys(results.VALIDATION, 2.0), 'checkpoint': 'c', 'corpus': 't', 'batch': 8}


def damaged(value):
    """Copies of a JSON value in which one thing is gone or another: keys are taken in turn, of lists the first."""
    if isinstance(value, dict):
        for key in value:
            yield {k: v for k, v in value.items() if k != key}
            yield from (value | {key: other} for other in damaged(value[key]))
    elif isinstance(value, list):
        yield value[1:]
        yield from ([other, *value[1:]] for other in damaged(value[0]))
    yield from (None, 'text', [], {}, math.nan)


def test_damaged_results_are_one_line(tmp_path):
    """Whatever is read is enough for a report: what was not came to light there, as a KeyError."""
    path, refused = tmp_path / 'evaluation.json', 0
    result = whole_result()
    for other in [result, *({**result, key: value} for key in ('reference', 'validation', 'settings')
                            for value in damaged(result[key]))]:
        path.write_text(json.dumps(other))
        try:
            found = results.read(str(path), result['identity'], results.check_evaluation)
        except InputError as error:
            assert 'cannot be read as results' in str(error)
            refused += 1
            continue
        settings, real = list(found['settings'].values()), found['reference']['real text']
        points = report.best_points(settings, real)
        report.heading(found, settings), report.table(real, points, 8), report.sentences(points, 8)
        json.dumps(report.entries(points))
    assert refused > 300


def test_a_full_disk_under_a_figure_is_one_line(tmp_path):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    if not os.path.exists('/dev/full'):
        pytest.skip('no /dev/full')
    figure = plt.figure()
    figures.save(figure, str(tmp_path / 'fine'))
    assert (tmp_path / 'fine.png').read_bytes()[:4] == b'\x89PNG' and b'<svg' in (tmp_path / 'fine.svg').read_bytes()
    os.symlink('/dev/full', tmp_path / 'curves.png')
    with pytest.raises(WriteError, match='No space left'):
        figures.save(figure, str(tmp_path / 'curves'))
    plt.close(figure)


def test_code_version_moves_with_the_code(monkeypatch):
    version = results.code_version()
    assert version == results.code_version()
    monkeypatch.setattr(results, 'SOURCES', results.SOURCES[1:])
    assert version != results.code_version()


def test_all_modules_that_decide_results_are_in_the_code_version():
    """Of those that evaluate.py imports, by way of others too, these only load, check, show or write."""
    deciding_nothing = {'checkpoint', 'choices', 'configurator', 'distributed', 'environment', 'errors', 'figures',
                        'files', 'finite', 'heartbeat', 'memory', 'progress', 'report', 'results', 'schedules',
                        'settings', 'sharding', 'signals', 'tables'}
    found, todo = {'evaluate'}, ['evaluate']
    while todo:
        todo += (new := imported_by(todo.pop()) - found)
        found |= new
    assert found - deciding_nothing == set(results.SOURCES)
