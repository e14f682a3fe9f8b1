# The demo: Python's standard library in bytes, on 2 CPU cores. README.md has the loss and the time.
out_dir = 'out/stdlib_cpu'
dataset = 'stdlib'

n_layer = 4
n_head = 4
n_embd = 128
memory_heads = 4
segment_len = 64

block_size = 256
batch_size = 4
max_iters = 600
warmup_iters = 50
learning_rate = 3e-3
min_lr = 2e-4
beta2 = 0.99

eval_interval = 100
eval_iters = 10
log_interval = 20
