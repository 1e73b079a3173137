"""The first SIGINT, SIGTERM or SIGHUP ends a step and saves; what goes on from there is the whole run."""
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

if os.name != 'posix':
    pytest.skip('needs signals that a process can send itself, and terminals', allow_module_level=True)

import pty

import objectives
import signals
from conftest import NO_HEADS, ROOT, TINY, checkpoint_in, metrics_in, same_weights
from model import GPT


@pytest.fixture(autouse=True)
def handlers(monkeypatch):
    """Those of a fresh process, whoever runs the tests; as they were afterwards, and the streams too."""
    fresh = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in fresh.items()}
    monkeypatch.setattr(sys, 'stdout', sys.stdout)
    monkeypatch.setattr(sys, 'stderr', sys.stderr)
    yield fresh
    for number, handler in before.items():
        signal.signal(number, handler)


def kill_in_step(patch, number, step):
    """A signal to this process while a run computes the losses of its step-th micro-step, counted from 1."""
    plain, calls = objectives.DiffusionObjective.forward, []

    def forward(self, *args):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), number)
        return plain(self, *args)
    patch.setattr(objectives.DiffusionObjective, 'forward', forward)


@pytest.mark.parametrize('number, step', [(signal.SIGINT, 3), (signal.SIGTERM, 6), (signal.SIGHUP, 11)])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(script, trained_once, toy_data, tmp_path, monkeypatch,
                                                     handlers, number, step):
    """In each stage, at the border of an evaluation too: weights and figures are the whole run's, bit for bit."""
    with monkeypatch.context() as patch:
        kill_in_step(patch, number, step)
        status, out, _ = script('train.py', *TINY, f'--data_dir={toy_data}', f'--out_dir={tmp_path}')
    assert status == 128 + number
    assert f'{signal.Signals(number).name} at iteration {step}; ' in out and checkpoint_in(tmp_path)['iter_num'] == step
    command = shlex.split(re.search('go on with: (.*)', out).group(1))
    assert command[0] == 'python' and command[-1] == '--init_from=resume'
    status, _, err = script(command[1], *command[2:])
    assert status == 0, err
    assert same_weights(checkpoint_in(tmp_path)['model'], checkpoint_in(trained_once[0])['model'])

    def figures(out_dir):
        return [{k: v for k, v in entry.items() if k != 'ms'} for entry in metrics_in(out_dir)]
    assert figures(tmp_path) == figures(trained_once[0])
    assert signal.getsignal(number) == handlers[number], 'as before'


# -----------------------------------------------------------------------------
# nobody is there to read

LONG = ['--max_iters=100000', '--start_critic_iteration=6', '--end_critic_iteration=9', '--save_interval=0',
        '--eval_interval=100000']


def command(toy_data, out_dir):
    return [sys.executable, 'train.py', *TINY, *LONG, f'--data_dir={toy_data}', f'--out_dir={out_dir}']


def test_a_closed_terminal_loses_no_run(toy_data, tmp_path):
    """Its SIGHUP came with a terminal that nobody can write to: the handler's own line ended the run unsaved."""
    master, slave = pty.openpty()
    run = subprocess.Popen(command(toy_data, tmp_path), cwd=ROOT, stdout=slave, stderr=slave, stdin=slave,
                           start_new_session=True)
    os.close(slave)
    read = b''
    while b'iter 3: loss' not in read:
        read += os.read(master, 4096)
    os.close(master)
    time.sleep(0.3)    # lines that nobody reads
    run.send_signal(signal.SIGHUP)
    assert run.wait(60) == 129 and checkpoint_in(tmp_path)['iter_num'] > 3


def through_a_pipe(toy_data, tmp_path, reader):
    """A run whose stdout and stderr the shell command reader reads, in a process group of their own."""
    line = f'trap : INT; {shlex.join(command(toy_data, tmp_path / "out"))} 2>&1 | {reader} > {tmp_path / "log"}; ' \
           f'exit ${{PIPESTATUS[0]}}'
    return subprocess.Popen(['bash', '-c', line], cwd=ROOT, start_new_session=True)


def test_a_reader_that_the_same_signal_ends_loses_no_run(toy_data, tmp_path):
    """`python train.py 2>&1 | tee log` and Ctrl-C, which goes to both: BrokenPipe ended the run unsaved."""
    run = through_a_pipe(toy_data, tmp_path, 'cat')
    while 'iter 3: loss' not in ((tmp_path / 'log').read_text() if (tmp_path / 'log').exists() else ''):
        assert run.poll() is None
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGINT)
    assert run.wait(60) == 130 and checkpoint_in(tmp_path / 'out')['iter_num'] > 3


def test_a_reader_that_has_seen_enough_ends_a_run_saved(toy_data, tmp_path):
    """No signal comes: the broken pipe itself is one."""
    run = through_a_pipe(toy_data, tmp_path, 'grep -m1 "iter 3: loss"')
    assert run.wait(120) == 141 and checkpoint_in(tmp_path / 'out')['iter_num'] > 3


def test_a_broken_pipe_leaves_no_traceback():
    """`sample_simple.py | head -3` and the like: no traceback. When head goes is a race; here nobody reads at all."""
    run = subprocess.Popen([sys.executable, 'sample_simple.py', '--checkpoint-name', 'tiny_shakespeare.pt',
                            '--out-dir', 'pretrained', '--num-samples', '1', '--no-progress'], cwd=ROOT,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run.stdout.close()
    with run.stderr:
        assert run.stderr.read() == ''
    assert run.wait(60) == 141


def test_streams_are_as_before_where_no_signal_came():
    before = sys.stdout, sys.stderr
    with signals.noted():
        assert sys.stdout is not before[0]
        print('seen')
    assert (sys.stdout, sys.stderr) == before


# -----------------------------------------------------------------------------
# what else a signal does

def test_a_signal_in_the_last_iteration_changes_nothing(script, toy_data, tmp_path, monkeypatch):
    """The run is at its end: it evaluates and saves as ever."""
    kill_in_step(monkeypatch, signal.SIGTERM, 2)
    status, out, err = script('train.py', *TINY, *NO_HEADS, f'--data_dir={toy_data}', f'--out_dir={tmp_path}',
                              '--max_iters=2')
    assert status == 0 and 'iter 2: val' in out and checkpoint_in(tmp_path)['iter_num'] == 2, err


def test_a_run_that_keeps_the_best_alone_is_saved_beside_it(script, toy_data, tmp_path, monkeypatch):
    flags = [*TINY, f'--data_dir={toy_data}', f'--out_dir={tmp_path}', '--always_save_checkpoint=False']
    with monkeypatch.context() as patch:
        kill_in_step(patch, signal.SIGTERM, 8)
        assert script('train.py', *flags)[0] == 143
    assert checkpoint_in(tmp_path)['iter_num'] == 6 and checkpoint_in(tmp_path, 'ckpt_last.pt')['iter_num'] == 8
    status, out, err = script('train.py', *flags, '--init_from=resume')
    assert status == 0 and re.search(r'Resuming from .*ckpt_last.pt at iteration 8', out), err
    newer = checkpoint_in(tmp_path)['iter_num'] == 12
    assert newer != (tmp_path / 'ckpt_last.pt').exists(), 'nothing obsolete stays'


def test_saves_between_evaluations(train, trained_once, tmp_path, monkeypatch):
    """save_interval: a kill loses no more; the figures and weights are those of the run without."""
    out = train(tmp_path, '--save_interval=4')
    assert re.findall(r'^(?:iter (\d+): val|saved .*(ckpt.pt))', out, re.M) == [
        ('0', ''), ('', 'ckpt.pt'), ('6', ''), ('', 'ckpt.pt'), ('', 'ckpt.pt'), ('12', ''), ('', 'ckpt.pt')]
    assert same_weights(checkpoint_in(tmp_path)['model'], checkpoint_in(trained_once[0])['model'])


def test_a_second_signal_leaves_at_once(monkeypatch):
    left = []
    monkeypatch.setattr(signals.os, '_exit', left.append)
    monkeypatch.setattr(signals.os, 'write', lambda *args: None)
    with signals.noted() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.number == signal.SIGHUP and not left
        os.kill(os.getpid(), signal.SIGTERM)
    assert left == [143]


def test_what_the_user_ignores_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with signals.noted() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.number


def test_samples_that_are_done_are_shown_and_saved(script, trained_once, tmp_path, monkeypatch):
    forward, calls = GPT.forward, []

    def stop_in_the_third_batch(self, *args):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, *args)
    monkeypatch.setattr(GPT, 'forward', stop_in_the_third_batch)
    status, out, err = script('sample_simple.py', '--out-dir', trained_once[0], '--num-samples', 4, '--batch-size', 1,
                              '--disable-sampler', '--iterations', 2, '--save', tmp_path / 'o.json', '--no-progress')
    assert status == 143 and out.count('--- sample') == 2 and 'SIGTERM after 2 of 4 samples' in err
    assert 'saved' in out and (tmp_path / 'o.json').read_text().count('"iterations"') >= 2


@pytest.mark.slow
def test_twenty_kills_change_nothing(toy_data, tmp_path):
    """SIGKILL at random instants, a save after every iteration, so that many fall into one: bit for bit the whole run.

    In all three stages and across their borders. The instants are the clock's, so no two tests are the same.
    """
    def start(name):
        command = [sys.executable, '-u', 'train.py', *TINY, f'--data_dir={toy_data}', f'--out_dir={tmp_path / name}',
                   '--max_iters=300', '--start_sampler_iteration=60', '--start_critic_iteration=120',
                   '--end_critic_iteration=250', '--eval_interval=50', '--save_interval=1', '--dropout=0.1']
        command += ['--init_from=resume'] if (tmp_path / name / 'ckpt.pt').exists() else []
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    whole = start('whole')
    assert 'iter 300: val' in whole.communicate()[0] and not whole.returncode
    for border in range(14, 281, 14):
        run, began = start('killed'), time.time()
        for line in run.stdout:
            found, before, began = re.match(r'iter (\d+): loss', line), began, time.time()
            if found and int(found.group(1)) >= border:
                break
        time.sleep(random.uniform(0, 2 * (began - before)))    # up to two iterations on
        run.kill()
        printed = run.communicate()[0]
        assert run.returncode == -signal.SIGKILL, line + printed
    last = start('killed')
    assert 'iter 300: val' in last.communicate()[0] and not last.returncode
    for name in ('ckpt.pt', 'ckpt_best.pt'):
        killed, kept = (checkpoint_in(tmp_path / folder, name) for folder in ('killed', 'whole'))
        assert same_weights(killed['model'], kept['model']) and killed['iter_num'] == kept['iter_num']
        assert killed['best_val_loss'] == kept['best_val_loss']
    assert {p.name for p in (tmp_path / 'killed').iterdir()} == {p.name for p in (tmp_path / 'whole').iterdir()}

    def figures(name):
        return [{k: v for k, v in entry.items() if k != 'ms'} for entry in metrics_in(tmp_path / name)]
    assert figures('killed') == figures('whole')
