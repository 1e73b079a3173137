"""metrics.jsonl: every figure of a run, one JSON object a line, and Weights & Biases where it is asked for."""
import json
import os

import checkpoint
from corpus import write_atomically
from errors import InputError


class MetricsLog:
    """Appends entries {'iter': ..., 'split': 'train' or 'val' if of an evaluation, figures}.

    A run from scratch begins the file anew; one resumed at iteration resumed_at keeps what came before that and leaves
    out what it will write again. InputError where the file cannot be written.
    """

    def __init__(self, config, resumed_at=None):
        self.path, self.wandb = checkpoint.metrics_path(config), None
        if config.eval_only:    # leaves no trace
            self.path = None
            return
        try:
            os.makedirs(config.out_dir, exist_ok=True)
            kept = read(self.path, resumed_at) if resumed_at is not None else []
            write_atomically(self.path, ''.join(json.dumps(entry) + '\n' for entry in kept).encode())
        except OSError as error:
            raise InputError(f'cannot write out_dir {config.out_dir!r}: {error.strerror}') from error
        if config.wandb_log:
            import wandb
            self.wandb = wandb
            wandb.init(project=config.wandb_project, name=config.wandb_run_name, config=vars(config))

    def write(self, entry):
        if self.path is None:
            return
        with open(self.path, 'a') as f:
            f.write(json.dumps(entry) + '\n')
        if self.wandb:
            group = entry.get('split', 'batch')    # figures of one name are of three kinds
            figures = {f'{group}/{k}': v for k, v in entry.items() if k not in ('iter', 'split')}
            self.wandb.log(figures, step=entry['iter'])

    def close(self):
        if self.wandb:
            self.wandb.finish()


def read(path, before):
    """Entries before an iteration, evaluations at it too; a torn line, left by a kill, is dropped."""
    entries = []
    if os.path.exists(path):
        with open(path) as f:
            for line in f:
                try:
                    entries.append(json.loads(line))
                except json.JSONDecodeError:
                    pass
    return [e for e in entries if e['iter'] < before or e['iter'] == before and 'split' in e]
