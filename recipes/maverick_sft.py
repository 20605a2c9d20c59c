"""Maverick's supervised fine-tuning: conversations, of which only what the assistant says is learnt.

    llamax train recipes/maverick_sft.py:tiny --workdir runs/maverick_sft   # a laptop, minutes; after `make quickstart`
    llamax show  recipes/maverick_sft.py                          # every setting
    llamax train recipes/maverick_sft.py --workdir DIR --config.init.path=PRETRAINED      # or a layout, as :v5p_512

PRETRAINED is any model: a run's workdir, a converted model, a folder in Hugging Face's format; its parameters are taken
and the optimizer is fresh. The data is yours: JSONL files of conversations with a manifest each
(docs/how-to/chat-data.md), of which Llama 4's own fine-tuning kept the hard half (docs/how-to/curate.md). One switch
trains adapters instead of all parameters: --config.tune.lora_rank=16 (docs/how-to/tune.md).

Meta published that the fine-tuning was light, and on the hardest data; rates, rows and steps are ours.

:tiny has the shape of the quickstart's model, a Scout, and starts from it. Expected: from next to no answer in the form
that is asked for to nearly all of them, and most of them right.
"""

from llamax import config as lx
from llamax import laptop, variants

LAYOUTS = dict(v5p_512=dict(mesh=dict(fsdp=64, expert=8), train=dict(remat="block")))  # a slice of 8x8x8


def get_config(size: str = "full"):
    run = lx.recipe(name="maverick_sft", model=variants.maverick(), seed=21)
    if size == "tiny":
        return laptop.sft(run, variants.scout_tiny())

    run.init.path = "runs/maverick_context"
    run.data.tokenizer = "data/llama4.model"
    run.data.seq_len = 16_384
    run.data.batch_tokens = 1024 * 16_384
    run.data.sources = dict(
        conversations=dict(path="data/conversations_hard.toml", weight=0.5),
        reasoning=dict(path="data/reasoning_hard.toml", weight=0.3),
        pictures=dict(path="data/picture_conversations_hard.toml", weight=0.2),
    )
    run.data.lanes = 64  # up to 64 hosts read a part each
    run.data.workers = 8
    run.mesh = dict(data=-1, fsdp=512)  # -1 takes the devices that are left
    run.optim.update(peak_lr=1e-5, schedule="cosine", warmup_steps=50, weight_decay=0.01)
    run.train.update(steps=2000, compute_dtype="bfloat16")
    run.evals = dict(held_out=dict(kind="perplexity", path="data/conversations_heldout.toml", every_steps=200))
    run.checkpoint.every_steps = 200
    return run
