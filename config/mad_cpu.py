# MAD on one CPU core, see tasks/mad.py: 12,800 rows, 2 blocks, 128 wide, memories of 4,096 numbers
# (its authors' baseline). --block_size=255 for mad_copy, 31 for mad_memory.
out_dir = 'out/mad_cpu'
dataset = 'mad_recall'

arch = 'lmm'
n_layer = 2
n_head = 4
n_embd = 128
memory_heads = 4        # 4 matrices of 32 x 32
memory_max_lr = 1.0
memory_lr = 0.3
segment_len = 32
window_len = 32

block_size = 127
batch_size = 64
max_iters = 300
warmup_iters = 30
learning_rate = 3e-3
min_lr = 3e-4
beta2 = 0.99

eval_interval = 75
eval_iters = 8
log_interval = 50
