# The shape of GPT-2 small with the paper's segments and token counts, on 8 GPUs.
#   python prepare.py openwebtext
#   torchrun --standalone --nproc_per_node=8 train.py config/openwebtext_124m.py
# A starting point that has never been run. `bench.py --plan` computes for 8 x H100: 154M parameters
# with the memories, 10.5G tokens, 68 GiB per GPU, 1 hour at 40% of peak FLOP/s or 12 hours if every
# operation goes to GPU memory.
out_dir = 'out/openwebtext_124m'
dataset = 'openwebtext'
init_from = 'auto'   # the same command resumes after a crash

n_layer = 12
n_head = 12
n_embd = 768
memory_heads = 12
segment_len = 512
window_len = 512     # used by --arch=mag and mal
num_persist_mem = 128
vocab_size = 50304   # 50257, padded to a multiple of 64

block_size = 4096
batch_size = 8
gradient_accumulation_steps = 16  # 0.5M tokens per step for any number of GPUs
max_iters = 20000
warmup_iters = 700
learning_rate = 6e-4
min_lr = 6e-5
compile = True
eval_interval = 500
eval_iters = 40
keep_last = 3
