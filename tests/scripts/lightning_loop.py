"""Lightning's minimal example: a LightningModule, fit with validation and a checkpoint callback, then test."""

import argparse

import lightning as L
import torch
import torch.nn as nn
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--precision", default="32-true")
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--width", type=int, default=512)
parser.add_argument("--accumulate", type=int, default=1)
args = parser.parse_args()


class AutoEncoder(L.LightningModule):
    def __init__(self, width):
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(nn.Linear(28 * 28, width), nn.ReLU(), nn.Linear(width, 3))
        self.decoder = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 28 * 28))

    def training_step(self, batch, batch_idx):
        images, _ = batch
        flat = images.view(images.size(0), -1)
        loss = F.mse_loss(self.decoder(self.encoder(flat)), flat)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        images, _ = batch
        flat = images.view(images.size(0), -1)
        self.log("val_loss", F.mse_loss(self.decoder(self.encoder(flat)), flat))

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)]


images = torch.randn(8 * args.batch_size, 1, 28, 28)
data = TensorDataset(images, torch.randint(0, 10, (len(images),)))
train_loader = DataLoader(data, batch_size=args.batch_size, shuffle=True, pin_memory=True)
val_loader = DataLoader(data, batch_size=args.batch_size)
trainer = L.Trainer(
    accelerator="gpu",
    devices=1,
    max_epochs=2,
    precision=args.precision,
    accumulate_grad_batches=args.accumulate,
    gradient_clip_val=1.0,
    log_every_n_steps=2,
    logger=False,
    callbacks=[ModelCheckpoint(dirpath="lightning-out", monitor="val_loss"), EarlyStopping("val_loss")],
)
trainer.fit(AutoEncoder(args.width), train_loader, val_loader)
trainer.validate(ckpt_path=None, model=trainer.model, dataloaders=val_loader)
