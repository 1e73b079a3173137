# a judge of whole samples, beside the generator that it starts from and learns to see through:
#   python train.py config/train_judge.py
#   python sample_simple.py --quality-metric judge --judge-checkpoint-name judge_model.pt
import torch

out_dir = 'out-char-diffusion'
checkpoint_name = 'judge_model.pt'
generator_checkpoint = 'out-char-diffusion/ckpt.pt'
always_save_checkpoint = False   # keep the checkpoint with the best validation loss
model_mode = 'sequence_scorer'
dataset = 'shakespeare_char'     # the generator's own
offline_dataset = 'pydoc_char'

dropout = 0.1
max_iters = 3000

# without a GPU: the size of the generator
if not torch.cuda.is_available():
    n_layer, n_head, n_embd, dropout = 4, 3, 192, 0.0
    batch_size, max_iters, eval_rows = 16, 1000, 216
    learning_rate, muon_learning_rate = 1e-3, 0.01
