# Recall 4 to 32 pairs after three segments, on 2 CPU cores: `make recall` trains every architecture
# with this config.
out_dir = 'out/recall_cpu'
dataset = 'recall'

n_layer = 2
n_head = 2
n_embd = 64
memory_heads = 1
segment_len = 32
window_len = 32
memory_max_lr = 1.0     # each pair is shown once: a step that overshoots stores more pairs
memory_lr = 0.3

block_size = 256
batch_size = 16
max_iters = 400
warmup_iters = 50
learning_rate = 3e-3
min_lr = 3e-4
beta2 = 0.99

eval_interval = 50
eval_iters = 4
log_interval = 50
