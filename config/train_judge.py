# a judge of whole samples: python train.py config/train_judge.py --generator_checkpoint=out-char-diffusion/ckpt.pt
import torch

out_dir = 'out-judge'
always_save_checkpoint = False
model_mode = 'sequence_scorer'
dataset = 'shakespeare_char'     # the generator's own
offline_dataset = 'pydoc_char'

dropout = 0.1
max_iters = 3000

# without a GPU: a quarter of an hour on two cores
if not torch.cuda.is_available():
    n_layer, n_head, n_embd, dropout = 4, 3, 192, 0.0
    batch_size, max_iters, eval_rows = 16, 2000, 216
    learning_rate, muon_learning_rate = 1e-3, 0.01
