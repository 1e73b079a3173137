"""export.py: a small file that decodes as its checkpoint does, and leaves training and local paths behind."""
import torch

from conftest import checkpoint_in


def test_a_small_file_decodes_as_its_checkpoint(script, trained_once, tmp_path):
    """Both rounded to bfloat16 they are the same model: equal samples. A whole one has optimizer states as well."""
    whole = trained_once[0] / 'ckpt.pt'
    status, out, err = script('export.py', whole, tmp_path / 'small.pt')
    assert status == 0 and 'iteration 12' in out, err
    assert (tmp_path / 'small.pt').stat().st_size < whole.stat().st_size / 3
    small = checkpoint_in(tmp_path, 'small.pt')
    assert set(small) == {'model_args', 'model', 'iter_num', 'start_iter', 'corpus', 'commit', 'config'}
    assert str(tmp_path.parent) not in repr({k: v for k, v in small.items() if k != 'model'})
    rounded = torch.load(whole, weights_only=True)
    assert all(torch.equal(rounded['model'][name].bfloat16(), w) for name, w in small['model'].items())
    rounded['model'] = {name: w.bfloat16() for name, w in rounded['model'].items()}
    torch.save(rounded, tmp_path / 'rounded.pt')
    texts = []
    for name in ('rounded.pt', 'small.pt'):
        status, out, err = script('sample_simple.py', '--out-dir', tmp_path, '--checkpoint-name', name, '--dtype',
                                  'float32', '--num-samples', 2, '--iterations', 2, '--no-progress')
        assert status == 0, err
        texts.append(out.partition('--- sample')[2].partition('\n---\n')[0])
    assert texts[0] == texts[1] and len(texts[0]) > 2 * 32


def test_what_it_refuses(script, trained_once, tmp_path):
    taken = tmp_path / 'taken.pt'
    taken.write_text('mine')
    for arguments, said in (((trained_once[0] / 'ckpt.pt', taken), 'exists'),
                            ((tmp_path / 'none.pt', tmp_path / 'new.pt'), 'no checkpoint'),
                            ((trained_once[0] / 'ckpt.pt', tmp_path / 'no' / 'new.pt'), 'cannot write')):
        status, _, err = script('export.py', *arguments)
        assert status == 2 and said in err and err.count('\n') == 1, err
    assert taken.read_text() == 'mine' and not (tmp_path / 'new.pt').exists()


def test_what_is_no_weight_is_one_line(script, trained, tmp_path):
    saved = checkpoint_in(trained)
    saved['model']['wte.weight'] = 5
    torch.save(saved, tmp_path / 'odd.pt')
    status, _, err = script('export.py', tmp_path / 'odd.pt', tmp_path / 'new.pt')
    assert status == 2 and 'do not fit together' in err and err.count('\n') == 1


def test_it_cannot_be_resumed_and_says_so(script, refused, trained_once, tmp_path):
    script('export.py', trained_once[0] / 'ckpt.pt', tmp_path / 'ckpt.pt')
    assert 'lacks best_val_loss, optimizer' in refused(tmp_path, '--init_from=resume', '--max_iters=20')


def test_the_shipped_model_stands_in_until_one_is_trained(script, trained_once, tmp_path, monkeypatch):
    """For the defaults alone: another folder or name is a mistake that wants to be told."""
    script('export.py', trained_once[0] / 'ckpt.pt', tmp_path / 'small.pt')
    monkeypatch.setattr('generation.SHIPPED', str(tmp_path / 'small.pt'))
    (tmp_path / 'elsewhere' / 'out-char-diffusion').mkdir(parents=True)    # as after an evaluation or a judge
    for arguments, status, said in (([], 0, 'this is the shipped model'), (['--out-dir', 'mine'], 2, 'no checkpoint'),
                                    (['--checkpoint-name', 'best.pt'], 2, 'no checkpoint')):
        found, out, err = script('sample_simple.py', '--num-samples', 1, '--iterations', 1, '--no-progress', *arguments,
                                 cwd=tmp_path / 'elsewhere')
        assert found == status and said in out + err
