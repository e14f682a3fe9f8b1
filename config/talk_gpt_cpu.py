# The Transformer beside config/talk_cpu.py: same data, steps and parameters, no memory. It sees the last block_size tokens.
out_dir = 'out/talk_gpt_cpu'
dataset = 'talk'

arch = 'gpt'
n_layer = 2
n_head = 4
n_embd = 104
tie_weights = False
memory_heads = 1

block_size = 256
batch_size = 8
max_iters = 3600
warmup_iters = 50
learning_rate = 3e-3
min_lr = 3e-4
beta2 = 0.99

eval_interval = 600
eval_iters = 10
log_interval = 50
