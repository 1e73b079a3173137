"""Files that a kill, a full disk or a second run cannot spoil: whole or not there, in a folder locked by its run."""
import errno
import os
import re
from contextlib import contextmanager, nullcontext, suppress

from errors import InputError, WriteError

try:
    import fcntl
except ImportError:    # Windows: no locks
    fcntl = None


def write_atomically(path, data):
    """Write bytes, or what data(f) writes to an open file, so that path is the old file or the whole new one.

    A link stays and its target is replaced; a device or a pipe is written through. Nothing else is left in the folder.
    WriteError where it cannot be written, as on a full disk.
    """
    write = data if callable(data) else lambda f: f.write(data)
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            with open(path, 'wb') as f:
                write(f)
        else:
            replace(os.path.realpath(path), write)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__    # torch's writer has its own on top
        if not isinstance(cause, OSError):
            raise
        raise WriteError(f'cannot write {path!r}: {cause.strerror}; wanted a folder with room that can be '
                         f'written') from error


def replace(path, write):
    """Write a file beside path, then rename it, both to disk: at a power cut, too, one of the two is whole."""
    part = f'{path}.{os.getpid()}.part'
    try:
        with open(part, 'wb') as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            os.remove(part)
        raise
    if os.name == 'posix':
        with opened_folder(os.path.dirname(path) or '.') as folder:
            os.fsync(folder)


@contextmanager
def opened_folder(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


def make_folder(path, what=''):
    """Make a folder for results, of which what says the setting. InputError where that cannot be."""
    try:
        os.makedirs(path, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, 'it is read-only')
    except OSError as error:
        raise InputError(f'cannot write {what}{path!r}: {error.strerror}; wanted a folder that can be '
                         f'written') from error


@contextmanager
def locked(path):
    """A folder for this run alone, made if need be; InputError where another run writes to it.

    The lock is the kernel's, on the folder itself: it leaves no file and ends with its process, however that ends.
    Parts of files that a killed run left are removed, and a folder made for a run that wrote nothing.
    """
    is_there = os.path.exists(path)
    make_folder(path, 'out_dir ')
    with opened_folder(path) if fcntl else nullcontext() as folder:    # Windows opens no folders
        try:
            if fcntl:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f'another run is writing to {path!r}; wait for its end, or give another folder') from error
        except OSError:    # a file system without locks
            pass
        for name in os.listdir(path):
            if re.search(r'\.(pt|jsonl)\.\d+\.part$', name):    # the files of a run; others are not its own
                with suppress(OSError):
                    os.remove(os.path.join(path, name))
        try:
            yield
        finally:
            if not is_there:
                with suppress(OSError):    # it holds something
                    os.rmdir(path)


def require_own(path, beginning, flag):
    """InputError where path is a file that begins otherwise than what this program writes there, and not empty."""
    if not os.path.isfile(path):
        return
    try:
        with open(path, 'rb') as f:
            found = f.read(len(beginning))
    except OSError as error:
        raise InputError(f'{flag} {path!r}: {error.strerror}') from error
    if found and found != beginning:
        raise InputError(f'{flag} {path!r} would replace a file that holds something else; give another name, or '
                         f'delete it')


def require_file(path, wanted):
    """InputError unless path is a file: to open a pipe would wait for a writer. wanted: what it should hold."""
    if not os.path.isfile(path):
        found = 'no file' if os.path.exists(path) else 'not there'
        raise InputError(f'cannot read {path!r}: it is {found}; wanted {wanted}')
