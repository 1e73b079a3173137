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
    except Exception as error:
        raise InputError(f'{path} does not run as Python: {type(error).__name__}: {error}') from error
    return {k: v for k, v in names.items() if not k.startswith('_') and not isinstance(v, types.ModuleType)}


def known(defaults, name, where):
    if name not in defaults:
        near = difflib.get_close_matches(name, defaults, n=1, cutoff=0.0)
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
    if wanted is float and type(value) is int:
        value = float(value)
    if type(value) is not wanted:
        raise InputError(f'setting {name!r} in {where} is {value!r}, wanted {wanted.__name__} like {defaults[name]!r}')
    return value


def check_training(config):
    """InputError for settings of train.py that are out of range or cannot go together."""
    c = config
    if c.n_embd % c.n_head or (c.n_embd // c.n_head) % 2:
        raise InputError(f'n_embd={c.n_embd} with n_head={c.n_head}: wanted an even number of channels for each head')
    for name, allowed in (('attention_type', ('bidirectional', 'causal')), ('init_from', ('scratch', 'resume')),
                          ('model_mode', ('language_model', 'sequence_scorer'))):
        if getattr(c, name) not in allowed:
            raise InputError(f'{name}={getattr(c, name)!r}, wanted {" or ".join(allowed)}')
    if c.checkpoint_name.endswith('_best.pt') or not c.checkpoint_name.endswith('.pt'):
        raise InputError(f'checkpoint_name={c.checkpoint_name!r}, wanted a name that ends in .pt but not in _best.pt, '
                         f'which the run keeps itself; copy that file to another folder to go on from it')
    heads = c.add_sampler_head or c.add_critic_head
    if heads and (c.attention_type, c.model_mode) != ('bidirectional', 'language_model'):
        raise InputError(f'the heads need attention_type=bidirectional and model_mode=language_model, found '
                         f'{c.attention_type} and {c.model_mode}')
    if c.freeze_trunk and not heads:
        raise InputError('freeze_trunk=True without a head trains nothing; wanted add_sampler_head or add_critic_head')
    if (c.model_mode == 'sequence_scorer') != bool(c.generator_checkpoint):
        raise InputError(f'model_mode={c.model_mode} with generator_checkpoint={c.generator_checkpoint!r}: a sequence '
                         f'scorer needs the checkpoint of a generator, such as out-char-diffusion/ckpt.pt, and nothing '
                         f'else takes one')
    for name in ('batch_size', 'block_size', 'gradient_accumulation_steps', 'eval_interval', 'eval_rows',
                 'log_interval', 'n_layer', 'sampler_context', 'sampler_rows', 'critic_rows'):
        if getattr(c, name) < 1:
            raise InputError(f'{name}={getattr(c, name)}, wanted at least 1')
    if c.block_rows < 0 or min(c.sampler_width, c.sampler_state) < 1:
        raise InputError(f'block_rows={c.block_rows}, sampler_width={c.sampler_width}, '
                         f'sampler_state={c.sampler_state}; wanted at least 0, 1 and 1')
    if c.add_sampler_head and c.add_critic_head and c.start_critic_iteration < c.start_sampler_iteration:
        raise InputError(f'start_critic_iteration={c.start_critic_iteration} comes before '
                         f'start_sampler_iteration={c.start_sampler_iteration}; the critic learns from the sampler')
    if c.add_critic_head and c.end_critic_iteration < c.start_critic_iteration:
        raise InputError(f'end_critic_iteration={c.end_critic_iteration} comes before '
                         f'start_critic_iteration={c.start_critic_iteration}')
    if not 0 <= c.sampler_min_neighbors_ratio <= 1:
        raise InputError(f'sampler_min_neighbors_ratio={c.sampler_min_neighbors_ratio}, wanted 0 to 1')
