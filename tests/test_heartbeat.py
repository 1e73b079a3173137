"""A process that is killed or stopped, or fails, ends the run of several, with one line from one process."""
import signal
import socket
import time

import pytest

import heartbeat
from conftest import TINY, both_of, start_both
from errors import InputError


def killed(toy_data, out_dir, rank, number):
    """A signal to one of two training processes -> seconds until the other ended, and what that one said."""
    started = start_both('train.py', *TINY, f'--data_dir={toy_data}', f'--out_dir={out_dir}', '--max_iters=100000',
                         '--eval_interval=100000', '--start_critic_iteration=100000', '--end_critic_iteration=100000')
    try:
        for line in started[0].stdout:
            if line.startswith('iter 2: loss'):
                break
        began = time.time()
        started[rank].send_signal(number)
        other = started[1 - rank]
        err = other.communicate(timeout=90)[1]
        assert other.returncode == 2
        return time.time() - began, err
    finally:
        for process in started:
            process.kill()
            process.communicate()


@pytest.mark.parametrize('rank', [0, 1])
def test_a_killed_process_is_named(toy_data, tmp_path, rank):
    seconds, err = killed(toy_data, tmp_path, rank, signal.SIGKILL)
    assert err == (f'error: process {rank + 1} of 2 (rank {rank}) is gone: killed, or out of memory; the run ends, '
                   f'what it has saved stays\n')
    assert seconds < 10


@pytest.mark.slow
@pytest.mark.parametrize('rank', [0, 1])
def test_a_stopped_process_is_named(toy_data, tmp_path, rank):
    seconds, err = killed(toy_data, tmp_path, rank, signal.SIGSTOP)
    assert err.startswith(f'error: process {rank + 1} of 2 (rank {rank}) has been silent for 25 s: stopped')
    assert err.count('\n') == 1 and 20 < seconds < 50


# -----------------------------------------------------------------------------
# errors

@pytest.mark.parametrize('command', [['sample_simple.py'], ['evaluate.py', '--checkpoint', 'nowhere.pt'],
                                     ['train.py', *TINY, '--batch_size=7']])
def test_an_error_of_all_is_one_line_of_the_first(tmp_path, toy_data, command):
    command = [*command, f'--data_dir={toy_data}', f'--out_dir={tmp_path}'] if command[0] == 'train.py' else \
        [*command, '--out-dir', tmp_path]
    out, err, statuses = both_of(*command)
    assert statuses == [2, 2] and err[0].startswith('error: ') and err[0].count('\n') == 1 and err[1] == '', err
    assert out == ['', ''] and not list(tmp_path.iterdir())


def alone(error):
    """What two processes say and how they end where the second alone fails and the first waits for it."""
    return both_of('-c', f'''if True:
        import environment, errors, distributed
        def main():
            with distributed.Processes('cpu') as processes:
                if processes.rank:
                    raise {error}
                processes.barrier()
        errors.run(main)''')


def test_an_error_of_another_process_is_its_line():
    out, err, statuses = alone('errors.InputError("nothing here")')
    assert statuses == [2, 2] and err == ['', 'error: nothing here\n'] and out == ['', '']


def test_a_fault_of_another_process_is_its_traceback():
    out, err, statuses = alone('RuntimeError("out of memory")')
    assert statuses[0] == 2 and statuses[1] and err[0] == '' and 'RuntimeError: out of memory' in err[1]


# -----------------------------------------------------------------------------
# by hand

class Ended(Exception):
    pass


@pytest.fixture
def pair(monkeypatch):
    """Heartbeats of the first of two processes and of a socket to it, not started; to end is Ended."""
    def end(status):
        raise Ended
    monkeypatch.setattr(heartbeat.os, '_exit', end)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield heartbeat.Heartbeat(0, 2, {ours: 1}), theirs


def test_beats_are_sent_and_missed_ones_counted(pair, monkeypatch, capsys):
    first, theirs = pair
    now = iter(range(0, 10 ** 6))
    monkeypatch.setattr(heartbeat.time, 'monotonic', lambda: next(now))    # a second for each look at the clock
    monkeypatch.setattr(first.selector, 'select', lambda seconds: [])
    with pytest.raises(Ended):
        first.run()
    assert theirs.recv(100) == heartbeat.BEAT * (heartbeat.LIMIT + 1) + heartbeat.FAILED
    assert 'process 2 of 2 (rank 1) has been silent for 25 s' in capsys.readouterr().err


def test_a_process_that_was_paused_itself_blames_nobody(pair, monkeypatch):
    """However much time has gone by, it is one beat, and what the others sent is read before it counts."""
    first, theirs = pair
    now = iter(range(0, 10 ** 9, 1000))
    monkeypatch.setattr(heartbeat.time, 'monotonic', lambda: next(now))
    select, looks = first.selector.select, []

    def look(seconds):
        looks.append(theirs.send(heartbeat.BEAT) if len(looks) < 200 else theirs.send(heartbeat.LEAVES))
        return select(seconds)
    monkeypatch.setattr(first.selector, 'select', look)
    first.run()
    assert len(looks) == 201 and not first.silent


@pytest.mark.parametrize('word, ends, said', [(b'..', False, ''), (b'.l', False, ''), (b'.f', True, ''),
                                              (b'', True, 'process 2 of 2 (rank 1) is gone')])
def test_what_another_process_says(pair, capsys, word, ends, said):
    first, theirs = pair
    theirs.send(word) if word else theirs.close()
    if ends:
        with pytest.raises(Ended):
            first.listen(first.peers[0], 1)
    else:
        first.listen(first.peers[0], 1)
    err = capsys.readouterr().err
    assert said in err and bool(said) == bool(err) and bool(first.silent) == (word != b'.l')


def test_strangers_are_not_taken_for_processes(monkeypatch):
    token, server = b't' * 16, heartbeat.listening()
    port = server.getsockname()[1]
    stranger = socket.create_connection(('127.0.0.1', port))
    stranger.sendall(b'GET / HTTP/1.0\r\n\r\n\r\n')
    second = heartbeat.reached(['127.0.0.1'], port, token, 1)
    (peer, rank), = heartbeat.accepted(server, 2, token).items()
    assert rank == 1 and peer.getpeername()[1] == second.getsockname()[1]
    for s in (stranger, second, peer):
        s.close()


def test_processes_that_do_not_meet(monkeypatch):
    monkeypatch.setattr(heartbeat, 'TIME_TO_MEET', 0)
    server = heartbeat.listening()
    port = server.getsockname()[1]
    with pytest.raises(InputError, match='process 2 of 3 did not connect'):
        heartbeat.accepted(server, 3, b't' * 16)
    with pytest.raises(InputError, match=f'cannot be reached at port {port} of 127.0.0.1'):
        heartbeat.reached(['127.0.0.1'], port, b't' * 16, 1)


@pytest.mark.parametrize('rank', [0, 1])
def test_a_signal_to_one_process_saves_and_ends_both(toy_data, tmp_path, rank):
    """The first to leave was taken for one that was killed, and the run ended with status 2."""
    started = start_both('train.py', *TINY, f'--data_dir={toy_data}', f'--out_dir={tmp_path}', '--max_iters=100000')
    end = time.time() + 60
    while not (tmp_path / 'metrics.jsonl').exists() or (tmp_path / 'metrics.jsonl').read_text().count('\n') < 8:
        assert time.time() < end
        time.sleep(0.05)
    started[rank].send_signal(signal.SIGTERM)
    (out, err), (_, other) = (process.communicate(timeout=60) for process in started)
    assert [process.returncode for process in started] == [128 + signal.SIGTERM] * 2, err + other
    assert 'is saved; go on with: ' in out and 'is gone' not in err + other and (tmp_path / 'ckpt.pt').exists()
