"""SIGINT, SIGTERM and SIGHUP: the first one lets a run end its step and save, a second one ends it at once.

    with signals.noted() as stop:
        ...
        if stop.number:
            save()
            sys.exit(128 + stop.number)

A closed laptop, a cluster's pre-emption and Ctrl-C are the same to a run. What the user ignores, as nohup does, stays
ignored. The terminal or the reader of a pipe may be gone by then: no print keeps a run from saving.
"""
import os
import shlex
import signal
import sys
import threading
import time
from contextlib import contextmanager, suppress
from types import SimpleNamespace

ENDING = [getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGHUP') if hasattr(signal, name)]
BROKEN_PIPE = 13    # SIGPIPE, which Windows lacks


@contextmanager
def noted(step='this iteration'):
    """An object whose number is that of the first signal that came, 0 before. step: what the run still does.

    A reader of stdout or stderr that is gone counts as SIGPIPE; other errors of writing to them, as of a terminal that
    is closed, lose what is printed and nothing else.
    """
    stop, signals = SimpleNamespace(number=0), []

    def note(number, frame):
        if signals:
            os._exit(128 + number)
        signals.append(number)
        stop.number = number
        with suppress(OSError):    # nobody may be there to read it
            # not print, which a handler could interrupt
            os.write(2, f'{name_of(number)}: ending after {step}; a second one leaves at once\n'.encode())

    def lost(error):
        if isinstance(error, BrokenPipeError) and not stop.number:
            time.sleep(0.2)    # the signal that ended the reader may be on its way here
            stop.number = stop.number or BROKEN_PIPE

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in ENDING}
        before = {number: handler for number, handler in before.items() if handler not in (None, signal.SIG_IGN)}
    for number in before:
        signal.signal(number, note)
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (stream and Lasting(stream, lost) for stream in streams)
    try:
        yield stop
    finally:
        if not stop.number:    # else what is printed from now on must not end the run either
            sys.stdout, sys.stderr = streams
        for number, handler in before.items():
            signal.signal(number, handler)


class Lasting:
    """A text stream that never fails: from the first error on, which lost(error) is told, its file is the null device.

    The file too, for what is buffered is written when the interpreter ends.
    """

    def __init__(self, stream, lost):
        self.stream, self.lost = stream, lost

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self.attempt(lambda: self.stream.write(text))
        return len(text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, write):
        try:
            write()
        except OSError as error:
            with suppress(OSError):    # a stream without a file
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self.stream.fileno())
                os.close(null)
            self.lost(error)


def name_of(number):
    return 'SIGPIPE' if number == BROKEN_PIPE else signal.Signals(number).name


def command_to_go_on(*flags):
    """The command of this process with flags, in place of those of the same name."""
    names = tuple(flag.split('=')[0] + '=' for flag in flags)
    kept = [arg for arg in sys.argv if not arg.startswith((*names, '--overwrite='))]
    processes = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    program = ['python'] if processes == 1 else ['torchrun', '--standalone', f'--nproc_per_node={processes}']
    return shlex.join([*program, *kept, *flags])
