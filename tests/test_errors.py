"""What every script does with its output: line by line, in any encoding; one line for bad input and for Ctrl-C."""
import os
import subprocess
import sys

import pytest

from conftest import ROOT
from errors import InputError, WriteError, within


def python(code, **environ):
    return subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | environ, timeout=60)


def test_a_redirected_log_is_written_line_by_line():
    """It stayed empty for minutes and lost its last lines."""
    code = 'import errors, os; errors.run(lambda: [print("a"), print("b", end=""), os._exit(0)])'
    done = python(code, PYTHONUNBUFFERED='')
    assert done.stdout == 'a\n'


def test_characters_that_the_terminal_lacks_show_as_numbers():
    done = python('import errors; errors.run(lambda: print("d\\u00e9j\\u00e0"))', PYTHONIOENCODING='ascii')
    assert (done.returncode, done.stdout, done.stderr) == (0, 'd\\xe9j\\xe0\n', '')


def test_bad_input_is_one_line_whatever_is_in_it():
    done = python('import errors\ndef main(): raise errors.InputError("a\\nb")\nerrors.run(main)')
    assert (done.returncode, done.stderr) == (2, 'error: a b\n')


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no device that is always full')
def test_output_that_has_no_room_is_one_line():
    """It was a traceback."""
    done = subprocess.run(f'{sys.executable} train.py --help > /dev/full', shell=True, cwd=ROOT, capture_output=True,
                          text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, 'error: cannot write the output: No space left on device; wanted room '
                                                 'where it goes\n')


@pytest.mark.skipif(os.name != 'posix', reason='closes a stream as a shell does')
def test_a_closed_stream_ends_nothing():
    """Without standard error a training ended at its first evaluation, for a bar asks whether that is a terminal."""
    code = 'import progress, errors; errors.run(lambda: print(sum(progress.bar([1, 2], "steps")), flush=True))'
    done = subprocess.run(f"{sys.executable} -c '{code}' 2>&-", shell=True, cwd=ROOT, capture_output=True, text=True,
                          timeout=60)
    assert (done.returncode, done.stdout) == (0, '3\n')


def test_ctrl_c_while_torch_is_imported_is_one_word():
    done = python('import environment\nraise KeyboardInterrupt')
    assert done.returncode in (130, -2) and done.stderr == 'stopped\n'
    assert 'Traceback' in python('import environment\nraise KeyError').stderr


def test_within_says_where_and_keeps_the_kind():
    with pytest.raises(WriteError, match='^here: full$'), within('here'):
        raise WriteError('full')
    assert issubclass(WriteError, InputError)
