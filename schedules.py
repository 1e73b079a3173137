"""What happens at which iteration: functions of the settings and the iteration alone."""


def stage(config, start_iter, it):
    """1: trunk alone; 2: and sampler; 3: and critic. Each begins at its start iteration."""
    if config.add_critic_head and it >= start_iter['critic']:
        return 3
    if config.add_sampler_head and it >= start_iter['sampler']:
        return 2
    return 1


def describe_stage(config, number):
    learns = {'main model': not config.freeze_trunk, 'sampler': config.add_sampler_head and number >= 2,
              'critic': number == 3}
    return ' + '.join(name for name in learns if learns[name]) or 'nothing learns'


def begins_to_learn(head, start, critic_interval):
    """The iteration in which a head that begins at start learns first: where the critic begins its weight is 0."""
    return start if head == 'sampler' else (start // critic_interval + 1) * critic_interval


def critic_weight(config, start_iter, it):
    """0 where the critic begins, then linear, critic_alpha from end_critic_iteration on."""
    progress = (it - start_iter['critic']) / max(1, config.end_critic_iteration - start_iter['critic'])
    return config.critic_alpha * min(1.0, max(0.0, progress))


def weighted(config, start_iter, it, losses):
    """main + blocks + sampler + critic, the critic's weighted by its schedule; those of a frozen trunk do not count."""
    trunk = float(not config.freeze_trunk)
    weights = {'main': trunk, 'blocks': trunk, 'sampler': 1.0, 'critic': critic_weight(config, start_iter, it)}
    return sum(weights[name] * value for name, value in losses.items())


def rows_to_learn_from(config, current_stage, it=0):
    """Sequences of the global batch for sampler head, critic head and blocks at iteration it; 0 for what does not learn
    then.
    """
    critic = current_stage == 3 and it % config.critic_interval == 0
    on = config.add_sampler_head and current_stage >= 2, critic, config.block_rows > 0
    rows = config.sampler_rows, config.critic_rows, config.block_rows
    return [n * config.gradient_accumulation_steps if learns else 0 for learns, n in zip(on, rows)]


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


def evaluation_is_due(config, it, saved):
    """At every eval_interval and at the end; a resumed run has had the one at the iteration it begins with."""
    due = it % config.eval_interval == 0 or it == config.max_iters
    return config.eval_only or due and not (saved and it == saved['iter_num'] and saved.get('evaluated', True))


def save_is_due(config, it):
    return config.save_interval and it % config.save_interval == 0 and not config.eval_only
