# masked diffusion by character with sampler and critic head, in three stages
import torch

out_dir = 'out-char-diffusion'
always_save_checkpoint = True
dataset = 'shakespeare_char'
offline_dataset = 'pydoc_char'   # where there is no network

# sampler head
add_sampler_head = True
start_sampler_iteration = 1000   # start training sampler after 1000 iterations
sampler_min_neighbors_ratio = 0.01   # bootstrap 1% of tokens when no neighbors available

# critic head
add_critic_head = True
start_critic_iteration = 3000    # start critic after sampler is trained
end_critic_iteration = 5000
critic_alpha = 1.0

dropout = 0.1
max_iters = 8000
learning_rate = 1e-3
muon_learning_rate = 0.02

# without a GPU: a size that two cores train while one has lunch
if not torch.cuda.is_available():
    n_layer, n_head, n_embd, dropout = 4, 3, 192, 0.0
    batch_size, sampler_rows, block_rows = 16, 4, 4
    max_iters, eval_interval = 3000, 1000
    start_sampler_iteration, start_critic_iteration, end_critic_iteration = 300, 2250, 2550
    learning_rate = 3e-3
