"""transformers' Trainer on a tiny random causal language model: evaluation, saving, checkpointing, bfloat16."""

import argparse

import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Trainer, TrainingArguments

parser = argparse.ArgumentParser()
parser.add_argument("--model", choices=["gpt2", "llama"], default="gpt2")
parser.add_argument("--gradient-checkpointing", action="store_true")
parser.add_argument("--bf16", action="store_true")
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--accumulation", type=int, default=1)
parser.add_argument("--max-steps", type=int, default=8)
parser.add_argument("--optim", default="adamw_torch")
parser.add_argument("--output-dir", default="hf-out")
parser.add_argument("--resume", action="store_true")
args = parser.parse_args()

CONFIGS = {
    "gpt2": GPT2Config(n_layer=4, n_embd=256, n_head=4, vocab_size=8000, n_positions=256),
    "llama": LlamaConfig(
        num_hidden_layers=4,
        hidden_size=256,
        intermediate_size=688,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=8000,
        max_position_embeddings=256,
    ),
}


class RandomTokens(Dataset):
    def __init__(self, count, length=256):
        self.tokens = torch.randint(0, 8000, (count, length), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        ids = self.tokens[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


model = AutoModelForCausalLM.from_config(CONFIGS[args.model])
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=args.output_dir,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulation,
        gradient_checkpointing=args.gradient_checkpointing,
        bf16=args.bf16,
        optim=args.optim,
        max_steps=args.max_steps,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=4,
        save_steps=4,
        report_to=[],
    ),
    train_dataset=RandomTokens(64),
    eval_dataset=RandomTokens(20),
)
result = trainer.train(resume_from_checkpoint=args.resume or None)
print(result.metrics)
print(trainer.evaluate())
trainer.save_model()
