# Conversations with things to remember, on a CPU: `make talk`. See README.md for what it then knows.
out_dir = 'out/talk_cpu'
dataset = 'talk'

n_layer = 2
n_head = 4
n_embd = 96
tie_weights = False
memory_layers = '0'
memory_heads = 1
memory_conv = 8
segment_len = 64
window_len = 64
memory_gates = 'hard'   # with the costs below: what is not worth writing is not written at all
memory_decay = 0.0

block_size = 256
batch_size = 8
max_iters = 3600
warmup_iters = 50
learning_rate = 3e-3
min_lr = 3e-4
beta2 = 0.99
write_cost = 1.0        # nats per unit of mean theta
forget_cost = 200.0     # nats per unit of mean alpha, by nature far smaller than theta
cost_from = 0.4         # once it can recall

eval_interval = 600
eval_iters = 10
log_interval = 50
