"""A reward model: a fine-tuned Scout with a second head, whose score says which of two answers is better.

    llamax train recipes/maverick_sft.py:tiny --workdir runs/maverick_sft   # what :tiny goes on from
    llamax train recipes/reward_model.py:tiny --workdir runs/reward   # a laptop, minutes
    llamax show  recipes/reward_model.py                       # every setting
    llamax train recipes/reward_model.py --workdir DIR --config.init.path=FINE_TUNED   # or a layout, as :v5p_256

It learns from comparisons, by Bradley and Terry's loss on the difference of the scores where the two answers end, with
the margins that the data states, and a term that keeps scores around 0 (docs/how-to/preference-losses.md). The head is
drawn anew, the rest is the model that it starts from.

Expected of :tiny: it tells nearly all held-out pairs apart.
"""

from llamax import config as lx
from llamax import laptop, variants

LAYOUTS = dict(v5p_256=dict(mesh=dict(fsdp=64, expert=4), train=dict(remat="block")))  # a slice of 8x8x4


def get_config(size: str = "full"):
    run = lx.recipe(name="reward_model", model=variants.scout(), seed=23)
    run.losses.update(reward=1.0, next_token=0.0)
    if size == "tiny":
        run = laptop.dpo(run, variants.scout_tiny())
        run.init.path = "runs/maverick_sft"
        run.model.reward_head = True
        del run.evals["answers"]
        run.evals.preferences.kind = "reward"
        return run

    run.model.reward_head = True
    run.init.path = "runs/scout_sft"
    run.data.tokenizer = "data/llama4.model"
    run.data.seq_len = 16_384
    run.data.batch_tokens = 1024 * 16_384
    run.data.comparisons_per_row = 64
    run.data.sources = dict(
        preferences=dict(path="data/preferences.toml", weight=0.8),
        pictures=dict(path="data/picture_pairs.toml", weight=0.2),
    )
    run.data.multimodal_steps = 0.2
    run.data.lanes = 64  # up to 64 hosts read a part each
    run.data.workers = 8
    run.mesh = dict(data=-1, fsdp=256)  # -1 takes the devices that are left
    run.optim.update(peak_lr=5e-6, schedule="cosine", warmup_steps=20, weight_decay=0.0)
    run.train.update(steps=1000, compute_dtype="bfloat16")
    run.evals = dict(held_out=dict(kind="reward", path="data/preferences_heldout.toml", every_steps=100))
    run.checkpoint.every_steps = 100
    return run
