"""Corpora: there and back, refused when they cannot be one, and another in place of one that cannot be fetched."""
import hashlib
import json
import os
import runpy
import socket
import subprocess
import sys
import threading
import types

import numpy as np
import pytest

import corpus
from conftest import ROOT
from errors import InputError


def prepare(*args):
    command = [sys.executable, os.path.join(ROOT, 'data/text_char/prepare.py'), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


def test_any_text_there_and_back(tmp_path):
    text = 'déjà vu — 東京\n' * 50
    (tmp_path / 'my.txt').write_text(text, encoding='utf-8')
    done = prepare(tmp_path / 'my.txt', '--name', 'mine', '--data-dir', tmp_path)
    assert done.returncode == 0, done.stderr
    c = corpus.Corpus('mine', str(tmp_path))
    ids = np.concatenate([c.splits['train'], c.splits['val']]).tolist()
    assert c.tokenizer.decode(ids) == text and c.tokenizer.encode(text) == ids
    assert len(c.splits['train']) == int(0.9 * len(text)) and max(ids) < c.tokenizer.mask_id == c.meta['vocab_size'] - 1
    assert c.tokenizer.decode([c.tokenizer.mask_id]) == '_'
    assert c.random_rows('train', 3, 8, np.random.default_rng(0)).shape == (3, 8)


@pytest.mark.parametrize('data, message', [
    (b'', 'is empty'), (b'aaaa', 'one distinct character'),
    (b'\xff\xfe\x00abc', 'not UTF-8'), (b'ELF\0\0text', 'binary'), (None, 'cannot read')])
def test_what_cannot_be_a_corpus(tmp_path, data, message):
    file = tmp_path / 'my.txt'
    if data is not None:
        file.write_bytes(data)
    done = prepare(file, '--name', 'mine', '--data-dir', tmp_path)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count('\n') == 1
    assert not (tmp_path / 'mine').exists()


def test_names_cannot_leave_the_data_folder_or_take_a_built_in_one(tmp_path):
    (tmp_path / 'my.txt').write_text('some text')
    for name in ('../mine', 'shakespeare_char'):
        assert prepare(tmp_path / 'my.txt', '--name', name).returncode == 2


def test_room_is_for_what_does_not_overlap(toy_data):
    toy = corpus.Corpus('toy', str(toy_data))
    n = len(toy.splits['val']) // 32
    assert toy.room('val', 10 ** 6, 32) == n > 10 and toy.room('val', 10, 32) == 10 and toy.room('val', 9, 10 ** 6) == 2


def test_unknown_characters_are_named(toy_data):
    with pytest.raises(InputError, match="'XZ' is not in the vocabulary"):
        corpus.Corpus('toy', str(toy_data)).tokenizer.encode('the catZX')


def test_a_missing_or_torn_corpus_says_how_to_make_it(tmp_path):
    with pytest.raises(InputError, match='prepare.py FILE --name nowhere'):
        corpus.Corpus(corpus.corpus_to_use('nowhere', 'pydoc_char', str(tmp_path)), str(tmp_path))
    corpus.prepare_text('torn', 'abcdefghij' * 20, 'test', data_dir=str(tmp_path))
    (tmp_path / 'torn' / 'val.bin').write_bytes(b'1234')
    with pytest.raises(InputError, match='val.bin.*2 tokens'):
        corpus.Corpus('torn', str(tmp_path))


def test_a_corpus_of_another_kind_is_not_replaced(tmp_path, monkeypatch):
    """The same text by byte pairs and by character has another vocabulary, on which checkpoints rest."""
    make = lambda **more: corpus.prepare_text('same', 'to be or not ' * 20, 'test', data_dir=str(tmp_path), **more)
    make()
    path = tmp_path / 'same' / 'meta.json'
    meta = json.loads(path.read_text()) | {'kind': 'gpt2', 'chars': [], 'vocab_size': 300}
    path.write_text(json.dumps(meta))
    with pytest.raises(InputError, match='a corpus of another kind, on which checkpoints may rest'):
        make()
    make(overwrite=True)
    assert json.loads(path.read_text())['kind'] == 'char'


def test_files_of_another_program_are_not_replaced(tmp_path):
    """A folder of nanoGPT has the same names and no meta.json. What a run that was killed has left is written again."""
    make = lambda **more: corpus.prepare_text('same', 'to be or not ' * 20, 'test', data_dir=str(tmp_path), **more)
    make()
    (tmp_path / 'same' / 'meta.json').unlink()
    make()
    (tmp_path / 'same' / 'meta.json').unlink()
    ours = (tmp_path / 'same' / 'val.bin').read_bytes()
    (tmp_path / 'same' / 'val.bin').write_bytes(mine := bytes(len(ours)))
    with pytest.raises(InputError, match='holds another text, and no meta.json'):
        make()
    assert (tmp_path / 'same' / 'val.bin').read_bytes() == mine
    make(overwrite=True)
    assert corpus.Corpus('same', str(tmp_path)).meta['source'] == 'test'


def test_another_text_is_not_called_tiny_shakespeare(tmp_path, monkeypatch, capsys):
    module = runpy.run_path(os.path.join(ROOT, 'data', 'shakespeare_char', 'prepare.py'))
    monkeypatch.setattr(corpus, 'download', lambda *args: 'my own text ' * 20)
    module['prepare'](str(tmp_path))
    assert 'from input.txt, which is not tiny Shakespeare' in capsys.readouterr().out


def test_linked_folders_are_named_and_a_suffix_needs_a_folder(tmp_path):
    (tmp_path / 'mix').mkdir()
    (tmp_path / 'mix' / 'a.txt').write_text('to be or not')
    os.symlink(tmp_path, tmp_path / 'mix' / 'link')
    done = prepare(tmp_path / 'mix', '--name', 'mine', '--data-dir', tmp_path)
    assert done.returncode == 0 and "link' is a link to a folder, and is left out" in done.stdout
    done = prepare(tmp_path / 'mix' / 'a.txt', '--suffix', '.md', '--name', 'one', '--data-dir', tmp_path)
    assert done.returncode == 2 and 'which is no folder' in done.stderr


def test_counts_that_cannot_be_are_one_line(toy_data):
    meta = corpus.Corpus('toy', str(toy_data)).meta
    with pytest.raises(InputError, match='val_tokens of 0 val_chars'):
        corpus.check_meta(meta | {'val_chars': 0})


@pytest.mark.parametrize('name', ['pydoc_char', 'shakespeare_char', 'shakespeare'])
def test_prepare_scripts_read_their_flags(script, name):
    """They ignored what stood behind their names."""
    status, out, _ = script(f'data/{name}/prepare.py', '--help')
    assert status == 0 and '--data-dir' in out
    assert script(f'data/{name}/prepare.py', '--data_dir=x')[0] == 2


def test_a_download_that_breaks_off_is_one_that_failed(tmp_path, monkeypatch):
    """A server that sends less than it promised raises no OSError."""
    monkeypatch.setenv('no_proxy', '*')
    with socket.create_server(('127.0.0.1', 0)) as server:
        server.settimeout(10)

        def answer():
            with server.accept()[0] as client:
                client.recv(4096)
                client.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf')
        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(corpus.DownloadError, match='could not download'):
            corpus.download(f'http://127.0.0.1:{server.getsockname()[1]}/', str(tmp_path / 'input.txt'), 'sha')
        thread.join()
    assert not (tmp_path / 'input.txt').exists()


def test_no_network_is_said_loudly_and_recorded(tmp_path, monkeypatch, capsys):
    def unreachable(url, path, sha256, timeout=10):
        raise corpus.DownloadError(f'could not download {url}')
    monkeypatch.setattr(corpus, 'download', unreachable)
    c = corpus.Corpus(corpus.corpus_to_use('shakespeare_char', 'pydoc_char', str(tmp_path)), str(tmp_path))
    assert c.meta['name'] == 'pydoc_char' and '*** NO NETWORK' in capsys.readouterr().out
    with pytest.raises(InputError, match='could not download'):
        corpus.corpus_to_use('shakespeare_char', '', str(tmp_path))


def test_a_download_is_verified_and_whole(tmp_path):
    source, target = tmp_path / 'source.txt', tmp_path / 'input.txt'
    source.write_text('to be')
    with pytest.raises(InputError, match='wanted 0000'):
        corpus.download(source.as_uri(), str(target), '0000')
    assert os.listdir(tmp_path) == ['source.txt']
    sha256 = hashlib.sha256(b'to be').hexdigest()
    assert corpus.download(source.as_uri(), str(target), sha256) == 'to be' and target.exists()


def test_meta_is_json_that_names_its_source(toy_data):
    meta = json.loads((toy_data / 'toy' / 'meta.json').read_text())
    assert meta['source'] == 'random words' and len(meta['sha256']) == 64


def test_masks_show_in_unfinished_text():
    tokenizer = corpus.Tokenizer({'kind': 'char', 'chars': ['a', 'b'], 'vocab_size': 3, 'name': 'x'})
    assert tokenizer.decode([0, 2, 1, 2]) == 'a_b_'


def test_a_folder_of_files_in_the_order_of_their_names(tmp_path):
    for name, text in (('b.txt', 'second'), ('a.txt', 'first'), ('deep/c.txt', 'third'), ('d.md', 'other')):
        (tmp_path / 'texts' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'texts' / name).write_text(text)
    done = prepare(tmp_path / 'texts', '--name', 'mine', '--data-dir', tmp_path)
    assert done.returncode == 0, done.stderr
    c = corpus.Corpus('mine', str(tmp_path))
    assert c.tokenizer.decode([*c.splits['train'], *c.splits['val']]) == 'first\nsecond\nthird'
    assert c.meta['source'] == 'texts'
    done = prepare(tmp_path / 'texts', '--suffix', '.rst', '--name', 'none', '--data-dir', tmp_path)
    assert done.returncode == 2 and "ends in '.rst'" in done.stderr and done.stderr.count('\n') == 1


def test_byte_pairs_of_any_text(tmp_path, script, monkeypatch):
    encoding = types.SimpleNamespace(encode_ordinary=lambda text: list(text.encode()))
    monkeypatch.setattr(corpus, 'gpt2_encoding', lambda: encoding)
    (tmp_path / 'my.txt').write_text('to be ' * 20)
    status, out, err = script('data/text_char/prepare.py', tmp_path / 'my.txt', '--byte-pairs', '--name', 'mine',
                              '--data-dir', tmp_path)
    assert status == 0 and 'vocabulary: 50,258 with [MASK]' in out, err
    assert corpus.Corpus('mine', str(tmp_path)).meta['kind'] == 'gpt2'
