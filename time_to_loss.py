"""How long a run trained until each of its evaluations: seconds against its bound or likelihood, from metrics.jsonl."""
import metrics_log
from errors import InputError


def training_seconds(entries, it):
    """Seconds of the iterations before it: a log line's ms an iteration holds back to the line before. Without pauses.

    entries: of metrics.jsonl. Evaluations and checkpoints, which a log line leaves out, cost nothing here.
    """
    lines = sorted((entry['iter'] + 1, entry['ms']) for entry in entries if 'ms' in entry)
    seconds, done, ms = 0.0, 0, 0.0
    for end, ms in lines:
        seconds += max(0, min(end, it) - done) * ms / 1000
        done = max(done, end)
    return seconds + max(0, it - done) * ms / 1000


def table(out_dir):
    """Lines of a table: iteration, seconds of training, figure of every evaluation. InputError without any."""
    entries = metrics_log.of_run(out_dir)
    figures = [(entry['iter'], name, entry[name]) for entry in entries if entry.get('split') == 'val'
               for name in ('nelbo', 'nll', 'loss') if name in entry]
    if not figures:
        raise InputError(f'{out_dir!r} has no evaluation yet')
    return [f'{out_dir}: iteration, seconds of training, validation',
            *(f'{it:8} {training_seconds(entries, it):10.1f} s   {name} {value:.4f}' for it, name, value in figures)]
