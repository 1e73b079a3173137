"""What is given when text is generated: a seed text in every sequence, or a template whose blanks are to be filled."""
import torch

import memory
from corpus import read_text
from errors import InputError
from noise import POSITIONS, uniform


def given_text(args, tokenizer, block_size):
    """Sequences with the given text in place: x (num_samples, length) ids and free (num_samples, length) bool.

    args: the flags of sample_simple.py. A template is as long as it is unless --sequence-length says more, which is
    then written behind it; else a sequence has one block. InputError where the text does not fit.
    """
    flag = '--template' if args.template else '--seed-text'
    try:
        if args.template:
            ids = template_ids(read_template(args.template, args.blank), args.blank, tokenizer)
        else:
            ids = tokenizer.encode(args.seed_text)
    except InputError as error:
        raise InputError(f'{flag}: {error}') from error
    ids = torch.tensor(ids, dtype=torch.long)
    length = args.sequence_length or (len(ids) if args.template else block_size)
    if len(ids) > length:
        raise InputError(f'{flag} has {len(ids)} tokens, wanted at most the sequence length, {length}')
    memory.require(17 * args.num_samples * length, 'cpu', f'{args.num_samples} samples of {length} tokens')
    starts = torch.zeros(args.num_samples, dtype=torch.long)
    if args.seed_placement == 'random':
        u = uniform(args.seed, POSITIONS, range(args.num_samples), 0, [0])[:, 0]
        starts = (u * (length - len(ids) + 1)).long()
    at = starts[:, None] + torch.arange(len(ids))
    x = torch.full((args.num_samples, length), tokenizer.mask_id).scatter(1, at, ids.expand(args.num_samples, -1))
    free = x == tokenizer.mask_id
    if args.template and not free.any():
        raise InputError(f'--template has no blank {args.blank!r}; wanted one for each token to be filled, or a larger '
                         f'--sequence-length')
    return x, free


def read_template(text, blank):
    """The template, or that of the file which '@FILE' names, without the end of its last line."""
    names_file = text.startswith('@') and blank != '@'
    return read_text(text[1:]).removesuffix('\n') if names_file else text


def template_ids(template, blank, tokenizer):
    """Ids of a template, [MASK] for every blank character. InputError names all characters that are unknown."""
    parts = template.split(blank)
    tokenizer.encode(''.join(parts))
    ids = tokenizer.encode(parts[0])
    for part in parts[1:]:
        ids += [tokenizer.mask_id, *tokenizer.encode(part)]
    return ids


def is_prefix(args, free):
    """Is text given at the front alone? It must not depend on the number of sequences, so random positions are none."""
    if args.seed_text and args.seed_placement == 'random':
        return False
    return not (free[:, :-1] & ~free[:, 1:]).any()
