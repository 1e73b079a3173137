"""Bad input by the hundred: whatever comes, the program works or says in one line what is wrong. No traceback, no hang.

At least 300 kinds of settings, flags, checkpoints, corpora and saved samples, generated from one seed. A kind is a name
and a call that must raise InputError, or, where damage may hit nothing, may also return.
"""
import contextlib
import io
import json
import os
import shutil
import sys
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import checkpoint
import corpus
import evaluate
import metrics_log
import resume
import sample_simple
import settings
import train
import view
from configurator import configure
from conftest import NO_HEADS, TINY, checkpoint_in
from errors import InputError
from model import GPTConfig

SEED = 13


def outcome(call, may_work=False):
    """'' where call() ends as bad input may, else what happened."""
    quiet = io.StringIO()
    try:
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            call()
    except InputError as error:
        return '' if str(error) and '\n' not in str(error) else f'message {str(error)!r}'
    except SystemExit as stop:    # argparse
        return '' if stop.code == 2 else f'status {stop.code}'
    except Exception as error:
        return f'{type(error).__name__}: {error}'
    return '' if may_work else 'accepted'


def assert_all_named(kinds, at_least, may_work=False):
    kinds = dict(kinds)
    wrong = {name: what for name, call in kinds.items() if (what := outcome(call, may_work))}
    assert not wrong, '\n'.join(f'{name}: {what}' for name, what in wrong.items())
    assert len(kinds) >= at_least, f'{len(kinds)} kinds'


# -----------------------------------------------------------------------------
# settings of train.py

def checked(*flags):
    return lambda: settings.check(SimpleNamespace(**configure(train.settings, [*flags])))


def bad_settings():
    """Every setting with values that it cannot have."""
    for name, default in train.settings.items():
        values = []
        if name in settings.RANGES:
            allowed = settings.RANGES[name]
            values = ['nan', 'inf', '-inf', 'many', '', '1e400', allowed.low - 1, -10 ** 30]
            values += [allowed.high + 1] if allowed.high < float('inf') else []
            values += [allowed.high] * allowed.below + [0.5, 1e3, '1e3'] * isinstance(default, int)
        elif isinstance(default, bool):
            values = ['yes', '2', '']
        elif name in settings.CHOICES:
            values = ['', 'none', 'float64', f'{default} ']
        elif name in settings.NOT_EMPTY + settings.NAMES:
            values = ['a\0b'] + [''] * (name in settings.NOT_EMPTY) + ['a/b', '..' + os.sep] * (name in settings.NAMES)
        for value in values:
            yield f'--{name}={value}', checked(f'--{name}={value}')


def contradictions():
    heads = ['--add_sampler_head=True', '--add_critic_head=True']
    for flags in (
            [*heads, '--freeze_trunk=True', '--start_sampler_iteration=0'], [f'--max_iters=1{"0" * 400}'],
            ['--n_head=0'], ['--n_head=5'], ['--n_head=384'], ['--n_embd=1'], ['--freeze_trunk=True'],
            ['--attention_type=causal', *heads], ['--model_mode=sequence_scorer'], ['--generator_checkpoint=x.pt'],
            ['--model_mode=sequence_scorer', '--generator_checkpoint=x.pt', '--attention_type=causal'],
            [*heads, '--start_critic_iteration=10'], [*heads, '--end_critic_iteration=10'],
            [*heads, '--max_iters=10'], [*heads, '--start_critic_iteration=9000', '--end_critic_iteration=9001'],
            ['--lr_decay_iters=100'], ['--lr_decay_iters=1'], ['--checkpoint_name=ckpt_best.pt'],
            ['--checkpoint_name=ckpt_last.pt'], ['--checkpoint_name=ckpt'], ['--checkpoint_name=..'],
            ['--nlayer=3'], ['n_layer=3'], ['nowhere.py'], ['--n_layer']):
        yield ' '.join(flags), checked(*flags)


def test_every_setting_says_what_it_cannot_be():
    assert_all_named([*bad_settings(), *contradictions()], at_least=330)


# -----------------------------------------------------------------------------
# checkpoints

def damaged_dicts(saved):
    """Checkpoints of which one thing is changed: {name: (function that changes it, whether only a resume minds)}."""
    def put(*path_and_value):
        *path, key, value = path_and_value

        def change(found):
            for name in path:
                found = found[name]
            if value is KeyError:
                del found[key]
            else:
                found[key] = value
        return change
    always = ('model_args', 'model', 'iter_num', 'config', 'corpus')
    for name in (*always, 'optimizer', 'scaler', 'start_iter', 'best_val_loss'):
        for value in (KeyError, None, 'text', [1, 2], -1, {'a': 1}):
            yield f'{name} is {value!r}', put(name, value), name not in always or (name, value) == ('config', {'a': 1})
    for field in fields(GPTConfig):
        for value in (None, 'text', -1, 10 ** 12, float('nan')):
            if not (field.name.endswith('iteration') and value == 10 ** 12) and (field.name, value) != (
                    'critic_alpha', 10 ** 12):
                yield f'model_args.{field.name} is {value!r}', put('model_args', field.name, value), False
    yield 'model_args.depth', put('model_args', 'depth', 3), False
    weight = 'h.0.attn.qkv.weight'
    whole = saved['model'][weight]
    for what, value in {
            'nan': whole * float('nan'), 'inf': whole + float('inf'), 'a list': whole.tolist(), 'ints': whole.long(),
            'transposed': whole.T, 'expanded': whole[:1].expand_as(whole), 'sparse': whole.to_sparse(),
            'none': KeyError, 'complex': whole.to(torch.complex64), 'half of it': whole[::2].clone()}.items():
        yield f'{weight} is {what}', put('model', weight, value), False
    for name in corpus.META:
        for value in (KeyError, None, -5):
            yield f'corpus.{name} is {value!r}', put('corpus', name, value), False
    moments = saved['optimizer']['trunk'][1]['state'][0]
    first = 'optimizer', 'trunk', 1, 'state', 0
    yield 'moments are nan', put(*first, 'exp_avg', moments['exp_avg'] * float('nan')), True
    yield 'moments have another shape', put(*first, 'exp_avg', torch.zeros(3)), True
    yield 'no step', put(*first, 'step', KeyError), True
    yield 'no groups', put('optimizer', 'trunk', 1, 'param_groups', []), True
    yield 'one optimizer', put('optimizer', 'trunk', saved['optimizer']['trunk'][:1]), True
    yield 'no trunk in it', put('optimizer', 'trunk', KeyError), True
    for name in ('trunk', 'sampler', 'critic'):
        for value in (KeyError, None, -1, 1.5):
            yield f'start_iter.{name} is {value!r}', put('start_iter', name, value), True
    yield 'config without dtype', put('config', 'dtype', KeyError), True
    yield 'best is nan', put('best_val_loss', float('nan')), True


@pytest.fixture
def resumable(trained_once, toy_data):
    """(settings of the run in trained_once, its corpus)."""
    config = SimpleNamespace(**configure(train.settings, [
        *TINY, f'--out_dir={trained_once[0]}', f'--data_dir={toy_data}', '--init_from=resume', '--max_iters=18']))
    return config, corpus.Corpus('toy', str(toy_data))


def resume_from(path, config, data):
    """All that a resumed run does with a checkpoint before its first iteration."""
    saved = resume.load_for_resume(path, config, data.meta)
    model = train.GPT(GPTConfig(**saved['model_args']))
    state = train.State(model, train.make_optimizers(config, model), torch.amp.GradScaler('cpu', enabled=False), {})
    resume.restore(state, saved, {'trunk': 0, 'sampler': 3, 'critic': 6}, path)


def test_a_checkpoint_with_one_thing_wrong_is_named(trained_once, resumable, tmp_path):
    path = str(tmp_path / 'ckpt.pt')

    def kinds():
        for name, change, resume_alone in damaged_dicts(checkpoint_in(trained_once[0])):
            def call(change=change, resume_alone=resume_alone):
                saved = checkpoint_in(trained_once[0])
                change(saved)
                torch.save(saved, path)
                if not resume_alone:
                    with pytest.raises(InputError):
                        checkpoint.load_model(path)
                resume_from(path, *resumable)
            yield name, call
    shutil.copy(trained_once[0] / 'ckpt.pt', path)
    resume_from(path, *resumable)
    assert_all_named(kinds(), at_least=150)


def test_flipped_and_missing_bytes_are_noticed(trained_once, tmp_path):
    """What loads in spite of them is what was saved."""
    data, rng = (trained_once[0] / 'ckpt.pt').read_bytes(), np.random.default_rng(SEED)
    whole = checkpoint_in(trained_once[0])
    path = tmp_path / 'ckpt.pt'

    def load():
        found = checkpoint.load_model(str(path))[2]
        assert all(torch.equal(found['model'][name], w) for name, w in whole['model'].items()), 'other weights'

    def flipped(at, bit):
        def call():
            path.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1:])
            load()
        return call

    def cut(length):
        return lambda: [path.write_bytes(data[:length]), load()]
    assert_all_named(((f'bit {bit} of byte {at}', flipped(at, bit)) for at, bit in zip(
        rng.integers(0, len(data), 40).tolist(), rng.integers(0, 8, 40).tolist())), 40, may_work=True)
    assert_all_named(((f'{n} bytes', cut(n)) for n in rng.integers(0, len(data), 10).tolist()), 10)


# -----------------------------------------------------------------------------
# corpora and texts

def test_a_damaged_corpus_is_named(toy_data, tmp_path):
    meta, rng = json.loads((toy_data / 'toy' / 'meta.json').read_text()), np.random.default_rng(SEED)
    ids = (toy_data / 'toy' / 'val.bin').read_bytes()
    folder = tmp_path / 'toy'

    def read(name, data):
        def call():
            shutil.copytree(toy_data / 'toy', folder, dirs_exist_ok=True)
            os.remove(folder / name)
            if data is not None:
                (folder / name).write_bytes(data)
            corpus.Corpus('toy', str(tmp_path))
        return call

    def kinds():
        for name in corpus.META:
            for value in (None, -1, 'text', [1], {'a': 1}, 10 ** 20, True, 0.5):
                if not (isinstance(value, corpus.META[name]) and name in ('name', 'source', 'sha256')) and not (
                        name.endswith('_chars') and value == 10 ** 20):
                    yield f'{name}={value!r}', read('meta.json', json.dumps(meta | {name: value}).encode())
            yield f'no {name}', read('meta.json', json.dumps({k: v for k, v in meta.items() if k != name}).encode())
        for data in (b'', b'{', b'[]', b'null', b'\xff\xfe', b'[' * 10 ** 5, json.dumps(meta).encode()[:-9], None):
            yield f'meta.json is {str(data)[:12]}', read('meta.json', data)
        for at in rng.integers(0, len(ids), 6).tolist():
            for byte in (b'\xff', bytes([ids[at] ^ 1])):
                yield f'val.bin with {byte} at {at}', read('val.bin', ids[:at] + byte + ids[at + 1:])
        for data in (None, b'', b'x', ids[:-1], ids[:-2], ids + b'\0', ids + b'\0\0'):
            yield f'val.bin of {data and len(data)}', read('val.bin', data)
    assert_all_named(kinds(), at_least=90)


def test_texts_that_can_be_no_corpus(tmp_path):
    def prepare(data, name='mine', folder=None):
        def call():
            (tmp_path / 'my.txt').write_bytes(data)
            text = corpus.read_text(str(tmp_path / 'my.txt'))
            corpus.prepare_text(name, text, 'test', data_dir=folder or str(tmp_path))
        return call
    os.mkfifo(tmp_path / 'pipe')
    corpus.prepare_text('taken', 'another text', 'test', data_dir=str(tmp_path))
    assert_all_named({
        'empty': prepare(b''), 'a mark alone': prepare(b'\xef\xbb\xbf'), 'one character': prepare(b'aaaa'),
        'binary': prepare(b'ELF\0\0'), 'latin 1': prepare(b'd\xe9j\xe0'), 'utf-16': prepare('text'.encode('utf-16')),
        'a long name': prepare(b'ab', 'x' * 300), 'a file as name': prepare(b'ab', 'my.txt'),
        'a file as folder': prepare(b'ab', folder=str(tmp_path / 'my.txt')), 'taken': prepare(b'abc', 'taken'),
        'a pipe': lambda: corpus.read_text(str(tmp_path / 'pipe')), 'a folder': lambda: corpus.read_text(str(tmp_path)),
        'not there': lambda: corpus.read_text('nowhere.txt')}.items(), at_least=13)
    prepare('\ufeffabc\r\nde'.encode())()
    assert corpus.Corpus('mine', str(tmp_path)).meta['chars'] == ['\n', 'a', 'b', 'c', 'd', 'e']


# -----------------------------------------------------------------------------
# flags and files of the other scripts

def called(monkeypatch, script, *flags):
    def call():
        with monkeypatch.context() as patch:
            patch.setattr(sys, 'argv', [script.__name__, *map(str, flags)])
            script.main()
    return call


def test_flags_of_sampling(monkeypatch, trained_once, tmp_path):
    out_dir = trained_once[0]
    (tmp_path / 'notes.txt').write_text('mine')

    def flag(*flags):
        call = called(monkeypatch, sample_simple, '--out-dir', out_dir, '--no-progress', *flags)
        return ' '.join(map(str, flags)), call

    def kinds():
        for name in sample_simple.RANGES:
            for value in ('nan', 'inf', '-inf', '-2', '1e999', '', 'x', -10 ** 30, 10 ** 30):
                if not (name.endswith('temperature') and value == 10 ** 30):
                    yield flag(f'--{name.replace("_", "-")}={value}')
        for value in ('0.5,2', 'nan', '', ',', 'a,b', '-1'):
            yield flag(f'--masking-ratios={value}')
        for path in ('', tmp_path, 'nowhere/x.json', out_dir / 'ckpt.pt', tmp_path / 'notes.txt', 'a\0/b'):
            yield flag('--save', path)
        for flags in (['--threshold', 0.3], ['--schedule-mode=threshold', '--masking-ratios=0.5'],
                      ['--plan=sideways'], ['--plan=fronts-0'], ['--plan=fronts-²'],
                      [f'--plan=fronts-{"9" * 5000}'], ['--template='], ['--plan='], ['--judge-checkpoint-name='],
                      ['--plan=wavefront', '--plan-passes=2'],
                      ['--seed-text=XYZ'], ['--seed-text', 'the ' * 9], ['--device=cpu:abc'], ['--device=cuda:99'],
                      ['--device='], ['--dtype=float8'], ['--quality-metric=judge'], ['--checkpoint-name='],
                      ['--checkpoint-name', tmp_path], ['--judge-checkpoint-name=ckpt.pt'],
                      ['--sequence-length=16000000', '--num-samples=16000000']):
            yield flag(*flags)
    assert_all_named(kinds(), at_least=130)


def test_flags_of_evaluating(monkeypatch, trained_once):
    paths = ['--checkpoint', trained_once[0] / 'ckpt.pt', '--evaluator', trained_once[0] / 'ckpt.pt']
    flags = ([f'--{name}={value}' for name in ('num-samples', 'seed', 'passes') for value in (
        'nan', 'inf', -1, 1.5, 'x', 10 ** 30, '1e12')] + [f'--temperatures={value}' for value in (
            'nan', 'inf', '-1', '0', '0.8-nan', ',', 'x', '1,inf')]
        + ['--decoders=', '--passes=', '--plans=', '--judge=', '--evaluator=']
        + ['--decoders=oracle', '--decoders=,', '--device=cpu:abc', '--dtype=float8', '--checkpoint=nowhere.pt'])
    assert_all_named(((flag, called(monkeypatch, evaluate, *paths, flag)) for flag in flags), at_least=30)


def test_files_that_hold_no_samples_and_no_metrics(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    paths = {'pipe': 'pipe', 'not there': 'nowhere', 'a folder': '.'}
    for i, data in enumerate((b'', b'{', b'null', b'[]', b'3', b'"schema"', b'\xff\xfe', b'[' * 10 ** 5,
                              b'{"schema": 1}', b'{"schema": 2}', b'{"schema": 2, "samples": 3}',
                              b'{"iter": 1e999, "loss": 2}',
                              b'{"iter": 1, "loss": 1' + b'0' * 400 + b'}', b'{"iter": 1, "loss": "low"}',
                              b'{"iter": true}')):
        (tmp_path / str(i)).write_bytes(data)
        paths[str(data[:30])] = str(i)
    read = {f'view: {name}': lambda path=path: view.page([(path, view.read(str(tmp_path / path)))])
            for name, path in paths.items()}
    read |= {f'metrics: {name}': lambda path=path: metrics_log.of_run(str(tmp_path / path))
             for name, path in paths.items()}
    assert_all_named(read.items(), at_least=36)


# -----------------------------------------------------------------------------
# extremes that must work

@pytest.mark.slow
@pytest.mark.parametrize('flags', [
    ['--block_size=1'], ['--batch_size=1'], ['--n_head=1', '--n_embd=2'], ['--sampler_width=1'], ['--sampler_width=8'],
    ['--sampler_state=1'], ['--sampler_context=40'], ['--eval_rows=2'], ['--dropout=0.99'], ['--grad_clip=0'],
    ['--seed=0'], [f'--seed={2 ** 63 - 1}'], ['--max_iters=1', *NO_HEADS], ['--critic_rows=100'],
    ['--sampler_min_neighbors_ratio=0'], ['--sampler_min_neighbors_ratio=1'], ['--warmup_iters=0'],
    ['--log_interval=9']])
def test_extremes_work(train, script, tmp_path, flags):
    """Trained, saved, and two samples of it written with the coldest and a very hot temperature."""
    train(tmp_path, *flags)
    for temperature in (0, 1e-310, 100):
        status, out, err = script('sample_simple.py', '--out-dir', tmp_path, '--num-samples', 2, '--no-progress',
                                  '--temperature', temperature)
        assert status == 0 and out.count('--- sample') == 2, err


def test_the_smallest_vocabulary(script, tmp_path):
    """Two characters, trained in all stages and written with the head and without."""
    corpus.prepare_text('two', 'abbabaab' * 200, 'test', data_dir=str(tmp_path))
    status, _, err = script('train.py', *TINY, '--dataset=two', f'--data_dir={tmp_path}',
                            f'--out_dir={tmp_path / "out"}')
    assert status == 0, err
    for flags in ([], ['--disable-sampler'], ['--order', 'critic'], ['--top-p', 0.5]):
        status, out, err = script('sample_simple.py', '--out-dir', tmp_path / 'out', '--num-samples', 2,
                                  '--no-progress', *flags)
        assert status == 0, err
        assert all(set(text) <= {'a', 'b'} for text in out.split('--- sample ')[1:] for text in text.split('\n')[1:2])
