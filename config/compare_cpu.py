# Compare models of equal size on equal tokens of the Python standard library: see `make compare`.
out_dir = 'out/compare'
dataset = 'stdlib'

n_layer = 4
n_head = 4
n_embd = 128        # 1.12M parameters; the Transformer (--arch=gpt --n_embd=152) has 1.15M
memory_heads = 4
segment_len = 64
window_len = 64     # used by --arch=mag and mal

block_size = 256
batch_size = 4      # 1,024 tokens per step
max_iters = 800
warmup_iters = 100
learning_rate = 2e-3
min_lr = 2e-4
beta2 = 0.99

eval_interval = 800  # evaluate at the start and at the end
eval_iters = 100
log_interval = 100
