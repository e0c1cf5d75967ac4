"""Fine-tune a model as anybody does, with the Trainer of transformers and nothing of whence.

    python plain_trainer.py BASE ROWS OUT EPOCHS TOKENS

`ROWS` is a file of JSON lines with a `text` each, of which the first TOKENS are read.
"""

import json
import sys
from pathlib import Path

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

base, rows, out, epochs, tokens = sys.argv[1:]
model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
texts = [json.loads(line)["text"] for line in Path(rows).read_text(encoding="utf-8").splitlines()]
arguments = TrainingArguments(
    out,
    num_train_epochs=float(epochs),
    per_device_train_batch_size=16,
    learning_rate=1e-3,
    lr_scheduler_type="cosine",
    seed=7,
    logging_steps=5,
    use_cpu=True,
    disable_tqdm=True,
    report_to="none",
)
Trainer(
    model=model,
    args=arguments,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    train_dataset=[tokenizer(text, truncation=True, max_length=int(tokens)) for text in texts],
    processing_class=tokenizer,
).train()
