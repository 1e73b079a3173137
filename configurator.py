"""Strict configuration: defaults, then config files, then --key=value; a later one wins.

    python train.py config/train_char_diffusion_sampler.py --batch_size=32

A config file is Python whose top-level names are settings. An unknown name, or a value of another type
than the default's, stops the run, in a file and on the command line alike.
"""
import difflib
import os
import types

from errors import InputError

TRUTH = {'true': True, '1': True, 'false': False, '0': False}


def configure(defaults, argv):
    """Settings after every file and flag in argv has been applied, files first.

    defaults {name: value}; argv [str], each a path to a config file or --name=value.
    Returns a dict with the names and types of defaults. InputError names the setting that is wrong.
    """
    config = dict(defaults)
    flags = [arg for arg in argv if arg.startswith('-')]
    for path in argv:
        if path not in flags:
            for name, value in read_file(path).items():
                config[name] = checked(defaults, name, value, path)
    for flag in flags:
        name, equals, text = flag.removeprefix('--').partition('=')
        if not (flag.startswith('--') and equals):
            raise InputError(f'found {flag!r}, wanted a config file or --key=value')
        known(defaults, name, 'the command line')
        config[name] = checked(defaults, name, parsed(text, defaults[name]), 'the command line')
    return config


def read_file(path):
    """Settings that the config file assigns; imported modules and names that start with _ are left out."""
    if not os.path.isfile(path):
        raise InputError(f'no config file {path!r}; the ones at hand are in config/')
    names = {'__file__': path}
    try:
        with open(path, encoding='utf-8') as f:
            exec(compile(f.read(), path, 'exec'), names)
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f'{path} does not run as Python: {type(error).__name__}: {error}') from error
    return {k: v for k, v in names.items() if not k.startswith('_') and not isinstance(v, types.ModuleType)}


def known(defaults, name, where):
    if name not in defaults:
        near = difflib.get_close_matches(str(name), defaults, n=1, cutoff=0.0)
        raise InputError(f'unknown setting {name!r} in {where}; the nearest one is {near[0]!r}')


def parsed(text, default):
    """The value that text stands for, of the default's type where it can be read so, else text itself."""
    try:
        return TRUTH[text.lower()] if isinstance(default, bool) else type(default)(text)
    except (KeyError, ValueError):
        return text


def checked(defaults, name, value, where):
    known(defaults, name, where)
    wanted = type(defaults[name])
    if type(value) is int and value.bit_length() > 64:    # which may not even be printed
        raise InputError(f'setting {name!r} in {where} is an integer of more than 64 bits')
    if wanted is float and type(value) is int:
        value = float(value)
    if type(value) is not wanted:
        raise InputError(f'setting {name!r} in {where} is {value!r}, wanted {wanted.__name__} like {defaults[name]!r}')
    return value
