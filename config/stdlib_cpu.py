# trial
out_dir = 'out/stdlib_cpu'
dataset = 'stdlib'
n_layer = 4
n_head = 4
n_embd = 128
memory_heads = 4
block_size = 256
segment_len = 64
chunk_len = 64
batch_size = 4
learning_rate = 4e-3
min_lr = 4e-4
warmup_iters = 50
beta2 = 0.99
max_iters = 12
eval_interval = 6
eval_iters = 4
