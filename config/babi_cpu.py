# Stories in haystacks (generated bAbI) on a CPU: the first part of `make babi`, which then raises
# the price on writing (experiments/babi.sh). docs/results/babi.md has what the model answers.
out_dir = 'out/babi_cpu'
dataset = 'babi'

arch = 'lmm'
n_layer = 3
n_head = 4              # of the Transformer, --arch=gpt
n_embd = 96
tie_weights = False
memory_heads = 1
memory_conv = 8         # covers a fact
memory_gates = 'hard'   # can be exactly 0; the costs below close them for useless tokens
memory_decay = 0.0

block_size = 256
batch_size = 8
max_iters = 4000
warmup_iters = 50
learning_rate = 3e-3
min_lr = 3e-4
beta2 = 0.99
write_cost = 3.0        # nats per unit of mean theta, the mean over three memories
forget_cost = 600.0     # nats per unit of mean alpha, which is far smaller than theta
cost_from = 0.5         # if the costs begin before the model can recall, the gates stay closed

eval_interval = 600
eval_iters = 10
log_interval = 50
