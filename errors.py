"""What a user can get wrong: one exception, shown as one line on standard error with exit status 2."""
import errno
import io
import os
import sys
import time
from contextlib import contextmanager, suppress

from environment import rank_and_world


# of errors of printing: the reader of a pipe, such as head, has seen enough; the disk is full
STATUS = {errno.EPIPE: 141, errno.ENOSPC: 2}


class InputError(ValueError):
    """Bad input: the message says what was found, what was wanted, and which command helps."""


class WriteError(InputError):
    """A file cannot be written, as on a full disk; later it may."""


@contextmanager
def within(source):
    """An InputError says where it comes from: within('ckpt.pt') puts the name before the message."""
    try:
        yield
    except InputError as error:
        raise type(error)(f'{source}: {error}') from error


def say(error):
    with suppress(OSError):    # as where standard error has no room either
        print(f'error: {" ".join(str(error).splitlines())}', file=sys.stderr)


def run(main):
    """Call main(); an InputError becomes one line and exit status 2, Ctrl-C becomes status 130.

    Output is written line by line; a character that the terminal's encoding lacks shows as its number.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, errors='backslashreplace')
    try:
        main()
    except InputError as error:
        if rank_and_world()[0]:
            time.sleep(5)    # before processes have met: the first says the same, and torchrun ends the others
        say(error)
        sys.exit(2)
    except OSError as error:
        if error.errno not in STATUS or error.filename:
            raise
        with suppress(OSError):    # a stream without a file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())    # else what is buffered fails once more
        if error.errno == errno.ENOSPC:
            say(f'cannot write the output: {error.strerror}; wanted room where it goes')
        sys.exit(STATUS[error.errno])
    except KeyboardInterrupt:
        print('stopped', file=sys.stderr)
        sys.exit(130)
