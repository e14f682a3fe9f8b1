# GPT-2 small's shape with the paper's segment and token counts, for 8 GPUs:
#   torchrun --standalone --nproc_per_node=8 train.py config/openwebtext.py
# A starting point: not measured yet.
out_dir = 'out/openwebtext'
dataset = 'openwebtext'

n_layer = 12
n_head = 12
n_embd = 768
memory_heads = 12
segment_len = 512
chunk_len = 64
num_persist_mem = 128
vocab_size = 50304  # 50257, padded to a multiple of 64

block_size = 4096
batch_size = 2
gradient_accumulation_steps = 64  # 0.5M tokens a step
max_iters = 20000
warmup_iters = 700
learning_rate = 6e-4
min_lr = 6e-5
compile = True
eval_interval = 500
eval_iters = 40
