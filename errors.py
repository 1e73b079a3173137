"""What a user can get wrong: one exception, shown as one line on standard error with exit status 2."""
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
    except KeyboardInterrupt:
        print('stopped', file=sys.stderr)
        sys.exit(130)
