"""accelerate's minimal training loop: prepare, accumulate, clip, gather, save and load the state."""

import argparse

import torch
import torch.nn as nn
import torch.nn.functional as F
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--mixed-precision", default="no", choices=["no", "bf16", "fp16"])
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--width", type=int, default=1024)
args = parser.parse_args()

accelerator = Accelerator(mixed_precision=args.mixed_precision, gradient_accumulation_steps=2)
inputs = torch.randn(8 * args.batch_size, 64)
dataset = TensorDataset(inputs, inputs.sum(dim=1, keepdim=True) > 0)
loader = DataLoader(dataset, batch_size=args.batch_size, shuffle=True)
model = nn.Sequential(
    nn.Linear(64, args.width), nn.GELU(), nn.Linear(args.width, args.width), nn.GELU(), nn.Linear(args.width, 1)
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

for epoch in range(4):
    model.train()
    total_loss = torch.tensor(0.0, device=accelerator.device)
    for source, target in loader:
        with accelerator.accumulate(model):
            loss = F.binary_cross_entropy_with_logits(model(source), target.float())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            total_loss += loss.detach()
    model.eval()
    correct = 0
    for source, target in loader:
        with torch.no_grad():
            predictions = model(source) > 0
        predictions, target = accelerator.gather_for_metrics((predictions, target))
        correct += (predictions == target).sum().item()
    accelerator.print(f"epoch {epoch}: loss {total_loss.item() / len(loader):.4f}, correct {correct}")
    accelerator.save_state("accelerate-state")
accelerator.wait_for_everyone()
accelerator.save_model(model, "accelerate-model")
