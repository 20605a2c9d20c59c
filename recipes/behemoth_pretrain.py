"""Behemoth pretraining: 288B active of 2T parameters, 16 experts, text and pictures, rows of 8,192 tokens.

    llamax train recipes/behemoth_pretrain.py:tiny --workdir runs/behemoth   # a laptop; after `llamax data build`
    llamax show  recipes/behemoth_pretrain.py                   # every setting, parameters, FLOPs
    llamax plan  recipes/behemoth_pretrain.py:v5p_2048 --topology v5p:8x16x16
    llamax train recipes/behemoth_pretrain.py --workdir DIR     # see below; or a layout, as :v5p_2048

Behemoth was announced and never released: experts, active and total parameters are Meta's figures, every width is our
own (`llamax/variants.py`). The data of the full size is yours: write a manifest for each of the sources below
(docs/how-to/add-a-dataset.md), and put a tokenizer of 202,048 ids, for instance Llama 4's own tokenizer.model, at
data/llama4.model.

The full size asks for 2,048 devices and more. LAYOUTS are meshes for clusters that it fits, by names that stand for a
size. What each needs and how fast it can be at best is in docs/plans.md.

Expected of :tiny: as of Scout's, at the same cost a step.
"""

from llamax import config as lx
from llamax import laptop, variants

LAYOUTS = dict(
    v5p_2048=dict(mesh=dict(fsdp=128, expert=8, tensor=2), train=dict(accumulate=2, remat="block")),  # 8x16x16
    h200_2048=dict(mesh=dict(fsdp=64, expert=16, tensor=2), train=dict(accumulate=2, remat="block")),  # 256 nodes
)


def get_config(size: str = "full"):
    run = lx.recipe(name="behemoth_pretrain", model=variants.behemoth(), seed=17)
    if size == "tiny":
        return laptop.pretrain(run, variants.behemoth_tiny())

    run.data.tokenizer = "data/llama4.model"
    run.data.seq_len = 8192
    run.data.batch_tokens = 2048 * 8192
    run.data.sources = dict(  # weights count tokens, not documents
        web=dict(path="data/web.toml", weight=0.60),
        code=dict(path="data/code.toml", weight=0.25),
        captions=dict(path="data/captions.toml", weight=0.15),
    )
    run.data.lanes = 256  # up to 256 hosts read a part each
    run.data.workers = 8
    run.mesh = dict(data=-1, fsdp=128, expert=8)  # -1 takes the devices that are left
    run.optim.peak_lr = 1e-4
    run.optim.warmup_steps = 2000
    run.train.steps = 500_000
    run.train.compute_dtype = "bfloat16"
    run.evals = dict(web=dict(kind="perplexity", path="data/web_heldout.toml", every_steps=1000))
    run.checkpoint.every_steps = 1000
    return run
