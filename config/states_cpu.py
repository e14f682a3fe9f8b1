# State tracking on one CPU core: parity, mod5, s3 or s5, see tasks/states.py.
out_dir = 'out/states_cpu'
dataset = 'parity'

arch = 'lmm'
n_layer = 2
n_head = 4
n_embd = 64
memory_heads = 4
memory_max_lr = 1.0     # a step that may overshoot: eigenvalues of the transition down to -1
window_len = 41
segment_len = 41

block_size = 41
batch_size = 64
max_iters = 1500
warmup_iters = 50
learning_rate = 3e-3
min_lr = 3e-4
beta2 = 0.99

eval_interval = 250
eval_iters = 8
log_interval = 250
