"""A 10.7M-parameter model that writes Shakespeare letter by letter; minutes on one GPU, the usual first run.

tightfit train configs/train_shakespeare_char.py
On a CPU add: --eval_iters=20 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --dropout=0
"""

out_dir = "out-shakespeare-char"
dataset = "shakespeare_char"
wandb_log = False
wandb_project = "shakespeare-char"
wandb_run_name = "mini-gpt"

# One million letters are soon learned by heart: look often, keep only the best.
eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False

gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

# A small model takes a high rate; a step of 16,384 tokens is noisy, so its variance is averaged longer.
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
max_iters = 5000
lr_decay_iters = max_iters
beta2 = 0.99
