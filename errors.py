"""What a user can get wrong: one exception, shown as one line on standard error with exit status 2."""
import os
import sys


class InputError(ValueError):
    """Bad input: the message says what was found, what was wanted, and which command helps."""


def run(main):
    """Call main(); an InputError becomes one line and exit status 2, Ctrl-C becomes status 130."""
    try:
        main()
    except InputError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:    # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        print('stopped', file=sys.stderr)
        sys.exit(130)
