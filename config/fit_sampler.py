# a sampler head and a critic head for a finished model: its trunk is frozen, the model with heads is written beside it
#   python train.py config/fit_sampler.py --trunk_checkpoint=out-char-diffusion/ckpt.pt
#   python sample_simple.py --checkpoint-name fitted.pt
import torch

out_dir = 'out-char-diffusion'
checkpoint_name = 'fitted.pt'
trunk_checkpoint = 'out-char-diffusion/ckpt.pt'
freeze_trunk = True
dataset = 'shakespeare_char'     # the model's own
offline_dataset = 'pydoc_char'
sampler_rows, block_rows = 64, 32    # the head learns to go on behind text
critic_interval = 1

add_sampler_head = True
start_sampler_iteration = 0
add_critic_head = True
start_critic_iteration = 500     # it learns from what the sampler head fills
end_critic_iteration = 600

dropout = 0.0
max_iters, eval_interval = 1000, 250
learning_rate = 1e-3

# without a GPU: the size of train_char_diffusion_sampler.py there
if not torch.cuda.is_available():
    n_layer, n_head, n_embd = 4, 3, 192
    batch_size, sampler_rows, block_rows = 16, 16, 8
    max_iters, start_critic_iteration, end_critic_iteration = 500, 350, 400
    learning_rate = 3e-3
