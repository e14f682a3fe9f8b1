# Needles in haystacks on 2 CPU cores: `make needle` trains this, its baseline, and draws both. See README.md for the maps.
out_dir = 'out/needle_cpu'
dataset = 'needle'

n_layer = 2
n_head = 4
n_embd = 96
tie_weights = False     # words that are never an answer would all be pushed the same way, and they are the keys
memory_layers = '0'     # the second block's would not be used
memory_heads = 1
memory_conv = 8         # reaches over a number whose digits repeat
segment_len = 64
window_len = 64         # of --arch=mag and mal
memory_gates = 'hard'   # can be exactly 0, and the costs below see to it: what is not worth writing is not written at all
memory_decay = 0.0

block_size = 256
batch_size = 8
max_iters = 2400
warmup_iters = 50
learning_rate = 3e-3
min_lr = 3e-4
beta2 = 0.99
write_cost = 1.0        # nats per unit of mean theta
forget_cost = 200.0     # nats per unit of mean alpha, by nature far smaller than theta
cost_from = 0.4         # once it can recall: asked earlier, the gates close for good

eval_interval = 600
eval_iters = 10
log_interval = 50
