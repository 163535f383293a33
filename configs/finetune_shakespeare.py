"""GPT-2 XL finetuned on Shakespeare for 20 steps of 32,768 tokens, about two passes over the text.

tightfit train configs/finetune_shakespeare.py
A smaller card: add --init_from=gpt2-medium
"""

import time

out_dir = "out-shakespeare"
dataset = "shakespeare"
init_from = "gpt2-xl"
wandb_log = False
wandb_project = "shakespeare"
wandb_run_name = "ft-" + str(time.time())

eval_interval = 5
eval_iters = 40
always_save_checkpoint = False

batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5
decay_lr = False
