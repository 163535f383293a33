"""GPT-2 124M on a local OpenWebText, 65,536 tokens a step, 20,000 steps.

As written it needs more than 12 GiB if each step is one forward pass: the logits alone are 65,536 x 50,304
numbers, 6.14 GiB in bfloat16. tightfit splits the step so that it fits; `tightfit plan` shows how.

tightfit train configs/train_openwebtext.py
"""

out_dir = "out-openwebtext"
dataset = "openwebtext_local"

batch_size = 64
gradient_accumulation_steps = 1
block_size = 1024

vocab_size = 50304  # GPT-2's 50,257 rounded up to a multiple of 64
n_layer = 12
n_head = 12
n_embd = 768

dtype = "bfloat16"
compile = True

max_iters = 20000
lr_decay_iters = max_iters
log_interval = 100
