# the autoregressive baseline and evaluator: the same trunk, causal
import torch

out_dir = 'out-char-ar'
always_save_checkpoint = False   # keep the checkpoint with the best validation loss: it overfits
attention_type = 'causal'
dataset = 'shakespeare_char'
offline_dataset = 'pydoc_char'

dropout = 0.2
max_iters = 3000

# without a GPU: the size of the diffusion model, about six minutes on two cores
if not torch.cuda.is_available():
    n_layer, n_head, n_embd, dropout = 4, 3, 192, 0.1
    batch_size, max_iters = 16, 1500
    learning_rate = 3e-3
