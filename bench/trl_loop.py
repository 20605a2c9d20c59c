"""TRL's side of bench/beside_trl.py: its trainers, held at the end of every round."""

from __future__ import annotations

import json
import os
import queue
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from conversations import BETA, RATE, STEPS, TOKENIZER, examples_in, our_batches, our_data


def their_model(folder: Path):
    """A Llama drawn at random, and its tokenizer; the first process writes both."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from llamax.data import chat
    from llamax.data.tokenizer import Tokenizer

    tokenizer = Tokenizer(TOKENIZER)
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos,
        eos_token_id=tokenizer.eot,
        pad_token_id=tokenizer.pad,
    )
    model = LlamaForCausalLM(settings).float()
    if not (folder / "config.json").exists():
        model.save_pretrained(folder)
        tokenizer.write_json(folder, eos="eot", chat_template=marked(chat.template()))
    return model, AutoTokenizer.from_pretrained(folder)


def marked(template: str) -> str:
    """The template with transformers' marks round what the assistant says, for TRL's `assistant_only_loss`."""
    plain, end = "{{- header(message['role']) + said(message) -}}\n    {%- endif -%}", "{{- '<|eot|>' -}}"
    assert plain in template and template.count(end) == 1
    said = (
        "{{- header(message['role']) -}}{%- if message['role'] == 'assistant' -%}{%- generation -%}"
        "{{- said(message) + '<|eot|>' -}}{%- endgeneration -%}{%- else -%}{{- said(message) -}}{%- endif -%}"
        "\n    {%- endif -%}"
    )
    return template.replace(plain, said).replace(
        end, "{%- if message['role'] != 'assistant' -%}" + end + "{%- endif -%}"
    )


def trl_side(task: str, folder: Path, padding_free: bool = False) -> Callable:
    """train(): the losses of a round."""
    import trl
    from datasets import Dataset
    from torch.utils.data import DataLoader
    from transformers import TrainerCallback

    batches = our_batches(our_data(task, folder))
    model, tokenizer = their_model(folder / "weights")
    asked, done, losses = queue.Queue(), queue.Queue(), []

    class InTurn(TrainerCallback):
        """Holds the loop where a round ends, until the next one is asked for."""

        def on_step_begin(self, *_, **__):
            if len(losses) % STEPS == 0:
                done.put(losses[-STEPS:])
                asked.get()

    class Trainer({"sft": trl.SFTTrainer, "dpo": trl.DPOTrainer}[task]):
        def get_train_dataloader(self):
            data, numbers = self._remove_unused_columns(self.train_dataset), [examples_in(batch) for batch in batches]
            return self.accelerator.prepare(DataLoader(data, batch_sampler=numbers, collate_fn=self.data_collator))

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            losses.append(loss.item())
            return loss

    records = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    trainer = Trainer(
        model,
        args=their_settings(task, folder, padding_free),
        train_dataset=Dataset.from_list(records),
        processing_class=tokenizer,
        callbacks=[InTurn()],
    )
    for batch in batches:
        same_data(task, trainer.train_dataset, batch)
    threading.Thread(target=until_the_end, args=(trainer,), daemon=True).start()
    done.get()

    def train() -> list[float]:
        asked.put(None)
        return done.get()

    return train


def until_the_end(trainer: Any) -> None:
    """Trains; if that ends, so does the process, and whoever waits for a round gets to know."""
    try:
        trainer.train()
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def their_settings(task: str, folder: Path, padding_free: bool):
    import trl

    settings = dict(
        output_dir=str(folder / "out"),
        max_steps=10**6,
        learning_rate=RATE[task],
        lr_scheduler_type="constant",
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=1e-8,
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        max_length=None,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    if task == "sft":
        return trl.SFTConfig(**settings, assistant_only_loss=True, padding_free=padding_free)
    return trl.DPOConfig(**settings, beta=BETA, loss_type="sigmoid", precompute_ref_log_probs=True)


def same_data(task: str, theirs: Any, batch: Any) -> None:
    """What TRL made of every example in a batch has the tokens that stand in llamax's rows, and learns the same."""
    learnt_BT = batch.loss_weights > 0 if task == "sft" else batch.sides != 0
    for number in examples_in(batch):
        mine_BT = (batch.source_ids == number) & (batch.segment_ids > 0)
        (b,) = np.flatnonzero(mine_BT.any(axis=1))
        ours = set()
        for segment in np.unique(batch.segment_ids[b, mine_BT[b]]):
            where = batch.segment_ids[b] == segment
            ids = (*batch.tokens[b, where].tolist(), int(batch.targets[b, where][-1]))
            ours.add((ids, tuple(learnt_BT[b, where].tolist())))
        their = theirs[number]
        if task == "sft":
            wanted = {(tuple(their["input_ids"]), tuple(label != -100 for label in their["labels"][1:]))}
        else:
            prompt, answers = their["prompt_ids"], (their["chosen_ids"], their["rejected_ids"])
            wanted = {((*prompt, *ids), (False,) * (len(prompt) - 1) + (True,) * len(ids)) for ids in answers}
        assert ours == wanted, f"example {number}: {ours} in llamax, {wanted} in TRL"
