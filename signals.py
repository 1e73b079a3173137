"""SIGINT, SIGTERM and SIGHUP: the first one lets a run end its step and save, a second one ends it at once.

    with signals.noted() as stop:
        ...
        if stop.number:
            save()
            sys.exit(128 + stop.number)

A closed laptop, a cluster's pre-emption and Ctrl-C are the same to a run. What the user ignores, as nohup does, stays
ignored.
"""
import os
import shlex
import signal
import sys
import threading
from contextlib import contextmanager
from types import SimpleNamespace

ENDING = [getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGHUP') if hasattr(signal, name)]


@contextmanager
def noted(step='this iteration'):
    """An object whose number is that of the first signal that came, 0 before. step: what the run still does."""
    stop = SimpleNamespace(number=0)

    def note(number, frame):
        if stop.number:
            os._exit(128 + number)
        stop.number = number
        # not print, which a handler could interrupt
        os.write(2, f'{name_of(number)}: ending after {step}; a second one leaves at once\n'.encode())

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in ENDING}
        before = {number: handler for number, handler in before.items() if handler not in (None, signal.SIG_IGN)}
    for number in before:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def name_of(number):
    return signal.Signals(number).name


def command_to_go_on(*flags):
    """The command of this process with flags, in place of those of the same name."""
    names = tuple(flag.split('=')[0] + '=' for flag in flags)
    kept = [arg for arg in sys.argv if not arg.startswith((*names, '--overwrite='))]
    processes = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    program = ['python'] if processes == 1 else ['torchrun', '--standalone', f'--nproc_per_node={processes}']
    return shlex.join([*program, *kept, *flags])
