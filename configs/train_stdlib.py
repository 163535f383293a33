# A small GPT on the source text of Python's own standard library: about two minutes on two processor cores.
out_dir = "out-stdlib"
dataset = "stdlib"

n_layer = 4
n_head = 4
n_embd = 256
block_size = 128
dropout = 0.0

batch_size = 24
gradient_accumulation_steps = 1

learning_rate = 3e-3
min_lr = 3e-4
beta2 = 0.99
warmup_iters = 50
max_iters = 500
lr_decay_iters = max_iters

eval_interval = 250
eval_iters = 20
log_interval = 50

sample_at_end = 200
start = "class "
