"""GPT-2 124M on OpenWebText from scratch, to a loss near 2.85; about four days on eight A100.

torchrun --standalone --nproc_per_node=8 -m tightfit train configs/train_gpt2.py
"""

wandb_log = True
wandb_project = "owt"
wandb_run_name = "gpt2-124M"

# 480 sequences of 1024 tokens: 491,520 tokens a step, however they are split over devices.
batch_size = 12
gradient_accumulation_steps = 5 * 8
block_size = 1024

# 295 billion tokens, and the cosine ends where the run ends.
max_iters = 600000
lr_decay_iters = max_iters

eval_interval = 1000
eval_iters = 200
log_interval = 10

weight_decay = 1e-1
