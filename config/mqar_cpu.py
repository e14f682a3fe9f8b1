# Multi-query associative recall on one CPU core: see tasks/mqar.py.
out_dir = 'out/mqar_cpu'
dataset = 'mqar'

arch = 'lmm'
n_layer = 2
n_head = 2
n_embd = 64
memory_heads = 1
memory_max_lr = 1.0     # each pair is shown once: a step that overshoots stores more pairs
memory_lr = 0.3
segment_len = 64
window_len = 64

block_size = 256
batch_size = 64
max_iters = 305         # 5 million tokens
warmup_iters = 50
learning_rate = 3e-3
min_lr = 3e-4
beta2 = 0.99

eval_interval = 61
eval_iters = 8
log_interval = 61
