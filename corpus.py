"""Corpora on disk: text to token ids and back, preparing a folder of data/, reading it for training.

A corpus is a folder with train.bin and val.bin (uint16 ids, the first 90% and the last 10% of the text) and
meta.json (vocabulary, counts, source, sha256). The last id of every vocabulary is [MASK], which no text holds.
"""
import argparse
import hashlib
import http.client
import importlib.util
import json
import math
import os
import urllib.request
import zlib

import numpy as np

import errors
from errors import InputError, within
from files import make_folder, require_file, write_atomically

DATA_DIR = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'data')
BPE_SIZE = 50257    # GPT-2's vocabulary, https://github.com/openai/tiktoken
META = {'name': str, 'kind': str, 'chars': list, 'vocab_size': int, 'source': str, 'sha256': str,
        'train_tokens': int, 'val_tokens': int, 'train_chars': int, 'val_chars': int}


class DownloadError(InputError):
    """A corpus could not be fetched; another one may serve."""


# -----------------------------------------------------------------------------
# text <-> ids

class Tokenizer:
    """Characters, or GPT-2 byte pairs, to ids and back, from the 'kind' and 'chars' of a corpus's meta."""

    def __init__(self, meta):
        self.meta = meta
        self.chars = meta['chars'] if meta['kind'] == 'char' else None
        self.ids = {c: i for i, c in enumerate(self.chars)} if self.chars else None
        self.bpe = None if self.chars else gpt2_encoding()
        self.mask_id = meta['vocab_size'] - 1

    def encode(self, text):
        """Ids of text, a list of int. InputError names the characters that the vocabulary lacks."""
        if self.bpe:
            return self.bpe.encode_ordinary(text)
        unknown = sorted(set(text) - set(self.ids))
        if unknown:
            raise InputError(f'{"".join(unknown)!r} is not in the vocabulary of {self.meta["name"]}; '
                             f'it has {"".join(self.chars)!r}')
        return [self.ids[c] for c in text]

    def decode(self, ids, mask='_'):
        """Text of ids; a [MASK], which only unfinished text has, shows as mask."""
        if self.chars:
            return ''.join(mask if i == self.mask_id else self.chars[i] for i in ids)
        pieces, run = [], []
        for i in [*ids, self.mask_id]:
            if i == self.mask_id:
                pieces.append(self.bpe.decode(run))
                run = []
            else:
                run.append(i)
        return mask.join(pieces)


def gpt2_encoding():
    """GPT-2's byte pairs from tiktoken, which downloads its table once. InputError without a network."""
    import tiktoken
    try:
        return tiktoken.get_encoding('gpt2')
    except Exception as error:    # tiktoken lets errors of requests, urllib3 and the file system through
        raise DownloadError(f'tiktoken could not fetch the GPT-2 table ({type(error).__name__}); connect once, or set '
                            f'TIKTOKEN_CACHE_DIR to a folder that has it, or train on characters') from error


# -----------------------------------------------------------------------------
# preparing

def read_text(path):
    """Text of a UTF-8 file, without a byte-order mark. InputError if there is none or it is not text."""
    require_file(path, 'a UTF-8 text file')
    try:
        with open(path, encoding='utf-8-sig') as f:
            text = f.read()
    except OSError as error:
        raise InputError(f'cannot read {path!r}: {error.strerror}; wanted a UTF-8 text file') from error
    except UnicodeDecodeError as error:
        raise InputError(f'{path!r} is not UTF-8 text (byte {error.start}); convert it, e.g. with '
                         f'iconv -t utf-8') from error
    if '\0' in text:
        raise InputError(f'{path!r} holds zero bytes: a binary file, wanted UTF-8 text')
    return text


def download(url, path, sha256, timeout=10):
    """The text at path, fetched from url unless it is there: what is fetched appears whole and verified or not at all.

    sha256: of the file at url.
    """
    if not os.path.exists(path):
        try:
            with urllib.request.urlopen(url, timeout=timeout) as response:
                data = response.read()
        except (OSError, http.client.HTTPException) as error:    # such as one that breaks off
            raise DownloadError(f'could not download {url} ({error}); connect, or put the file at {path}') from error
        if hashlib.sha256(data).hexdigest() != sha256:
            raise DownloadError(f'{url} has sha256 {hashlib.sha256(data).hexdigest()}, wanted {sha256}')
        write_atomically(path, data)
    return read_text(path)


def prepare_text(name, text, source, kind='char', data_dir=DATA_DIR, overwrite=False):
    """Write the corpus data_dir/name from text and print its counts.

    kind 'char' (vocabulary: the characters of text) or 'gpt2'. InputError if text cannot be a corpus, or would replace
    one of another text, unless it may overwrite it.
    """
    if not text:
        raise InputError(f'{source} is empty; wanted some text, a few hundred thousand characters to be useful')
    chars = sorted(set(text)) if kind == 'char' else []
    if kind == 'char' and len(chars) < 2:
        raise InputError(f'{source} has one distinct character, {chars[0]!r}; wanted at least two')
    if len(chars) > 2 ** 16 - 1:
        raise InputError(f'{source} has {len(chars)} distinct characters; wanted at most 65535')
    meta = {'name': name, 'kind': kind, 'chars': chars, 'vocab_size': (len(chars) or BPE_SIZE) + 1, 'source': source,
            'sha256': hashlib.sha256(text.encode()).hexdigest()}
    folder = os.path.join(data_dir, name)
    path = os.path.join(folder, 'meta.json')
    found = read_meta(path, name) if os.path.exists(path) and not overwrite else meta
    if (found['sha256'], found['kind']) != (meta['sha256'], kind):
        other = 'text' if found['kind'] == kind else 'kind'
        raise InputError(f'{folder!r} holds a corpus of another {other}, on which checkpoints may rest; give another '
                         f'name, or replace it with --overwrite')
    tokenizer = Tokenizer(meta)
    cut = int(0.9 * len(text))
    splits = {'train': text[:cut], 'val': text[cut:]}
    ids = {split: np.array(tokenizer.encode(part), np.uint16) for split, part in splits.items()}
    for split in splits if not (overwrite or os.path.exists(path)) else ():
        require_same_ids(os.path.join(folder, f'{split}.bin'), ids[split])
    make_folder(folder)
    print(f'{name}: {len(text):,} characters from {source}')
    for split, part in splits.items():
        meta[f'{split}_tokens'], meta[f'{split}_chars'] = len(ids[split]), len(part)
        meta[f'{split}_crc32'] = zlib.crc32(ids[split])
        write_atomically(os.path.join(folder, f'{split}.bin'), ids[split].tobytes())
        print(f'{split}.bin: {len(ids[split]):,} tokens')
    print(f'vocabulary: {meta["vocab_size"]:,} with [MASK]')
    write_atomically(path, json.dumps(meta).encode())


def require_same_ids(path, ids):
    """InputError where path, beside which no meta.json tells what it is, holds other ids, as another program's do."""
    if os.path.exists(path) and (os.path.getsize(path) != ids.nbytes or (np.fromfile(path, np.uint16) != ids).any()):
        raise InputError(f'{path!r} holds another text, and no meta.json beside it says which; delete the file, '
                         f'prepare the corpus with --overwrite, or under another name')


def run(prepare, description):
    """Call prepare(data_dir, overwrite) of a data/<name>/prepare.py as its command line says, and exit."""
    parser = argparse.ArgumentParser(description=description.split(':')[0] + '.')
    parser.add_argument('--data-dir', default=DATA_DIR, help='where corpora are kept (default: data/)')
    parser.add_argument('--overwrite', action='store_true', help='replace a corpus of another text')
    args = parser.parse_args()
    errors.run(lambda: prepare(args.data_dir, args.overwrite))


# -----------------------------------------------------------------------------
# reading

def read_meta(path, name):
    """The checked meta.json of the corpus name."""
    if not os.path.isfile(path):
        raise InputError(f'no corpus {name!r} in {os.path.dirname(os.path.dirname(path))}; prepare one with '
                         f'python data/text_char/prepare.py FILE --name {name}')
    try:
        with open(path, encoding='utf-8') as f:
            meta = json.load(f)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f'{path!r} is damaged ({type(error).__name__}); delete the folder and prepare the corpus '
                         f'again') from error
    with within(repr(path)):
        check_meta(meta)
    return meta


def check_meta(meta):
    """InputError unless meta, of a folder or a checkpoint, has every field of a corpus, and vocabulary and size fit."""
    if not isinstance(meta, dict):
        raise InputError(f'the corpus is a {type(meta).__name__}, wanted a dict')
    wrong = [name for name, kind in META.items() if type(meta.get(name)) is not kind]
    if wrong:
        raise InputError(f'{wrong[0]} of the corpus is {repr(meta.get(wrong[0]))[:40]}, wanted '
                         f'{META[wrong[0]].__name__}; prepare it again')
    chars, size = meta['chars'], meta['vocab_size']
    if meta['kind'] not in ('char', 'gpt2'):
        raise InputError(f'kind of the corpus is {meta["kind"]!r}, wanted char or gpt2')
    if meta['kind'] == 'char' and not (all(isinstance(c, str) and len(c) == 1 for c in chars)
                                       and len(set(chars)) == len(chars) == size - 1 >= 1):
        raise InputError(f'the corpus has {len(chars)} characters and vocab_size={size}, wanted as many distinct '
                         f'characters as tokens but for [MASK]')
    if meta['val_tokens'] and not meta['val_chars']:
        raise InputError(f'the corpus has {meta["val_tokens"]} val_tokens of 0 val_chars, wanted at least 1')
    if not 2 <= size <= 2 ** 16 or min(meta[name] for name, kind in META.items() if kind is int) < 0:
        raise InputError(f'the corpus has vocab_size={size}, wanted 2 to {2 ** 16}, and counts of at least 0')


def bits_per_nat(meta):
    """Bits per character of the validation split that a nat per token makes; meta: of a corpus."""
    return meta['val_tokens'] / meta['val_chars'] / math.log(2)


def read_ids(path, split, meta):
    """Ids of a split, a memory map (n,) uint16. InputError if the file is not what meta says."""
    again = 'delete the folder\'s files and prepare it again'
    require_file(path, f'the {split} split of corpus {meta["name"]!r}; {again}')
    found = os.path.getsize(path)
    if found != 2 * meta[f'{split}_tokens']:
        raise InputError(f'{split}.bin of {meta["name"]!r} has {found / 2:g} tokens, meta.json says '
                         f'{meta[f"{split}_tokens"]}; {again}')
    if not found:
        return np.zeros(0, np.uint16)
    try:
        ids = np.memmap(path, np.uint16, 'r')
    except OSError as error:
        raise InputError(f'cannot read {path!r}: {error.strerror}; {again}') from error
    if ids.max() >= meta['vocab_size'] - 1:
        raise InputError(f'{split}.bin of {meta["name"]!r} holds id {ids.max()}, wanted ids below '
                         f'{meta["vocab_size"] - 1}; {again}')
    if meta.get(f'{split}_crc32', zlib.crc32(ids)) != zlib.crc32(ids):
        raise InputError(f'{split}.bin of {meta["name"]!r} is damaged: it does not have its checksum; {again}')
    return ids


class Corpus:
    """A prepared corpus: meta, tokenizer, and random or fixed sequences of its splits.

    name is a folder of data_dir. InputError if it is not prepared or its files do not fit together.
    """

    def __init__(self, name, data_dir=DATA_DIR):
        folder = os.path.join(data_dir, name)
        self.meta = read_meta(os.path.join(folder, 'meta.json'), name)
        self.tokenizer = Tokenizer(self.meta)
        self.splits = {split: read_ids(os.path.join(folder, f'{split}.bin'), split, self.meta)
                       for split in ('train', 'val')}

    def check(self, block_size):
        shortest = min(len(ids) for ids in self.splits.values())
        if shortest <= block_size:
            raise InputError(f'a split of corpus {self.meta["name"]!r} has {shortest} tokens, wanted more than '
                             f'block_size={block_size}; give more text or a smaller --block_size')

    def random_rows(self, split, n, length, rng, chosen=slice(None)):
        """Sequences of length consecutive tokens from n random positions, the chosen ones, (n, length) int64.

        rng: numpy Generator; chosen: their numbers, on which the positions do not depend.
        """
        ids = self.splits[split]
        starts = rng.integers(0, len(ids) - length + 1, n)[chosen]
        return ids[starts[:, None] + np.arange(length)].astype(np.int64)

    def room(self, split, n, length):
        """How many sequences of that length lie side by side in a split: n at most, 2 at least."""
        return max(2, min(n, len(self.splits[split]) // length))

    def spread_rows(self, split, n, length):
        """n sequences from evenly spaced positions, the same on every call, (n, length) int64."""
        ids = self.splits[split]
        starts = np.linspace(0, len(ids) - length, n).astype(np.int64)
        return ids[starts[:, None] + np.arange(length)].astype(np.int64)


def corpus_to_use(name, offline_name, data_dir=DATA_DIR):
    """name, or offline_name where the download of that corpus fails; prepared where data/*/prepare.py can do so.

    offline_name '' allows no other corpus: the failed download is the error.
    """
    try:
        prepare(name, data_dir)
    except DownloadError as error:
        if not offline_name:
            raise
        print(f'\n*** NO NETWORK: training on {offline_name!r} in place of {name!r} ***\n*** {error} ***\n')
        name = offline_name
        prepare(name, data_dir)
    return name


def prepare(name, data_dir):
    """Run data/name/prepare.py for a corpus that is not there yet and has such a script."""
    script = os.path.join(DATA_DIR, name, 'prepare.py')
    if os.path.exists(os.path.join(data_dir, name, 'meta.json')) or not os.path.exists(script):
        return
    spec = importlib.util.spec_from_file_location('prepare', script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if hasattr(module, 'prepare'):    # text_char alone cannot guess which text
        module.prepare(data_dir)
