"""metrics.jsonl: every figure of a run, one JSON object a line, and Weights & Biases where it is asked for.

Strict JSON: a figure that is not a number, such as the rank correlation of constant scores, is null.
"""
import json
import math
import os
from itertools import count

import checkpoint
from errors import InputError, WriteError
from files import require_file, write_atomically

LARGEST = 1e30    # of any figure: beyond, there is nothing to show


class MetricsLog:
    """Appends entries {'iter': ..., 'split': 'train' or 'val' if of an evaluation, figures}.

    A run from scratch begins the file anew, and keeps one that it finds under another name; one resumed from the
    checkpoint saved keeps what came before that and leaves out what it will write again. InputError where the file
    cannot be written.
    """

    def __init__(self, config, saved=None):
        self.path, self.wandb = checkpoint.metrics_path(config), None
        if config.eval_only:    # leaves no trace
            self.path = None
            return
        if config.wandb_log:
            try:
                import wandb
            except ImportError as error:
                raise InputError('wandb_log=True needs Weights & Biases: pip install wandb') from error
            self.wandb = wandb
        if os.path.lexists(self.path):
            require_file(self.path, 'the metrics of a run, or nothing')
        if not (saved or config.overwrite):
            keep_aside(self.path)
        kept = read(self.path, saved['iter_num'], saved.get('evaluated', True)) if saved else []
        write_atomically(self.path, ''.join(map(line, kept)).encode())
        if self.wandb:
            wandb.init(project=config.wandb_project, name=config.wandb_run_name, config=vars(config))

    def write(self, entry):
        """Append an entry whole or, on a full disk, not at all, which is said; the run goes on."""
        if self.path is None:
            return
        size = os.path.getsize(self.path) if os.path.exists(self.path) else 0
        try:
            with open(self.path, 'a') as f:
                f.write(line(entry))
        except OSError as error:
            print(f'cannot write {self.path!r}: {error.strerror}; figures of iteration {entry["iter"]} are lost')
            if os.path.exists(self.path):
                os.truncate(self.path, size)
        if self.wandb:
            group = entry.get('split', 'batch')    # figures of one name are of three kinds
            figures = {f'{group}/{k}': v for k, v in entry.items() if k not in ('iter', 'split')}
            self.wandb.log(figures, step=entry['iter'])

    def close(self):
        if self.wandb:
            self.wandb.finish()


def keep_aside(path):
    """Give figures that a new run finds at path, of one whose checkpoint is not there, a name of their own."""
    if not os.path.exists(path) or not os.path.getsize(path):
        return
    path = os.path.realpath(path)    # a link stays
    kept = next(name for name in (f'{path}.{n}' for n in count(1)) if not os.path.lexists(name))
    try:
        os.rename(path, kept)
    except OSError as error:
        raise WriteError(f'cannot rename {path!r}: {error.strerror}; wanted a folder that can be written') from error
    print(f'note: {path!r} held the figures of another run, which are kept as {kept!r}')


def line(entry):
    """An entry as a line of strict JSON."""
    values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
    return json.dumps(values, allow_nan=False) + '\n'


def read(path, before, evaluated=True):
    """Entries before an iteration, and its evaluation if it was evaluated; figures that are null or nan are left out.

    A torn line, left by a kill, and what else is no entry are dropped; none where there is no file. InputError where it
    cannot be read.
    """
    entries = []
    if not os.path.exists(path):
        return entries
    require_file(path, 'the metrics of a run')
    try:
        with open(path, encoding='utf-8', errors='replace') as f:
            lines = f.readlines()
    except OSError as error:
        raise InputError(f'cannot read {path!r}: {error.strerror}; wanted the metrics of a run') from error
    for text in lines:
        try:
            entry = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and type(entry.get('iter')) is int:
            entries.append({k: v for k, v in entry.items() if v is not None and v == v})    # nan is not itself
    return [e for e in entries if e['iter'] < before or evaluated and e['iter'] == before and 'split' in e]


def of_run(path):
    """Entries of a run: path is its folder or its metrics.jsonl. InputError where there are none, or no figures."""
    file = os.path.join(path, 'metrics.jsonl') if os.path.isdir(path) else path
    if not os.path.isfile(file):
        raise InputError(f'no {file!r}; wanted the out_dir of a run of train.py, which writes metrics.jsonl there')
    entries = [entry for entry in read(file, math.inf) if set(entry) - {'iter', 'split'}]
    fine = all(isinstance(v, (int, float)) and abs(v) <= LARGEST for entry in entries
               for k, v in entry.items() if k != 'split')
    if not entries or not fine:
        raise InputError(f'{file!r} holds {"something other than" if entries else "no"} figures; wanted the '
                         f'metrics.jsonl that train.py writes')
    return entries
