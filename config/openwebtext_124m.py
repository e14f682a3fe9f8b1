# GPT-2 small's shape with the paper's segments and token counts, for 8 GPUs; data: python prepare.py openwebtext
#   torchrun --standalone --nproc_per_node=8 train.py config/openwebtext_124m.py
# A starting point: never run. Computed (bench.py --plan), not measured, for 8 x H100: 154M parameters with the memories,
# 10.5G tokens; 1 hour at 40% of peak FLOP/s, 12 if every operation goes to memory; 68 GiB of a GPU.
out_dir = 'out/openwebtext_124m'
dataset = 'openwebtext'
init_from = 'auto'   # the same command goes on after a crash

n_layer = 12
n_head = 12
n_embd = 768
memory_heads = 12
segment_len = 512
window_len = 512     # of --arch=mag and mal
num_persist_mem = 128
vocab_size = 50304   # 50257, padded to a multiple of 64

block_size = 4096
batch_size = 8
gradient_accumulation_steps = 16  # 0.5M tokens a step, whatever the number of GPUs
max_iters = 20000
warmup_iters = 700
learning_rate = 6e-4
min_lr = 6e-5
compile = True
eval_interval = 500
eval_iters = 40
keep_last = 3
