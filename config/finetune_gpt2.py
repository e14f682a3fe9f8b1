# Add a memory to GPT-2 and train it on Tiny Shakespeare, on one GPU. The second command trains the
# memory and its gates, the third all weights:
#   python prepare.py shakespeare
#   python train.py config/finetune_gpt2.py
#   python train.py config/finetune_gpt2.py --init_from=resume --freeze_backbone=False \
#     --learning_rate=3e-5 --max_iters=1500
# For a larger GPT-2: --init_from=gpt2-medium, gpt2-large, gpt2-xl or a folder, with 16, 20 or 25
# --memory_heads.
out_dir = 'out/finetune_gpt2'
dataset = 'shakespeare'
init_from = 'gpt2'
freeze_backbone = True

arch = 'mac'
segment_len = 256       # tokens in one attention, at most 1,024; the memory knows older ones
window_len = 256        # used by --arch=mag and mal
memory_heads = 12
num_persist_mem = 4

block_size = 1024
batch_size = 4
gradient_accumulation_steps = 4
carry_state = True      # keep the memory across rows: it reaches further back than one row
reset_prob = 0.1

max_iters = 500
warmup_iters = 20
learning_rate = 1e-3    # for the new weights; use 3e-5 for all weights
min_lr = 1e-5
weight_decay = 0.1

eval_interval = 50
eval_iters = 20
log_interval = 10
