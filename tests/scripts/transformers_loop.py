"""A plain training loop over a transformers model: the workload that was measured on a real RTX 3060.

usage: transformers_loop.py distilgpt2|cerebras OPTIMIZER BATCH
"""

import sys

import torch
from transformers import AutoModelForCausalLM, GPT2Config

CONFIGS = {
    "distilgpt2": GPT2Config(n_layer=6),
    "cerebras": GPT2Config(
        n_embd=768,
        n_layer=10,
        n_head=12,
        n_inner=3072,
        n_positions=2048,
        activation_function="gelu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
}

name, optimizer_name, batch_size = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = AutoModelForCausalLM.from_config(CONFIGS[name])
model.train()
optimizer = getattr(torch.optim, optimizer_name)(model.parameters(), lr=1e-3)
model.to("cuda")
generator = torch.Generator().manual_seed(0)
batches = [torch.randint(0, 50257, (batch_size, 128), generator=generator) for _ in range(4)]
for ids in batches:
    optimizer.zero_grad()
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    batch = {key: value.to("cuda") for key, value in batch.items()}
    outputs = model(**batch)
    loss = outputs.loss
    loss.backward()
    optimizer.step()
