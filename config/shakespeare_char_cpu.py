# Tiny Shakespeare with nanoGPT's CPU budget: 2,000 steps of 12 x 64 characters, 4 layers, 4 heads,
# width 128.
out_dir = 'out/shakespeare_char_cpu'
dataset = 'shakespeare_char'

n_layer = 4
n_head = 4
n_embd = 128
memory_heads = 4
segment_len = 64
window_len = 64     # used by --arch=mag and mal

block_size = 64
batch_size = 12
carry_state = True  # each row continues its text, so the memory reaches beyond 64 characters
reset_prob = 0.1

max_iters = 2000
warmup_iters = 100
learning_rate = 2e-3
min_lr = 1e-4
beta2 = 0.99
eval_interval = 250
eval_iters = 100
log_interval = 50
