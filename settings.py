"""What the settings of a training run may be: one table of ranges, checked in one place for files and flags alike.

    python train.py --help

shows it. The default in train.py says the type of a setting and the comment beside it the meaning; what no model, no
schedule and no memory can use is refused here, before anything is made.
"""
import math
import os
import re
from dataclasses import dataclass

from errors import InputError


@dataclass(frozen=True)
class Range:
    """Finite numbers from low to high; with below, high itself is out. str() is how a message says it."""
    low: float
    high: float = math.inf
    below: bool = False

    def __contains__(self, value):
        finite = isinstance(value, int) or math.isfinite(value)    # an int may be larger than any float
        return finite and self.low <= value <= self.high and not (self.below and value == self.high)

    def __str__(self):
        if self.high == math.inf:
            return f'at least {shown(self.low)}'
        return f'{shown(self.low)} to {"below " * self.below}{shown(self.high)}'


def shown(number):
    return f'{number:g}' if isinstance(number, float) else str(number)


SEEDS = Range(0, 2 ** 63 - 1)
SHARES = Range(0, 1)
# a size beyond these is a slip; whether memory holds the sizes within them is asked apart (memory.py)
COUNTS, WIDTHS = Range(1, 2 ** 24), Range(1, 2 ** 16)
RANGES = {
    # output
    'eval_interval': Range(1), 'log_interval': Range(1), 'save_interval': Range(0), 'eval_rows': Range(2, 2 ** 24),
    # data
    'gradient_accumulation_steps': COUNTS, 'batch_size': COUNTS, 'block_size': COUNTS,
    # model; vocab_size is the corpus's, whose ids are uint16
    'vocab_size': Range(2, 2 ** 16), 'n_layer': Range(1, 1000), 'n_head': WIDTHS, 'n_embd': WIDTHS,
    'dropout': Range(0, 1, below=True), 'block_rows': Range(0), 'text_masking': Range(0, 0.5),
    # heads
    'start_sampler_iteration': Range(0), 'sampler_min_neighbors_ratio': SHARES, 'sampler_context': Range(1, 1024),
    'sampler_width': WIDTHS, 'sampler_state': WIDTHS, 'sampler_rows': Range(1), 'start_critic_iteration': Range(0),
    'end_critic_iteration': Range(0), 'critic_alpha': Range(0), 'critic_rows': Range(1), 'critic_interval': Range(1),
    # optimizer: no rate above 10 trains anything
    'learning_rate': Range(0, 10), 'muon_learning_rate': Range(0, 10), 'max_iters': Range(1), 'weight_decay': Range(0),
    'beta1': Range(0, 1, below=True), 'beta2': Range(0, 1, below=True), 'grad_clip': Range(0), 'warmup_iters': Range(0),
    'lr_decay_iters': Range(0), 'final_lr_ratio': SHARES,
    # system
    'seed': SEEDS,
}
CHOICES = {
    'init_from': ('scratch', 'resume'), 'model_mode': ('language_model', 'sequence_scorer'),
    'attention_type': ('bidirectional', 'causal'), 'dtype': ('auto', 'float32', 'bfloat16', 'float16'),
}
NOT_EMPTY = ('out_dir', 'checkpoint_name', 'dataset', 'data_dir', 'device')
NAMES = ('checkpoint_name', 'dataset', 'offline_dataset')    # of a file or a folder: no paths


def check(config):
    """InputError names the first setting that is out of range, or those that cannot go together."""
    check_values(vars(config))
    check_together(config)
    if config.init_from == 'scratch':    # else the checkpoint says more
        check_reached(config)
        starts = {head: getattr(config, f'start_{head}_iteration') for head in ('sampler', 'critic')}
        check_frozen(config, starts)
        check_learns(config, starts)


def check_values(values):
    """Every value by itself: {setting: value}, of which those without a rule may be anything."""
    for name, value in values.items():
        if name in RANGES:
            check_range(f'{name}={value!r}', value, RANGES[name])
        elif name in CHOICES and value not in CHOICES[name]:
            raise InputError(f'{name}={value!r}, wanted {" or ".join(CHOICES[name])}')
        elif isinstance(value, str) and ('\0' in value or name in NOT_EMPTY and not value):
            raise InputError(f'{name}={value!r}, wanted {"a name" if name in NOT_EMPTY else "no zero bytes"}')
        elif name in NAMES and os.path.basename(value) != value:
            raise InputError(f'{name}={value!r}, wanted a name without a folder')


def check_range(text, value, wanted):
    """InputError, with the value as a message shows it, unless it lies in the wanted Range."""
    if value not in wanted:
        raise InputError(f'{text}, wanted {wanted}')


def check_not_empty(args, *but):
    """InputError for a flag that was given as '', as a shell's variable that is not set is; args: of argparse."""
    for name, value in vars(args).items():
        if name not in but and value in ('', ['']):
            raise InputError(f'--{name.replace("_", "-")} is empty; leave it out, or give a value')


def check_shape(c):
    """Sizes that cannot go together, of settings or of the model_args of a checkpoint."""
    if c.n_embd % c.n_head or (c.n_embd // c.n_head) % 2:
        raise InputError(f'n_embd={c.n_embd} with n_head={c.n_head}: wanted an even number of channels for each head')
    if (c.add_sampler_head or c.add_critic_head) and \
            (c.attention_type, c.model_mode) != ('bidirectional', 'language_model'):
        raise InputError(f'the heads need attention_type=bidirectional and model_mode=language_model, found '
                         f'{c.attention_type} and {c.model_mode}')


def check_together(c):
    """Settings that contradict one another."""
    check_shape(c)
    if c.checkpoint_name.endswith(('_best.pt', '_last.pt')) or not c.checkpoint_name.endswith('.pt'):
        raise InputError(f'checkpoint_name={c.checkpoint_name!r}, wanted a name that ends in .pt but not in _best.pt '
                         f'or _last.pt, which the run keeps itself; copy that file to another folder to go on from it')
    if c.freeze_trunk and not (c.add_sampler_head or c.add_critic_head):
        raise InputError('freeze_trunk=True without a head trains nothing; wanted add_sampler_head or add_critic_head')
    if (c.model_mode == 'sequence_scorer') != bool(c.generator_checkpoint):
        raise InputError(f'model_mode={c.model_mode} with generator_checkpoint={c.generator_checkpoint!r}: a sequence '
                         f'scorer needs the checkpoint of a generator, such as out-char-diffusion/ckpt.pt, and nothing '
                         f'else takes one')
    if c.model_mode == 'sequence_scorer' and c.attention_type == 'causal':
        raise InputError('model_mode=sequence_scorer with attention_type=causal: a judge reads the whole sequence, '
                         'wanted bidirectional')
    if c.text_masking and c.freeze_trunk:
        raise InputError(f'text_masking={c.text_masking:g} with freeze_trunk=True: it is the trunk that learns from '
                         f'masked text; wanted text_masking=0')
    if c.text_masking and (c.model_mode == 'sequence_scorer' or c.attention_type != 'causal' and not c.block_rows):
        raise InputError(f'text_masking={c.text_masking:g} where nothing is read from left to right; wanted 0, a '
                         f'language model with block_rows, or attention_type=causal')
    if c.freeze_trunk and c.init_from == 'scratch' and not (c.trunk_checkpoint or c.eval_only):
        raise InputError('freeze_trunk=True with a fresh trunk, which would stay as random as it is; wanted '
                         'trunk_checkpoint, or init_from=resume')
    if c.trunk_checkpoint and (c.attention_type, c.model_mode) != ('bidirectional', 'language_model'):
        raise InputError(f'trunk_checkpoint is of a masked-diffusion model; with attention_type={c.attention_type} and '
                         f'model_mode={c.model_mode} wanted none')
    if c.shard and c.add_critic_head and not c.add_sampler_head:
        raise InputError('shard=True with a critic head and no sampler head: processes that decode nothing for the '
                         'critic would not read along; wanted add_sampler_head=True too, or shard=False')
    if c.shard and c.dtype == 'float16':
        raise InputError('shard=True with dtype=float16: an overflow in one process would be unknown to the others; '
                         'wanted bfloat16 or float32')
    check_stages(c)
    if 0 < c.lr_decay_iters <= c.warmup_iters:
        raise InputError(f'lr_decay_iters={c.lr_decay_iters} comes before the warm-up ends, warmup_iters='
                         f'{c.warmup_iters}; wanted more, or 0 for max_iters')


def check_stages(c):
    """A stage that begins before the one it needs."""
    starts = {'sampler': c.start_sampler_iteration, 'critic': c.start_critic_iteration}
    if c.add_sampler_head and c.add_critic_head and starts['critic'] < starts['sampler']:
        raise InputError(f'start_critic_iteration={starts["critic"]} comes before start_sampler_iteration='
                         f'{starts["sampler"]}; the critic learns from the sampler')
    if c.add_critic_head and c.end_critic_iteration < starts['critic']:
        raise InputError(f'end_critic_iteration={c.end_critic_iteration} comes before start_critic_iteration='
                         f'{starts["critic"]}')


def check_reached(c):
    """A stage that never begins."""
    for head in ('sampler', 'critic'):
        start = getattr(c, f'start_{head}_iteration')
        if getattr(c, f'add_{head}_head') and start > c.max_iters and not c.eval_only:
            raise InputError(f'start_{head}_iteration={start} is never reached, max_iters={c.max_iters}; wanted a '
                             f'larger max_iters, an earlier start, or add_{head}_head=False')


def check_learns(c, starts, now=0):
    """Learning rates that are 0 where something is to learn, in a run that goes on from iteration now.

    starts {head: iteration at which it begins}. A head that warms up beyond the end of the decay would learn until the
    warm-up ends and then stand still.
    """
    if c.eval_only:
        return
    if not (c.learning_rate or c.muon_learning_rate):
        raise InputError('learning_rate=0 and muon_learning_rate=0 train nothing; wanted one of them above 0')
    if c.final_lr_ratio > 0 or not 0 < c.lr_decay_iters < c.max_iters:
        return
    ended = f'lr_decay_iters={c.lr_decay_iters} ends all learning before max_iters={c.max_iters}, for final_lr_ratio=0'
    ways_on = 'wanted a later lr_decay_iters, 0 for max_iters, or a final_lr_ratio above 0'
    if now >= c.lr_decay_iters:
        raise InputError(f'{ended}, and this run goes on from iteration {now}: nothing would train; {ways_on}')
    for head in ('sampler', 'critic'):
        begins = getattr(c, f'add_{head}_head') and starts[head] < c.max_iters
        if begins and starts[head] + c.warmup_iters >= c.lr_decay_iters:
            raise InputError(f'{ended}, but the {head} head begins at iteration {starts[head]} and would still be in '
                             f'its warm-up then, warmup_iters={c.warmup_iters}; {ways_on}')


def check_frozen(c, starts, now=0):
    """Heads beside a frozen trunk that begin later than the run; starts and now as in check_learns."""
    first = min((starts[head] for head in ('sampler', 'critic') if getattr(c, f'add_{head}_head')), default=now)
    if c.freeze_trunk and first > now and not c.eval_only:
        raise InputError(f'freeze_trunk=True and the first head begins at iteration {first}: nothing would train until '
                         f'then; wanted a start at {now}')


# -----------------------------------------------------------------------------
# help

def help_text(defaults, path):
    """One line for each setting: its default, what it may be, and the comment beside it in the script at path."""
    lines = []
    with open(path, encoding='utf-8') as f:
        for name, comment in re.findall(r'^(\w+) = [^#\n]*(?:#\s*(.*))?$', f.read(), re.M):
            if name in defaults:
                allowed = RANGES.get(name) or ' or '.join(CHOICES.get(name, ())) or type(defaults[name]).__name__
                lines.append(f'--{name}={defaults[name]}  [{allowed}]  {comment}'.rstrip())
    return '\n'.join(lines)
