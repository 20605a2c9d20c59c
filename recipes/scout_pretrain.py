"""Scout pretraining: 17B active of 109B parameters, 16 experts, text and pictures, rows of 8,192 tokens.

    llamax train recipes/scout_pretrain.py:tiny --workdir runs/scout   # a laptop, minutes; after `llamax data build`
    llamax show  recipes/scout_pretrain.py                             # every setting, parameters, FLOPs
    llamax train recipes/scout_pretrain.py --workdir DIR               # see below

The data of the full size is yours: write a manifest for each of the sources below (docs/how-to/add-a-dataset.md), and
put a tokenizer of 202,048 ids, for instance Llama 4's own tokenizer.model, at data/llama4.model.

The full size asks for 256 devices and more, on several hosts: launch/README.md starts them, and `llamax plan` tells
beforehand what they will need (docs/how-to/plan.md).

Expected of :tiny: it learns Python and English (bits per byte well under a unigram's), and names colour and shape of
drawings that it has never seen; `make quickstart` prints the table.
"""

from llamax import config as lx
from llamax import variants


def get_config(size: str = "full"):
    run = lx.recipe(name="scout_pretrain", model=variants.scout(), seed=17)
    if size == "tiny":
        return lx.tiny(run, variants.scout_tiny())

    run.data.tokenizer = "data/llama4.model"
    run.data.seq_len = 8192
    run.data.batch_tokens = 1024 * 8192
    run.data.sources = dict(  # weights count tokens, not documents
        web=dict(path="data/web.toml", weight=0.60),
        code=dict(path="data/code.toml", weight=0.25),
        captions=dict(path="data/captions.toml", weight=0.15),
    )
    run.data.lanes = 64  # up to 64 hosts read a part each
    run.data.workers = 8
    run.mesh = dict(data=-1, fsdp=256)  # -1 takes the devices that are left
    run.optim.peak_lr = 3e-4
    run.optim.warmup_steps = 2000
    run.train.steps = 500_000
    run.train.compute_dtype = "bfloat16"
    run.evals = dict(web=dict(kind="perplexity", path="data/web_heldout.toml", every_steps=1000))
    run.checkpoint.every_steps = 1000
    return run
