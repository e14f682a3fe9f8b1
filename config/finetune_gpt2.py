# GPT-2 with a memory, on Tiny Shakespeare: prepare.py shakespeare; then the memory and its gates alone, then everything:
#   python train.py config/finetune_gpt2.py
#   python train.py config/finetune_gpt2.py --init_from=resume --freeze_backbone=False --learning_rate=3e-5 --max_iters=1500
# --init_from=gpt2-medium, gpt2-large, gpt2-xl or a folder takes another, with --memory_heads=16, 20, 25. Made for one GPU.
out_dir = 'out/finetune_gpt2'
dataset = 'shakespeare'
init_from = 'gpt2'
freeze_backbone = True

arch = 'mac'
segment_len = 256       # GPT-2 reads so many tokens at a time, at most 1,024; what came before it knows from memory
window_len = 256        # of --arch=mag and mal
memory_heads = 12
num_persist_mem = 4

block_size = 1024
batch_size = 4
gradient_accumulation_steps = 4
carry_state = True      # the memory reaches further back than a row
reset_prob = 0.1

max_iters = 500
warmup_iters = 20
learning_rate = 1e-3    # of what is new; 3e-5 for everything
min_lr = 1e-5
weight_decay = 0.1

eval_interval = 50
eval_iters = 20
log_interval = 10
