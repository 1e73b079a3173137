"""Trains the trunk, then the sampler head with it, then the critic head with both.

    python train.py config/train_char_diffusion_sampler.py --batch_size=32
    torchrun --standalone --nproc_per_node=4 train.py config/train_char_diffusion_sampler.py

Reference: nanoGPT, the shape of this file, https://github.com/karpathy/nanoGPT
"""
import environment    # before torch

import math
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import numpy as np
import torch

import checkpoint
import memory
import resume
import sharding
import signals
import trunk
from batches import Share
from configurator import configure
from corpus import DATA_DIR, Corpus, bits_per_nat, corpus_to_use, prepare
from description import describe_run
from device import autocast, pick_device, pick_dtype
from distributed import Processes, leave, share_batch, without_sync
from errors import InputError, WriteError, run
from files import locked
from finite import HELP, Watch, check_scaler, last_good
from judge import load_generator
from metrics_log import MetricsLog
from model import GPT, GPTConfig
from noise import DROPOUT, derive
from objectives import make_objective
from optimizers import make_optimizers
from progress import duration
from schedules import (describe_stage, evaluation_is_due, lr_factor, rows_to_learn_from, save_is_due, stage,
                       weighted)
from settings import check, help_text

# -----------------------------------------------------------------------------
# defaults: masked diffusion on tiny Shakespeare by character, the trunk alone
# output
out_dir = 'out'             # folder of checkpoints and metrics.jsonl
eval_interval = 250         # iterations between evaluations, each of which may save a checkpoint
save_interval = 100         # iterations between checkpoints without an evaluation, to resume from; 0 is off
stop_on_full_disk = False   # a checkpoint that cannot be written, as on a full disk, stops the run
log_interval = 10           # iterations between log lines
eval_rows = 432             # validation sequences in an evaluation, and a third as many of the training split
eval_only = False           # evaluate once and stop
always_save_checkpoint = True    # ckpt.pt is the latest, ckpt_best.pt the best; False: only the best, as ckpt.pt
checkpoint_name = 'ckpt.pt' # file in out_dir
init_from = 'scratch'       # or 'resume': go on from the checkpoint in out_dir
overwrite = False           # a new run may replace the checkpoint in out_dir, a resumed one begin a new best
wandb_log = False           # needs pip install wandb
wandb_project = 'masked-diffusion'    # its name there
wandb_run_name = 'run'      # and that of the run
# data
dataset = 'shakespeare_char'     # a folder of data_dir
offline_dataset = 'pydoc_char'   # in its place where dataset cannot be downloaded; '' stops instead
data_dir = DATA_DIR         # where corpora are kept
gradient_accumulation_steps = 1  # micro-batches for each update
batch_size = 64             # sequences in a micro-batch; several processes share both out
block_size = 256            # tokens in a sequence
# model
model_mode = 'language_model'       # or 'sequence_scorer': a judge
generator_checkpoint = ''   # of the model whose samples the judge learns to tell from text
attention_type = 'bidirectional'    # or 'causal': an autoregressive model
n_layer = 6                 # transformer blocks
n_head = 6                  # attention heads, each of n_embd / n_head channels
n_embd = 384                # channels
dropout = 0.0               # chance that an output of attention or MLP is left out in training
block_rows = 16             # sequences of a micro-batch that the trunk reads in blocks, not masked; at most half
text_masking = 0.0          # mean share of text read from left to right that is masked, against learning it by heart
# sampler head
add_sampler_head = False    # in stage 2
start_sampler_iteration = 1000      # stage 2 begins
sampler_min_neighbors_ratio = 0.01  # share of a sequence that is filled first where no token is known
sampler_context = 8         # neighbours on each side that the head sees
sampler_width = 128         # channels of the head
sampler_state = 192         # of its recurrent state
sampler_rows = 16           # sequences on which the head learns to fill from left to right; in waves on 3/4 as many
# critic head
add_critic_head = False     # in stage 3
start_critic_iteration = 3000       # stage 3 begins
end_critic_iteration = 5000         # the critic's weight has risen linearly from 0 to critic_alpha
critic_alpha = 1.0          # weight of its loss
critic_rows = 2             # sequences of a micro-batch that are decoded for the critic
critic_interval = 10        # iterations between those in which it learns; log lines show it then
# optimizer
freeze_trunk = False        # train the heads alone
trunk_checkpoint = ''       # of the finished model whose trunk this one starts with
learning_rate = 1e-3        # AdamW: embeddings, biases, convolutions, the recurrent state, maps to one number
muon_learning_rate = 0.02   # Muon: every other matrix
max_iters = 8000            # iterations, those before a resume counted in
weight_decay = 0.1          # of Muon's matrices
beta1 = 0.9                 # AdamW's memory of gradients
beta2 = 0.99                # and of their squares
grad_clip = 1.0             # largest gradient norm, of the trunk and of each head by itself; 0 is off
warmup_iters = 100          # learning rates rise linearly, for each part from where it begins
lr_decay_iters = 0          # linear decay ends here; 0 is max_iters
final_lr_ratio = 0.0        # learning rate at the end, as a share of the highest
# system
device = 'auto'             # 'cuda', 'mps', 'cpu'; auto takes the first there is
dtype = 'auto'              # 'float32', 'bfloat16', 'float16'; auto takes bfloat16 where that is faster
compile = True              # on CUDA alone, without shard
shard = False               # weights, gradients and moments are divided among several processes (FSDP2)
seed = 1337                 # of weights, batches, masks and all other noise
settings = {k: v for k, v in globals().items() if k[0] != '_' and k.islower() and isinstance(v, (int, float, str))}
# -----------------------------------------------------------------------------


def main():
    if {'-h', '--help'} & set(sys.argv[1:]):
        print(help_text(settings, __file__))
        return
    config = SimpleNamespace(**configure(settings, sys.argv[1:]))
    check(config)
    config.device = pick_device(config.device)
    with Processes(config.device, config.shard) as processes:
        ended_by = train(config, processes)
    if ended_by:
        leave(128 + ended_by)


def train(config, processes):
    """Set up: data, model, optimizers, from a checkpoint where the run goes on; then the loop. Returns as iterate."""
    name = processes.of_first(lambda: corpus_to_use(config.dataset, config.offline_dataset, config.data_dir))
    prepare(name, config.data_dir)    # where another machine has a folder of its own
    corpus = Corpus(name, config.data_dir)
    corpus.check(config.block_size)
    writes = processes.master_process and not config.eval_only
    with locked(config.out_dir) if writes else nullcontext():
        processes.barrier()    # no process looks at the checkpoint while another run may still replace it
        if config.generator_checkpoint:    # kept with the judge: another generator may come to lie there
            config.generator_weights = trunk.digest(config.generator_checkpoint)
        saved = resume.open_for_run(config, corpus.meta)
        if saved and config.dtype == 'auto':
            config.dtype = saved['config']['dtype']    # the same precision, so that it is the same run
            check(config)
        config.dtype = processes.of_first(lambda: pick_dtype(config.dtype, config.device))
        micro_steps, divisor = share_batch(config.gradient_accumulation_steps, config.batch_size, processes.world)
        state, objective = build(config, corpus, saved, processes, divisor)
        processes.print0(describe_run(config, corpus, state, micro_steps, divisor, processes.world))
        with signals.noted() as stop:
            log = MetricsLog(config, saved) if processes.master_process else None
            ended_by = iterate(config, processes, corpus, saved, state, objective, log, micro_steps, stop)
    if log:
        log.close()
    return ended_by


def iterate(config, processes, corpus, saved, state, objective, log, micro_steps, stop):
    """The loop over iterations. Returns the number of the signal that ended it, 0 where it came to its end."""
    state.model.train(not config.freeze_trunk)    # the heads have no dropout of their own
    current_stage, module, clock, since, start = 0, None, time.time(), state.iter_num, state.iter_num
    watch = Watch()
    for it in range(start, max(start, config.max_iters) + 1):
        state.iter_num = it
        if stage(config, state.start_iter, it) != current_stage:
            current_stage = stage(config, state.start_iter, it)
            processes.print0(f'stage {current_stage}: {describe_stage(config, current_stage)}')
            if not processes.shards:
                choose_trainable(config, state.model, current_stage)
            module = processes.wrap(objective, some_wait=current_stage == 3 and config.critic_interval > 1)
        set_learning_rates(config, state, it)

        # with several processes all have to agree, which is worth a message in iterations with a log line alone
        agree = it < config.max_iters and (processes.world == 1 or it % config.log_interval == 0)
        ending = processes.largest(stop.number) if agree else 0
        evaluates = not ending and evaluation_is_due(config, it, saved)
        saves = it > start and (ending or save_is_due(config, it)) and not evaluates
        if evaluates or saves:
            paused = time.time()
            check_finite(config, state, watch)
            if processes.master_process or processes.shards:
                if evaluates:
                    evaluate_and_save(config, state, objective, corpus, log, current_stage, processes)
                else:
                    save(config, state, corpus, processes)
            clock += time.time() - paused    # log lines tell the time of training
        if ending:
            processes.print0(f'{signals.name_of(ending)} at iteration {it}; '
                             + (f'{state.saved} is saved; go on with: {signals.command_to_go_on("--init_from=resume")}'
                                if state.saved else 'nothing was saved'))
            processes.barrier()    # nobody leaves before the first has saved
            return ending
        if config.eval_only or it == config.max_iters:
            return 0

        sums = {}
        for micro in range(micro_steps):
            part = micro * processes.world + processes.rank
            own = Share(config.gradient_accumulation_steps * config.batch_size, part, micro_steps * processes.world)
            seed = derive(config.seed, it)
            x0 = next_batch(config, corpus, objective, seed, own, processes.device)
            torch.manual_seed(derive(seed, DROPOUT, part))
            with without_sync(module, last=micro == micro_steps - 1):
                with autocast(processes.device, config.dtype):
                    losses = module(x0, seed, own, *rows_to_learn_from(config, current_stage, it))
                loss = weighted(config, state.start_iter, it, losses) / micro_steps
                if loss.requires_grad:
                    state.scaler.scale(loss).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach() / micro_steps
        norms = update(config, state)

        if not state.scaler.is_enabled():    # an overflow of float16 is the scaler's affair
            watch.note(it, {f'the {name} loss': value for name, value in sums.items()} | norms)
        if it % config.log_interval == 0:
            check_finite(config, state, watch)
            values = processes.mean(torch.stack(list(sums.values()))).tolist()    # sync point
            ms = (time.time() - clock) * 1000 / (it + 1 - since)
            if processes.master_process:
                log_losses(config, state, log, dict(zip(sums, values)), ms)
            clock, since = time.time(), it + 1


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
    saved: str = ''          # the last checkpoint written or resumed from, for messages


def build(config, corpus, saved, processes, divisor):
    """State and objective of the run, on its device; a head that the checkpoint lacks is added fresh."""
    torch.manual_seed(config.seed)
    model_config = GPTConfig.of(config, corpus.meta['vocab_size'])
    parts = processes.world if processes.shards else 1
    memory.require_for_training(config, model_config, processes.device, divisor, parts)
    model = GPT(model_config)
    model.reads_text = config.block_rows != 0
    generator = None
    if config.generator_checkpoint:
        generator = load_generator(config.generator_checkpoint, corpus.meta, config.block_size).to(processes.device)
    if not saved:
        processes.print0('Initializing a new model from scratch')
        if generator and trunk.copy(generator, model):
            processes.print0("The judge starts from the generator's trunk")
        if config.trunk_checkpoint:
            trunk.start_from(model, config.trunk_checkpoint, corpus.meta)
            processes.print0(f'The trunk is that of {config.trunk_checkpoint}')
    model.to('cpu' if processes.shards else processes.device)    # when it is divided its parts move
    scaler = torch.amp.GradScaler(processes.device.split(':')[0], enabled=config.dtype == 'float16')
    start_iter = {'trunk': 0, 'sampler': config.start_sampler_iteration, 'critic': config.start_critic_iteration}
    state = State(model, make_optimizers(config, model), scaler, start_iter)
    if saved:
        path = saved['path']
        processes.print0(f'Resuming from {path} at iteration {saved["iter_num"]}')
        for head in resume.restore(state, saved, start_iter, path):
            processes.print0(f'{path} has no {head} head: a fresh one is added')
        if changed := resume.changed_settings(saved, config):
            processes.print0(f'changed settings: {", ".join(changed)}')
    objective = make_objective(model, config, generator)
    if processes.shards:
        choose_trainable(config, model, current_stage=3)    # for good: a part that has no loss yet has no gradient
        state.optimizers = sharding.shard(objective, state.optimizers, processes,
                                          lambda muon: make_optimizers(config, model, muon))
    return state, objective


def choose_trainable(config, model, current_stage):
    """Gradients for the trunk, unless it is frozen, and for the heads whose stage has come."""
    on = {'trunk': not config.freeze_trunk, 'sampler': config.add_sampler_head and current_stage >= 2,
          'critic': current_stage == 3}
    for part, params in model.parts().items():
        for p in params:
            p.requires_grad_(on[part])


# -----------------------------------------------------------------------------
# the steps of an iteration

def set_learning_rates(config, state, it):
    for part, optimizers in state.optimizers.items():
        for optimizer, lr in zip(optimizers, (config.muon_learning_rate, config.learning_rate)):
            optimizer.param_groups[0]['lr'] = lr * lr_factor(config, it, state.start_iter[part])


def next_batch(config, corpus, objective, seed, own, device):
    """A Share of the iteration's sequences of the training split, (n, block_size) int64; seed: of the iteration."""
    length = config.block_size + objective.extra_tokens
    rows = corpus.random_rows('train', own.total, length, np.random.default_rng(seed), list(own.numbers))
    return torch.from_numpy(rows).to(device, non_blocking=True)


def update(config, state):
    """One step of every optimizer that has gradients; each part is clipped by itself. Returns {part: gradient norm}."""
    norms = {}
    for part, optimizers in state.optimizers.items():
        params = [p for p in state.model.parts()[part] if p.grad is not None]
        if not params:
            continue
        for optimizer in optimizers:
            state.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(params, config.grad_clip or math.inf)
        norms[f'the gradient of the {part}'] = sharding.full(norm)
        for optimizer in optimizers:
            state.scaler.step(optimizer)
            optimizer.zero_grad()
    if norms:
        state.scaler.update()
    return norms


def check_finite(config, state, watch):
    """InputError where a loss or a gradient has not been finite, before anything is saved; a sync point."""
    watch.check(lambda it: stage(config, state.start_iter, it), state.saved)
    check_scaler(state.scaler, state.iter_num, state.saved)


def evaluate_and_save(config, state, objective, corpus, log, current_stage, processes):
    """Validation on fixed sequences of both splits, then the checkpoints that it earns."""
    value = evaluate(config, state, objective, corpus, log, current_stage, processes)
    if not math.isfinite(value):
        raise InputError(f'iteration {state.iter_num}: the validation {objective.figure} is {value}; nothing is saved, '
                         f'{last_good(state.saved)}; {HELP}')
    better = value < state.best_val_loss * (1 + 1e-6 * config.freeze_trunk)    # a frozen trunk does not move it
    best, state.best_val_loss = state.best_val_loss, min(value, state.best_val_loss)
    if config.eval_only or state.iter_num == 0:
        return
    has_saved = save(config, state, corpus, processes, better)
    if not has_saved and state.saved != f'{checkpoint.best_path_of(config)!r} of iteration {state.iter_num}':
        state.best_val_loss = best    # which is what the files hold
    if state.iter_num == config.max_iters and not state.saved:
        processes.print0('no evaluation was better than the first: there is no checkpoint')


def save(config, state, corpus, processes, better=None):
    """Write what the present state earns; better: than before, None if it was not evaluated. Returns whether it could.

    Where the disk is full that is said and training goes on, unless it was to stop or this was the last chance.
    """
    contents = checkpoint.contents(state, asdict(state.model.config), vars(config), corpus.meta, better is not None)
    contents = sharding.gathered(contents, keep=processes.master_process)
    if not processes.master_process:
        return True
    try:
        for path in checkpoint.save_where_due(config, contents, better, first=not state.saved):
            state.saved = f'{path!r} of iteration {state.iter_num}'
            print(f'saved {path}', flush=True)
    except WriteError as error:
        if config.stop_on_full_disk or state.iter_num == config.max_iters:
            raise
        print(f'NOT SAVED: {error}; training goes on and saves again later', flush=True)
        return False
    return True


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
            result['bits_per_character'] = result[objective.figure] * bits_per_nat(corpus.meta)
            text += f', {result["bits_per_character"]:.4f} bits per character'
        others = [f'{name.replace("_", " ")} {result[name]:.4f}'
                  for name in ('main', 'sampler', 'one_pass_nll', 'critic', 'critic_auc', 'rank_correlation')
                  if name in result]
        processes.print0(f'iter {state.iter_num}: {split} {text}' + (f' ({", ".join(others)})' if others else ''))
        if log:
            log.write({'iter': state.iter_num, 'split': split} | result)
    state.model.train(not config.freeze_trunk)
    return result[objective.figure]


def log_losses(config, state, log, values, ms):
    """One line: losses, speed and the time left, without what later stages cost more; the same figures in the log."""
    it, left = state.iter_num, duration((config.max_iters - state.iter_num) * ms / 1000)
    total = weighted(config, state.start_iter, it, values)
    tokens = config.gradient_accumulation_steps * config.batch_size * config.block_size
    print(f'iter {it}: loss {total:.4f} ({", ".join(f"{k} {v:.4f}" for k, v in values.items())}), time {ms:.2f}ms, '
          f'{tokens / ms * 1000:,.0f} tokens/s, {left} left at this pace', flush=True)
    rate = config.learning_rate * lr_factor(config, it)
    log.write({'iter': it, 'loss': total, 'ms': ms, 'learning_rate': rate} | values)


if __name__ == '__main__':
    run(main)
    leave()
