# All tasks of RULER on a CPU, from rows of 2,048 tokens: docs/results/needles.md.
out_dir = 'out/ruler_cpu'
dataset = 'ruler'

n_layer = 2
n_head = 4
n_embd = 128
tie_weights = False
memory_layers = '0'
memory_heads = 1
memory_conv = 12        # covers a key of two words and the digits after it
memory_depth = 2
memory_values = 24      # numbers of a value that are stored: enough for digits and letters
memory_products = 8     # 4,096 products of a key: many keys that are alike are told apart
segment_len = 128
window_len = 128        # used by --arch=mag and mal
memory_gates = 'hard'
memory_decay = 0.0

block_size = 2048
batch_size = 1
max_iters = 2800
warmup_iters = 50
learning_rate = 3e-3
min_lr = 3e-4
beta2 = 0.99
write_cost = 1.0        # as in config/needle_cpu.py
forget_cost = 200.0
cost_from = 0.4

eval_interval = 500
eval_iters = 20
log_interval = 50
