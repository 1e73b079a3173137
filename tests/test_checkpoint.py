"""Checkpoints: self-contained, whole after a kill, and never executed."""
import os
import pickle

import pytest
import torch

import checkpoint
from conftest import tiny_model
from errors import InputError


def test_the_guides_snippet(trained):
    ckpt = torch.load(trained / 'ckpt.pt', map_location='cpu', weights_only=False)
    assert ckpt['model_args'].get('add_sampler_head', False) is True
    assert ckpt['model_args'].get('start_sampler_iteration', 'N/A') == 3
    sampler_params = [k for k in ckpt['model'].keys() if 'sampler_head' in k]
    assert len(sampler_params) >= 5
    assert {'model_args', 'model', 'optimizer', 'iter_num', 'best_val_loss', 'config'} <= set(ckpt)


def test_it_loads_without_pickle_and_without_its_corpus(trained):
    model, tokenizer, saved = checkpoint.load_model(str(trained / 'ckpt.pt'))
    assert saved['iter_num'] == 12 and saved['corpus']['name'] == 'toy'
    assert tokenizer.decode(tokenizer.encode('the cat')) == 'the cat'
    assert model.sampler_head is not None and not model.training


class Bomb:
    def __reduce__(self):
        return os.system, ('touch exploded',)


def test_a_pickle_bomb_does_not_go_off(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({'model': Bomb()}, 'zip.pt')
    with open('plain.pt', 'wb') as f:
        pickle.dump(Bomb(), f)
    for name in ('zip.pt', 'plain.pt'):
        with pytest.raises(InputError, match='no checkpoint of this project'):
            checkpoint.load(name)
    assert not os.path.exists('exploded')


@pytest.mark.parametrize('damage', ['missing', 'truncated', 'empty', 'text', 'another dict', 'a folder', 'other weights'])
def test_damage_is_one_clear_line(trained, damage):
    path = trained / 'ckpt.pt'
    data = path.read_bytes()
    if damage == 'missing':
        path = trained / 'nowhere.pt'
    elif damage == 'a folder':
        path = trained
    elif damage == 'another dict':
        torch.save({'weights': torch.zeros(3)}, path)
    elif damage == 'other weights':
        torch.save(checkpoint.load(str(path)) | {'model': tiny_model().state_dict()}, path)
    else:
        path.write_bytes({'truncated': data[:len(data) // 2], 'empty': b'', 'text': b'hello world'}[damage])
    with pytest.raises(InputError) as error:
        checkpoint.load_model(str(path))
    assert str(path) in str(error.value) and '\n' not in str(error.value)


def test_a_kill_while_saving_leaves_the_previous_one(tmp_path, monkeypatch):
    path = str(tmp_path / 'ckpt.pt')
    checkpoint.save(path, {'iter_num': 1})

    def killed(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(checkpoint.os, 'fsync', killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, {'iter_num': 2})
    assert torch.load(path, weights_only=True) == {'iter_num': 1}
