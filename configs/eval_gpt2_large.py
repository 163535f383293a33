"""Loss of the released gpt2-large (774M parameters) on OpenWebText: evaluates once and ends."""

init_from = "gpt2-large"
eval_only = True
batch_size = 8
eval_iters = 500  # more than in training, for a steadier figure
wandb_log = False
