"""Loss of the released gpt2-medium (350M parameters) on OpenWebText: evaluates once and ends."""

init_from = "gpt2-medium"
eval_only = True
batch_size = 8
eval_iters = 500  # more than in training, for a steadier figure
wandb_log = False
