"""Files that nothing spoils: links, pipes and devices, a full disk, a second run in the same folder."""
import errno
import os
import threading

import pytest

import checkpoint
import files
import resume
from conftest import NO_HEADS, checkpoint_in, contents_of, metrics_in
from errors import InputError, WriteError
from objectives import DiffusionObjective


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / 'real').write_text('old')
    os.symlink('real', tmp_path / 'link')
    files.write_atomically(str(tmp_path / 'link'), b'new')
    assert os.path.islink(tmp_path / 'link') and (tmp_path / 'real').read_text() == 'new'
    assert sorted(os.listdir(tmp_path)) == ['link', 'real']


def test_a_pipe_and_a_device_are_written_through(tmp_path):
    """As root, --save /dev/null once replaced the device by a file."""
    pipe, found = tmp_path / 'pipe', []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()))
    reader.start()
    files.write_atomically(str(pipe), b'text')
    reader.join(10)
    files.write_atomically(os.devnull, b'text')
    assert found == [b'text'] and pipe.is_fifo() and not os.path.isfile(os.devnull)


def full(f):
    f.write(b'part')
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_failed_write_leaves_the_old_file_and_no_part(tmp_path):
    path = tmp_path / 'file'
    path.write_text('old')
    with pytest.raises(WriteError, match='No space left'):
        files.write_atomically(str(path), full)
    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(str(path), lambda f: (_ for _ in ()).throw(KeyboardInterrupt))
    assert contents_of(tmp_path) == {'file': b'old'}


def test_file_and_folder_reach_the_disk(tmp_path, monkeypatch):
    synced, plain = [], os.fsync
    monkeypatch.setattr(files.os, 'fsync', lambda handle: synced.append(os.fstat(handle).st_mode) or plain(handle))
    files.write_atomically(str(tmp_path / 'file'), b'text')
    assert [files.os.path.stat.S_ISDIR(mode) for mode in synced] == [False, True]


def test_a_second_run_in_the_same_folder_is_refused(train, refused, tmp_path):
    with files.locked(str(tmp_path)):
        (tmp_path / 'ckpt.pt.123.part').write_text('left by a kill')
        (tmp_path / 'film.7.part').write_text("somebody's own")
        assert 'another run is writing to' in refused(tmp_path, *NO_HEADS)
    train(tmp_path, *NO_HEADS, '--max_iters=1')
    assert sorted(os.listdir(tmp_path)) == ['ckpt.pt', 'ckpt_best.pt', 'film.7.part', 'metrics.jsonl'], \
        'no lock, no part'
    with files.locked(str(tmp_path)), pytest.raises(InputError), files.locked(str(tmp_path)):
        pass


def test_a_system_without_locks_opens_no_folder(tmp_path, monkeypatch):
    """Windows has none, and no handle of a folder either."""
    monkeypatch.setattr(files, 'fcntl', None)
    monkeypatch.setattr(files, 'opened_folder', lambda path: pytest.fail('opened'))
    with files.locked(str(tmp_path / 'out')):
        (tmp_path / 'out' / 'file').write_text('kept')
    assert contents_of(tmp_path / 'out') == {'file': b'kept'}


def test_the_checkpoint_is_looked_at_under_the_lock(train, refused, half, tmp_path, monkeypatch):
    """Another run could end between the two and be overwritten. A folder made for a refused run goes again."""
    looked, plain = [], resume.open_for_run

    def look_up(config, meta):
        with pytest.raises(InputError, match='another run is writing'), files.locked(config.out_dir):
            pass
        looked.append(config.init_from)
        return plain(config, meta)
    monkeypatch.setattr(resume, 'open_for_run', look_up)
    refused(tmp_path / 'nothing', '--init_from=resume')
    assert not (tmp_path / 'nothing').exists()
    train(half, '--init_from=resume', '--dropout=0.1')
    train(tmp_path / 'new', *NO_HEADS, '--max_iters=1')
    assert looked == ['resume', 'resume', 'scratch']


@pytest.fixture
def disk(monkeypatch):
    """disk(n): the disk is full while the next n checkpoints are saved."""
    plain, left = checkpoint.torch.save, [0]

    def save(value, f):
        left[0] -= 1
        return full(f) if left[0] >= 0 else plain(value, f)
    monkeypatch.setattr(checkpoint.torch, 'save', save)
    return lambda n: left.__setitem__(0, n)


def test_training_goes_on_where_the_disk_is_full(train, tmp_path, disk):
    """The evaluation that could not be saved does not count as the best one saved."""
    disk(1)
    out = train(tmp_path, *NO_HEADS)
    assert out.count('NOT SAVED: ') == 1 and 'No space left' in out and checkpoint_in(tmp_path)['iter_num'] == 12
    assert sorted(os.listdir(tmp_path)) == ['ckpt.pt', 'ckpt_best.pt', 'metrics.jsonl']
    assert checkpoint_in(tmp_path, 'ckpt_best.pt')['best_val_loss'] == checkpoint_in(tmp_path)['best_val_loss']


def test_the_best_is_what_a_file_holds(train, tmp_path, disk, monkeypatch):
    """Two full disks in a row once left the figure of an evaluation that was nowhere saved.

    The first finds no room for the latest beside the best, the second for neither.
    """
    found, evaluations = [2.0, 1.9, 1.5, 1.7], []
    plain, validate = checkpoint.save, DiffusionObjective.validate

    def validated(self, *args):
        evaluations.append(len(evaluations) // 2 * 6)    # the training split's, then the validation split's
        return validate(self, *args) | {self.figure: found[evaluations[-1] // 6]}
    monkeypatch.setattr(DiffusionObjective, 'validate', validated)

    def save(path, contents):
        fails = evaluations[-1] == 6 and path.endswith('ckpt.pt') or evaluations[-1] == 12
        disk(1 if fails else 0)
        return plain(path, contents)
    monkeypatch.setattr(checkpoint, 'save', save)
    out = train(tmp_path, *NO_HEADS, '--max_iters=18', '--eval_interval=6')
    assert evaluations[::2] == [0, 6, 12, 18] and out.count('NOT SAVED: ') == 2
    assert checkpoint_in(tmp_path, 'ckpt_best.pt')['best_val_loss'] == checkpoint_in(tmp_path)['best_val_loss'] == 1.7


@pytest.mark.parametrize('flags, n', [(['--stop_on_full_disk=True'], 1), ([], 9)])
def test_a_full_disk_ends_the_run_where_it_is_told_or_at_the_end(refused, tmp_path, disk, flags, n):
    disk(n)
    assert 'No space left' in refused(tmp_path, *NO_HEADS, *flags)


def test_figures_that_do_not_fit_are_lost_whole(tmp_path, monkeypatch, capsys):
    from types import SimpleNamespace
    import metrics_log
    config = SimpleNamespace(out_dir=str(tmp_path), checkpoint_name='ckpt.pt', eval_only=False, wandb_log=False,
                             overwrite=True)
    log = metrics_log.MetricsLog(config)
    log.write({'iter': 1, 'loss': 2.0})

    class Full:
        def __init__(self, path, mode):
            self.f = open(path, mode)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.f.close()

        def write(self, text):
            self.f.write(text[:5])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch:
        patch.setattr(metrics_log, 'open', Full, raising=False)
        log.write({'iter': 2, 'loss': 2.0})
    log.write({'iter': 3, 'loss': 2.0})
    assert [entry['iter'] for entry in metrics_in(tmp_path)] == [1, 3]
    assert 'figures of iteration 2 are lost' in capsys.readouterr().out
