"""Maverick's last step: DPO on corner cases, lightly, from a model that was fine-tuned (or trained by RL).

    llamax train recipes/maverick_sft.py:tiny --workdir runs/maverick_sft   # what :tiny goes on from
    llamax train recipes/maverick_dpo.py:tiny --workdir runs/maverick_dpo   # a laptop, minutes
    llamax show  recipes/maverick_dpo.py                       # every setting
    llamax train recipes/maverick_dpo.py --workdir DIR --config.init.path=FINE_TUNED   # or a layout, as :v5p_512

Each comparison is a prompt with a better and a worse answer (docs/how-to/chat-data.md, docs/how-to/curate.md). The loss
is Llama 3's: DPO with beta 0.1, and 0.2 of the chosen answers' negative log-likelihood, which keeps their probability
from falling with the rejected ones' (docs/how-to/preference-losses.md). What the reference, the model that it starts
from, gives the answers is computed once and kept on disk, so that no second model stands in memory
(docs/how-to/preferences.md). The terms that balance the experts stay.

Meta published that Llama 4 ends with a light DPO for corner cases; rates, rows and steps are ours.

Expected of :tiny: it stops hedging: held-out answers without a hedge are preferred in nearly all pairs, from few, their
log-probability does not fall, and as many answers are right as before.
"""

from llamax import config as lx
from llamax import laptop, variants

LAYOUTS = dict(v5p_512=dict(mesh=dict(fsdp=64, expert=8), train=dict(remat="block")))  # a slice of 8x8x8


def get_config(size: str = "full"):
    run = lx.recipe(name="maverick_dpo", model=variants.maverick(), seed=22)
    run.preference.losses.sigmoid = 1.0
    run.losses.next_token = 0.2
    run.reference.source = "cache"
    if size == "tiny":
        run = laptop.dpo(run, variants.scout_tiny())
        run.init.path = "runs/maverick_sft"
        return run

    run.init.path = "runs/maverick_sft"
    run.data.tokenizer = "data/llama4.model"
    run.data.seq_len = 16_384
    run.data.batch_tokens = 1024 * 16_384
    run.data.comparisons_per_row = 64
    run.data.sources = dict(
        corner_cases=dict(path="data/corner_cases.toml", weight=0.4),
        helpfulness=dict(path="data/helpfulness_pairs.toml", weight=0.4),
        pictures=dict(path="data/picture_pairs.toml", weight=0.2),
    )
    run.data.multimodal_steps = 0.2
    run.data.lanes = 64  # up to 64 hosts read a part each
    run.data.workers = 8
    run.mesh = dict(data=-1, fsdp=512)  # -1 takes the devices that are left
    run.optim.update(peak_lr=1e-6, schedule="cosine", warmup_steps=20, weight_decay=0.0)
    run.train.update(steps=300, compute_dtype="bfloat16")
    run.evals = dict(held_out=dict(kind="preference", path="data/preferences_heldout.toml", every_steps=50))
    run.checkpoint.every_steps = 100
    return run
