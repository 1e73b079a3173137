"""Files of results: of which models, text, code and machine they are; read back whole, never replaced by others.

    found = results.read(path, identity, results.check_evaluation)

What is not of the same identity, or cannot be read, is one line, and stays.
"""
import hashlib
import json
import math
import os

from errors import InputError
from files import require_file

# what decides results besides the files that are named; report.py only presents them
SOURCES = ('autoregressive', 'batches', 'blocks', 'cache', 'corpus', 'critic', 'decoding', 'device', 'diffusion',
           'evaluate', 'filling', 'gap_table', 'judge', 'layers', 'likelihood', 'likelihood_table', 'metrics', 'model',
           'ngram', 'noise', 'plans', 'recipes', 'sampler', 'speculative', 'timing')
MEASURES = ('nll', 'nll_ngram', 'distinct4', 'entropy')    # that no report can do without
SETTING = {'decoder': str, 'passes': int, 'schedule': str, 'noise': float, 'temperature': float, 'curve': str,
           'seconds_1': float, 'seconds_batch': float, 'measures': dict}
VALIDATION = {'nelbo': float, 'nelbo_error': float, 'bits_per_character': float, 'bits_error': float}


def digest(path):
    with open(path, 'rb') as f:
        return hashlib.sha256(f.read()).hexdigest()[:16]


def code_version():
    """Digest of the source files that decide what is measured."""
    here = os.path.dirname(os.path.abspath(__file__))
    joined = ''.join(digest(os.path.join(here, f'{name}.py')) for name in SOURCES)
    return hashlib.sha256(joined.encode()).hexdigest()[:16]


def read(path, identity, check=lambda result: None):
    """The results at path, None where there is no file. check(result) raises ValueError for damaged ones.

    InputError if they cannot be read, or names what they were measured with where that is not this identity.
    """
    if not os.path.lexists(path):
        return None
    require_file(path, 'results that evaluate.py wrote, or nothing')
    try:
        with open(path, encoding='utf-8') as f:
            result = json.load(f)
        before = dict(result['identity'])
        check(result)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f'{path!r} cannot be read as results; give another --out-dir, or --overwrite') from error
    differing = [f'{name} {before.get(name)}, now {now}' for name, now in identity.items() if before.get(name) != now]
    if differing:
        raise InputError(f'{path!r} holds results of another identity ({"; ".join(differing)}); '
                         f'give another --out-dir, or --overwrite to replace them')
    return result


def require_identity(path, identity):
    """InputError unless path says that what lies beside it is of this identity."""
    if read(path, identity) is None:
        raise InputError(f'{path!r} is not there, so what the results beside it are of is not known; give another '
                         f'--out-dir, or --overwrite to replace them')


def check_evaluation(result):
    """ValueError or the like unless evaluation.json holds all that report.py reads."""
    require(isinstance(result['settings'], dict) and isinstance(result['reference'], dict))
    all_measures = [*result['reference'].values(), *(entry['measures'] for entry in result['settings'].values())]
    if 'validation' in result:    # which is measured with real text
        check_fields(result['validation'], VALIDATION)
        require('real text' in result['reference'])
    for setting in result['settings'].values():
        check_fields(setting, SETTING)
        require(setting['passes'] > 0)
    require(len(set(map(check_measures, all_measures))) <= 1)


def check_fields(found, wanted):
    for name, kind in wanted.items():
        value = found[name]
        require(is_number(value) if kind is float else type(value) is kind)


def check_measures(measures):
    """Returns how many replicates every measure has."""
    require(isinstance(measures, dict) and set(MEASURES) <= set(measures))
    for measure in measures.values():
        require(all(map(is_number, [measure['value'], measure['error'], *measure['replicates']])))
    (groups,) = {len(measure['replicates']) for measure in measures.values()}
    require(groups > 1)
    return groups


def is_number(value):
    return type(value) in (int, float) and math.isfinite(value)


def require(holds):
    if not holds:
        raise ValueError('damaged')
