# The paper's 760M model: 24 layers, width 1536, 16 heads, sequences of 4,096 tokens, 30 billion
# tokens of FineWeb-Edu, on 8 GPUs or more.
#   python prepare.py fineweb_edu --subset=sample-100BT
#   torchrun --standalone --nproc_per_node=8 train.py config/fineweb_760m.py
# A starting point that has never been run. `python bench.py --plan=config/fineweb_760m.py` computes
# hours and memory.
out_dir = 'out/fineweb_760m'
dataset = 'fineweb_edu'
init_from = 'auto'   # the same command resumes after a crash
parallel = 'fsdp'

n_layer = 24
n_head = 16
n_embd = 1536
memory_heads = 24    # of width 64: one head of full width would cost as much as 3.7 blocks
segment_len = 512
window_len = 2048    # used by --arch=mag and mal
num_persist_mem = 128
num_longterm_mem = 0  # 0 = one for each token of a segment; the paper has 256
checkpoint_segments = True
vocab_size = 50304

block_size = 4096
batch_size = 4
gradient_accumulation_steps = 32  # 0.5M tokens per step for any number of GPUs
max_iters = 57000
warmup_iters = 1500
learning_rate = 4e-4
min_lr = 4e-5
compile = True
eval_interval = 500
eval_iters = 40
keep_last = 3
