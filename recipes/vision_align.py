"""Pictures for a language model: encoder, adapter and projector learn beside a frozen Scout.

    llamax train recipes/vision_align.py:tiny --workdir runs/align   # a laptop, minutes; after `make quickstart`
    llamax show  recipes/vision_align.py                       # every setting
    llamax train recipes/vision_align.py --workdir DIR --config.init.path=PRETRAINED   # or a layout, as :v5p_256

Llama 4's encoder was adapted in conjunction with a frozen Llama, so that its features suit the decoder; here on
captions, of which only the text is learnt. Frozen parameters have no gradient and no moments, and are the same bits at
the end (docs/how-to/tune.md). Rates, rows and steps are ours.

Expected of :tiny: the loss of held-out captions falls, and that of text stays what it was, exactly.
"""

from llamax import config as lx
from llamax import laptop, variants

LAYOUTS = dict(v5p_256=dict(mesh=dict(fsdp=64, expert=4), train=dict(remat="block")))  # a slice of 8x8x4


def get_config(size: str = "full"):
    run = lx.recipe(name="vision_align", model=variants.scout(), seed=24)
    run.tune.freeze = ("*", "!vision/*", "!projector")
    if size == "tiny":
        return laptop.align(run, variants.scout_tiny())

    run.init.path = "runs/scout_pretrain"
    run.data.tokenizer = "data/llama4.model"
    run.data.seq_len = 8192
    run.data.batch_tokens = 1024 * 8192
    run.data.sources = dict(captions=dict(path="data/captions.toml", weight=1.0))
    run.data.multimodal_steps = 1.0
    run.data.lanes = 64  # up to 64 hosts read a part each
    run.data.workers = 8
    run.mesh = dict(data=-1, fsdp=256)  # -1 takes the devices that are left
    run.optim.update(peak_lr=1e-4, schedule="cosine", warmup_steps=200, weight_decay=0.01)
    run.train.update(steps=10_000, compute_dtype="bfloat16")
    run.evals = dict(captions=dict(kind="perplexity", path="data/captions_heldout.toml", every_steps=500))
    run.checkpoint.every_steps = 500
    return run
