"""Trains the trunk, then the sampler head with it, then the critic head with both.

    python train.py config/train_char_diffusion_sampler.py --batch_size=32
    torchrun --standalone --nproc_per_node=4 train.py config/train_char_diffusion_sampler.py

Reference: nanoGPT, the shape of this file, https://github.com/karpathy/nanoGPT
"""
import environment    # before torch

import math
import sys
import time
from dataclasses import asdict, dataclass, fields
from types import SimpleNamespace

import numpy as np
import torch

import checkpoint
import trunk
from configurator import check_training, configure
from corpus import DATA_DIR, load_or_prepare
from device import autocast, bfloat16_speedup, pick_device, pick_dtype
from distributed import Processes, leave, share_batch, without_sync
from errors import InputError, run
from metrics_log import MetricsLog
from model import GPT, GPTConfig
from noise import derive
from objectives import make_objective
from optimizers import make_optimizers
from progress import duration

# -----------------------------------------------------------------------------
# defaults: masked diffusion on tiny Shakespeare by character, the trunk alone
# output
out_dir = 'out'
eval_interval = 250         # iterations between evaluations, each of which may save a checkpoint
log_interval = 10           # iterations between log lines
eval_rows = 432             # validation sequences in an evaluation, and a third as many of the training split
eval_only = False           # evaluate once and stop
always_save_checkpoint = True    # ckpt.pt is the latest, ckpt_best.pt the best; False: only the best, as ckpt.pt
checkpoint_name = 'ckpt.pt' # file in out_dir
init_from = 'scratch'       # or 'resume': go on from the checkpoint in out_dir
overwrite = False           # a new run may replace the checkpoint in out_dir
wandb_log = False           # needs pip install wandb
wandb_project = 'masked-diffusion'
wandb_run_name = 'run'
# data
dataset = 'shakespeare_char'     # a folder of data_dir
offline_dataset = 'pydoc_char'   # in its place where dataset cannot be downloaded; '' stops instead
data_dir = DATA_DIR
gradient_accumulation_steps = 1  # micro-batches for each update
batch_size = 64             # sequences in a micro-batch; several processes share both out
block_size = 256            # tokens in a sequence
# model
model_mode = 'language_model'       # or 'sequence_scorer': a judge
generator_checkpoint = ''   # of the model whose samples the judge learns to tell from text
attention_type = 'bidirectional'    # or 'causal': an autoregressive model
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.0
block_rows = 32             # sequences of a micro-batch that the trunk reads in blocks too; 0 is off
# sampler head
add_sampler_head = False
start_sampler_iteration = 1000      # stage 2 begins
sampler_min_neighbors_ratio = 0.01  # share of a sequence that is filled first where no token is known
sampler_context = 8         # neighbours on each side that the head sees
sampler_width = 128
sampler_state = 192         # of its recurrent state
sampler_rows = 64           # sequences that the head learns to fill from left to right, half as many by wavefront
# critic head
add_critic_head = False
start_critic_iteration = 3000       # stage 3 begins
end_critic_iteration = 5000         # the critic's weight has risen linearly from 0 to critic_alpha
critic_alpha = 1.0
critic_rows = 2             # sequences of a micro-batch that are decoded for the critic
# optimizer
freeze_trunk = False        # train the heads alone
trunk_checkpoint = ''       # of the finished model whose trunk this one starts with
learning_rate = 1e-3        # AdamW: embeddings, biases, the recurrent state
muon_learning_rate = 0.02   # Muon: every other matrix
max_iters = 8000
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.99
grad_clip = 1.0             # largest gradient norm, of the trunk and of each head by itself; 0 is off
warmup_iters = 100
lr_decay_iters = 0          # linear decay ends here; 0 is max_iters
final_lr_ratio = 0.0        # learning rate at the end, as a share of the highest
# system
device = 'auto'             # 'cuda', 'mps', 'cpu'; auto takes the first there is
dtype = 'auto'              # 'float32', 'bfloat16', 'float16'; auto takes bfloat16 where that is faster
compile = True              # on CUDA alone
seed = 1337
settings = {k: v for k, v in globals().items() if k[0] != '_' and k.islower() and isinstance(v, (int, float, str))}
# -----------------------------------------------------------------------------


def main():
    config = SimpleNamespace(**configure(settings, sys.argv[1:]))
    check_training(config)
    config.device = pick_device(config.device)
    processes = Processes(config.device)
    try:
        train(config, processes)
        processes.barrier()    # the first may still be saving, and gloo aborts when the others leave
    finally:
        processes.close()


def train(config, processes):
    """The whole run: set up, then for every iteration learning rate, evaluation, micro-steps, update, log."""
    # 1. data, model, optimizers; from a checkpoint where the run goes on
    corpus = processes.first_alone(lambda: load_or_prepare(config.dataset, config.offline_dataset, config.data_dir))
    corpus.check(config.block_size)
    saved = open_checkpoint(config, corpus)
    if saved and config.dtype == 'auto':
        config.dtype = saved['config']['dtype']    # the same precision, so that it is the same run
    config.dtype = processes.of_first(lambda: pick_dtype(config.dtype, config.device))
    micro_steps, share = share_batch(config.gradient_accumulation_steps, config.batch_size, processes.world)
    state, objective = build(config, corpus, saved, processes)
    describe(config, corpus, state, micro_steps, share, processes)
    log = MetricsLog(config, state.iter_num if saved else None) if processes.master_process else None

    # 2. the loop
    state.model.train()
    current_stage, module, clock, since = 0, None, time.time(), state.iter_num
    for it in range(state.iter_num, max(state.iter_num, config.max_iters) + 1):
        state.iter_num = it
        if stage(config, state.start_iter, it) != current_stage:
            current_stage = stage(config, state.start_iter, it)
            processes.print0(f'stage {current_stage}: {describe_stage(config, current_stage)}')
            choose_trainable(config, state.model, current_stage)
            module = processes.wrap(objective)
        set_learning_rates(config, state, it)

        if evaluation_is_due(config, it, saved):
            if processes.master_process:
                evaluate_and_save(config, state, objective, corpus, log, current_stage, processes)
            clock, since = time.time(), it
        if config.eval_only or it == config.max_iters:
            break

        sums = {}
        for micro in range(micro_steps):
            seed = derive(config.seed, it, micro * processes.world + processes.rank)
            x0 = next_batch(config, corpus, objective, seed, config.batch_size // share, processes.device)
            with without_sync(module, last=micro == micro_steps - 1):
                with autocast(processes.device, config.dtype):
                    losses = module(x0, seed, *rows_to_learn_from(config, current_stage, share))
                loss = weighted(config, state.start_iter, it, losses) / micro_steps
                if loss.requires_grad:
                    state.scaler.scale(loss).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach() / micro_steps

        update(config, state)

        if it % config.log_interval == 0:
            values = processes.mean(torch.stack(list(sums.values()))).tolist()    # sync point
            ms = (time.time() - clock) * 1000 / (it + 1 - since)
            if processes.master_process:
                log_losses(config, state, log, dict(zip(sums, values)), ms)
            clock, since = time.time(), it + 1
    if log:
        log.close()


# -----------------------------------------------------------------------------
# schedules: functions of the iteration

def stage(config, start_iter, it):
    """1: trunk alone; 2: and sampler; 3: and critic. Each begins at its start iteration."""
    if config.add_critic_head and it >= start_iter['critic']:
        return 3
    if config.add_sampler_head and it >= start_iter['sampler']:
        return 2
    return 1


def describe_stage(config, number):
    names = ['main model'] + ['sampler'] * (config.add_sampler_head and number >= 2) + ['critic'] * (number == 3)
    return ' + '.join(names)


def critic_weight(config, start_iter, it):
    """0 where the critic begins, then linear, critic_alpha from end_critic_iteration on."""
    progress = (it - start_iter['critic']) / max(1, config.end_critic_iteration - start_iter['critic'])
    return config.critic_alpha * min(1.0, max(0.0, progress))


def weighted(config, start_iter, it, losses):
    """main + sampler + critic, the critic's weighted by its schedule; a frozen trunk has no main loss."""
    weights = {'main': float(not config.freeze_trunk), 'sampler': 1.0, 'critic': critic_weight(config, start_iter, it)}
    return sum(weights[name] * value for name, value in losses.items())


def lr_factor(config, it, start=0):
    """Learning rate at it, as a share of the highest, of a part that begins to learn at start.

    Linear warm-up from there, linear decay to final_lr_ratio, then constant.
    """
    end = config.lr_decay_iters or config.max_iters
    if it < start + config.warmup_iters:
        return max(0, it - start + 1) / (config.warmup_iters + 1)
    if it >= end:
        return config.final_lr_ratio
    progress = (it - start - config.warmup_iters) / (end - start - config.warmup_iters)
    return 1 - (1 - config.final_lr_ratio) * progress


def set_learning_rates(config, state, it):
    for part, optimizers in state.optimizers.items():
        for optimizer, lr in zip(optimizers, (config.muon_learning_rate, config.learning_rate)):
            optimizer.param_groups[0]['lr'] = lr * lr_factor(config, it, state.start_iter[part])


def evaluation_is_due(config, it, saved):
    """At every eval_interval and at the end; a resumed run has had the one at the iteration it begins with."""
    due = it % config.eval_interval == 0 or it == config.max_iters
    return config.eval_only or due and not (saved and it == saved['iter_num'])


# -----------------------------------------------------------------------------
# set-up

@dataclass
class State:
    """What a run changes as it goes on, and a checkpoint holds."""
    model: GPT
    optimizers: dict         # {part: [Muon, AdamW]}
    scaler: torch.amp.GradScaler
    start_iter: dict         # {part: the iteration at which it begins to learn}
    iter_num: int = 0
    best_val_loss: float = math.inf


def open_checkpoint(config, corpus):
    """The checkpoint to resume from, or None for a run from scratch. InputError where the run would lose one."""
    path = checkpoint.path_of(config)
    if config.init_from == 'resume':
        saved = checkpoint.load_for_resume(path, config)
        checkpoint.require_same_vocabulary(saved['corpus'], path, corpus.meta)
        return saved
    checkpoint.refuse_to_replace(path, config)
    return None


def build(config, corpus, saved, processes):
    """State and objective of the run, on its device; a head that the checkpoint lacks is added fresh."""
    torch.manual_seed(config.seed)
    args = {f.name: getattr(config, f.name) for f in fields(GPTConfig) if hasattr(config, f.name)}
    model = GPT(GPTConfig(**args | {'vocab_size': corpus.meta['vocab_size']}))
    generator = None
    if config.generator_checkpoint:
        generator = checkpoint.load_generator(config.generator_checkpoint, corpus.meta, config.block_size)
        generator.to(processes.device)
    if saved:
        processes.print0(f'Resuming from {checkpoint.path_of(config)} at iteration {saved["iter_num"]}')
        for head in checkpoint.load_weights(model, saved, checkpoint.path_of(config)):
            processes.print0(f'{checkpoint.path_of(config)} has no {head} head: a fresh one is added')
    else:
        processes.print0('Initializing a new model from scratch')
        if generator and trunk.copy(generator, model):
            processes.print0("The judge starts from the generator's trunk")
        if config.trunk_checkpoint:
            trunk.start_from(model, config.trunk_checkpoint, corpus.meta)
            processes.print0(f'The trunk is that of {config.trunk_checkpoint}')
    model.to(processes.device)
    scaler = torch.amp.GradScaler(processes.device.split(':')[0], enabled=config.dtype == 'float16')
    start_iter = {'trunk': 0, 'sampler': config.start_sampler_iteration, 'critic': config.start_critic_iteration}
    state = State(model, make_optimizers(config, model), scaler, start_iter)
    if saved:
        state.iter_num, state.best_val_loss = saved['iter_num'], saved['best_val_loss']
        state.start_iter = checkpoint.resumed_start_iter(start_iter, saved)
        checkpoint.load_optimizers(state.optimizers, saved)
        if saved['scaler']:    # empty unless that run was in float16
            scaler.load_state_dict(saved['scaler'])
    return state, make_objective(model, config, generator)


def choose_trainable(config, model, current_stage):
    """Gradients for the trunk, unless it is frozen, and for the heads whose stage has come."""
    on = {'trunk': not config.freeze_trunk, 'sampler': config.add_sampler_head and current_stage >= 2,
          'critic': current_stage == 3}
    for part, params in model.parts().items():
        for p in params:
            p.requires_grad_(on[part])


def describe(config, corpus, state, micro_steps, share, processes):
    """Print what the run is, as the guide shows it."""
    counts = {part: sum(p.numel() for p in params) for part, params in state.model.parts().items()}
    total, sequences = sum(counts.values()), config.batch_size * config.gradient_accumulation_steps
    shares = ', '.join(f'{part} {n:,}, {n / total:.1%}' for part, n in counts.items())
    plural = lambda n, word: f'{n} {word}' + ('es' if word == 'process' else 's') * (n > 1)
    speedup = f', where bfloat16 is {bfloat16_speedup():.1f} times as fast as float32' if config.device == 'cpu' else ''
    lines = [
        f'Using {config.attention_type} attention',
        config.add_sampler_head and f'Sampler head enabled (start_iter={state.start_iter["sampler"]})',
        config.add_critic_head and f'Critic head enabled (alpha={config.critic_alpha})',
        f'number of parameters: {total / 1e6:.2f} M ({shares})',
        f'{corpus.meta["name"]}: {corpus.meta["train_tokens"]:,} training tokens, {config.max_iters:,} iterations of '
        f'{sequences * config.block_size:,} tokens',
        f'global batch: {sequences} sequences = {plural(processes.world, "process")} x '
        f'{plural(micro_steps, "micro-step")} x {config.batch_size // share} sequences',
        f'{config.dtype} on {config.device}{speedup}; seed {config.seed}',
        'settings: ' + ' '.join(f'{k}={v}' for k, v in vars(config).items())]
    processes.print0('\n'.join(filter(None, lines)))


# -----------------------------------------------------------------------------
# the steps of an iteration

def next_batch(config, corpus, objective, seed, n, device):
    """n sequences of the training split, (n, block_size) int64, chosen by the seed of the micro-step."""
    rows = corpus.random_rows('train', n, config.block_size + objective.extra_tokens, np.random.default_rng(seed))
    return torch.from_numpy(rows).to(device, non_blocking=True)


def rows_to_learn_from(config, current_stage, share):
    """sampler_rows, critic_rows and block_rows of this process in this stage; 0 for what does not learn."""
    on = config.add_sampler_head and current_stage >= 2, current_stage == 3, config.block_rows > 0
    rows = config.sampler_rows, config.critic_rows, config.block_rows
    return [max(1, n // share) if learns else 0 for learns, n in zip(on, rows)]


def update(config, state):
    """One step of every optimizer that has gradients; each part is clipped by itself."""
    moved = False
    for part, optimizers in state.optimizers.items():
        params = [p for p in state.model.parts()[part] if p.grad is not None]
        if not params:
            continue
        for optimizer in optimizers:
            state.scaler.unscale_(optimizer)
        if config.grad_clip:
            torch.nn.utils.clip_grad_norm_(params, config.grad_clip)
        for optimizer in optimizers:
            state.scaler.step(optimizer)
            optimizer.zero_grad()
        moved = True
    if moved:
        state.scaler.update()


def evaluate_and_save(config, state, objective, corpus, log, current_stage, processes):
    """Validation on fixed sequences of both splits, then the checkpoints that it earns."""
    value = evaluate(config, state, objective, corpus, log, current_stage, processes)
    if not math.isfinite(value):
        raise InputError(f'iteration {state.iter_num}: the validation {objective.figure} is {value}; nothing is saved, '
                         f'earlier checkpoints stay; try a lower learning_rate or muon_learning_rate')
    better = value < state.best_val_loss or config.freeze_trunk    # which does not move it
    state.best_val_loss = min(value, state.best_val_loss)
    if config.eval_only or state.iter_num == 0:
        return
    for path in checkpoint.paths_to_save(config, better):
        checkpoint.save(path, checkpoint.contents(state, asdict(state.model.config), vars(config), corpus.meta))
        print(f'saved {path}', flush=True)


def evaluate(config, state, objective, corpus, log, current_stage, processes):
    """Likelihood and the heads' losses on both splits, printed; returns the figure of the validation split."""
    state.model.eval()
    heads = config.add_sampler_head and current_stage >= 2, current_stage == 3
    for split, n in (('train', max(2, config.eval_rows // 3)), ('val', config.eval_rows)):
        rows = corpus.spread_rows(split, n, config.block_size + objective.extra_tokens)
        with autocast(processes.device, config.dtype):
            x0 = torch.from_numpy(rows).to(processes.device)
            result = objective.validate(x0, config.batch_size, config.seed, *heads)
        text = f'{objective.title} {result[objective.figure]:.4f} nats per token'
        if objective.figure != 'loss':
            result['bits_per_character'] = result[objective.figure] / math.log(2) / corpus.chars_per_token
            text += f', {result["bits_per_character"]:.4f} bits per character'
        others = [f'{name.replace("_", " ")} {result[name]:.4f}'
                  for name in ('main', 'sampler', 'one_pass_nll', 'critic', 'critic_auc', 'rank_correlation')
                  if name in result]
        print(f'iter {state.iter_num}: {split} {text}' + (f' ({", ".join(others)})' if others else ''), flush=True)
        log.write({'iter': state.iter_num, 'split': split} | result)
    state.model.train()
    return result[objective.figure]


def log_losses(config, state, log, values, ms):
    """The guide's line, and behind it how long the rest takes at this pace; and the figures for metrics.jsonl."""
    it = state.iter_num
    total = weighted(config, state.start_iter, it, values)
    tokens = config.gradient_accumulation_steps * config.batch_size * config.block_size
    print(f'iter {it}: loss {total:.4f} ({", ".join(f"{k} {v:.4f}" for k, v in values.items())}), time {ms:.2f}ms, '
          f'{tokens / ms * 1000:,.0f} tokens/s, {duration((config.max_iters - it) * ms / 1000)} left', flush=True)
    rate = config.learning_rate * lr_factor(config, it)
    log.write({'iter': it, 'loss': total, 'ms': ms, 'learning_rate': rate} | values)


if __name__ == '__main__':
    run(main)
    leave()
