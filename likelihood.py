"""The exact likelihood of a decoder: the probability that it writes a given text.

A decoder that follows a plan (plans.py) fills each position in a pass and a wave known beforehand. With z_k the trunk's
view when everything of the passes before k is visible,

    log p(x | plan) = sum over passes k and waves w, and over the positions i filled then, of
                      log p_head(x_i | z_k at i, tokens known around i)

and for naive decoding p_lm in place of p_head. For a fixed plan this is the likelihood itself; its mean over random
plans is a lower bound on that of the decoder that draws one. It is what sampling at temperature 1 draws from.
Speculative decoding, where the tokens themselves decide in which pass they are final, has a sum of its own: speculated.

References: order-agnostic autoregression, https://arxiv.org/abs/2110.02037; deterministic orders, DUEL,
https://arxiv.org/abs/2603.01367
"""
from dataclasses import replace

import torch
import torch.nn.functional as F

import speculative
from noise import log_probability, pieces
from sampler import filled_before, uncast


@torch.no_grad()
def log_likelihood(model, x0, plan, use_sampler=True):
    """Log-probability of each token of x0 under the decoder that follows plan, nats; 0 where text is given.

    x0 (B, T) int64 clean ids; plan: of (B, T) or (1, T). Returns (B, T) float64 on the CPU: sum over a sequence for
    the likelihood of the sequence, or of what is not given of it. Costs plan.passes forward passes, which read a text
    once where the plan is blockwise; two where it is speculative.
    """
    if plan.speculative_passes:
        if not use_sampler:
            raise ValueError('the speculative plan drafts with the sampler head; found use_sampler False')
        return speculated(model, x0, plan)
    pass_of, wave_of = plan.pass_of.expand_as(x0), plan.wave_of.expand_as(x0)
    key = pass_of * (int(wave_of.max()) + 1) + wave_of    # earlier positions have a smaller one
    state = lane_states(model, x0, plan) if use_sampler and plan.lanes else None
    reader = model.reader(*x0.shape) if plan.blockwise else None
    result = torch.zeros(x0.shape, dtype=torch.float64)
    for k in range(plan.passes):
        last = None
        if plan.blockwise:
            (lane,) = plan.lanes[k]
            block, last = reader.read_block(x0, lane.start, lane.end)
            hidden = F.pad(block, (0, 0, lane.start, x0.size(1) - lane.end))
        else:
            hidden = model(torch.where(pass_of >= k, model.mask_id, x0))
        sequences, positions = (pass_of == k).nonzero(as_tuple=True)
        for part in pieces(len(sequences), model.config.vocab_size):
            at = sequences[part], positions[part]
            if use_sampler:
                logits = sampler_logits(model, x0, key, wave_of, hidden, at, last, state)
            else:
                logits = model.lm_head(hidden[at])
            result[at[0].cpu(), at[1].cpu()] = log_probability(logits, x0[at]).cpu().double()
    return result


def speculated(model, x0, plan):
    """log_likelihood of speculative decoding (speculative.py): exact, summed over where drafts may have been rejected.

    A token x_i of a draft is kept with probability min(target, draft) and drawn anew with max(0, target - draft), which
    ends the pass; both together are target(x_i). Behind the last pass the draft stands as it is. So the chance that a
    prefix is written and that its end is the d-th token of the draft of pass k follows from that of the prefix before.
    """
    (B, T), (lane,) = x0.shape, plan.lanes[0]
    draft = log_likelihood(model, x0, replace(plan, speculative_passes=0))    # float64 on the CPU
    if T == 1:
        return draft
    trunk = draft.clone()
    reader = model.reader(B, T)
    read = reader.read(x0[:, :-1])
    for t in range(T - 1):    # one position at a time: of a large vocabulary no more logits than in training
        trunk[:, t + 1] = log_probability(reader.lm_head(read[:, t]), x0[:, t + 1]).cpu().double()
    given = plan.pass_of.cpu() < 0
    trunk = torch.where(given, 0.0, trunk)    # what is given is never rejected
    target = speculative.mixture(trunk, draft)
    result = draft.clone()
    checked = torch.zeros(B, plan.passes, speculative.DRAFT, dtype=torch.float64)    # pass k, d tokens of its draft
    checked[:, 0, 0], unchecked = 1, torch.zeros(B, dtype=torch.float64)
    for t in range(lane.start + 1, T):
        checked, unchecked = leave_last(checked, unchecked)
        kept = torch.minimum(target[:, t], draft[:, t]).exp()
        anew = target[:, t].exp() - kept
        on = checked * kept[:, None, None]
        next_pass = on[:, :, -1] + checked.sum(2) * anew[:, None]
        checked = F.pad(on[:, :, :-1], (1, 0))
        checked[:, 1:, 0] += next_pass[:, :-1]
        unchecked = unchecked * draft[:, t].exp()
        total = checked.sum((1, 2)) + unchecked
        result[:, t], checked, unchecked = total.log(), checked / total[:, None, None], unchecked / total
    return torch.where(given, 0.0, result)


def leave_last(checked, unchecked):
    """The last of the passes has a draft that no other checks: its share, (B, K, n) and (B,), is moved."""
    return checked * (torch.arange(checked.size(1)) < checked.size(1) - 1)[:, None], unchecked + checked[:, -1].sum(1)


def lane_states(model, x0, plan):
    """The recurrent state that the sampler head has at each position of x0 (B, T) when it fills its lane: (B, T, S)."""
    states = [model.wte.weight.new_zeros(len(x0), plan.lanes[0][0].start, model.sampler_head.reader.hidden_size)]
    for lane in (lane for lanes in plan.lanes for lane in lanes):
        read = model.sampler_head.states(x0[:, lane.read_from:lane.end], model.wte.weight)
        states.append(read[:, lane.start - lane.read_from:])
    return torch.cat(states, 1)


def sampler_logits(model, x0, key, wave_of, hidden, at, last, state):
    """The sampler head's logits (N, V - 1) at positions, each given the tokens of smaller key (B, T) around it.

    last (B, C), state (B, T, S): of filling from left to right, when only the tokens on the left are given; or None.
    """
    head, offsets = model.sampler_head, model.sampler_head.local.offsets
    with uncast(hidden):    # as in decoding
        around = filled_before(x0, key, key[at], at, offsets, model.mask_id)
        if state is not None:
            around = torch.where(offsets < 0, around, model.mask_id)
        tables, around = head.local.tables_for(model.wte.weight, around)
        view = hidden[at]
        projected = head.project(view, None if last is None else last[at[0]])
        adjusted = head(view, projected, around, tables, None if state is None else state[at])
        return model.lm_head(torch.where((wave_of[at] > 0)[:, None], adjusted, view))
