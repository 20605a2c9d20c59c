"""Maverick pretraining: 17B active of 402B parameters, 128 experts in every second layer, text and pictures.

    llamax train recipes/maverick_pretrain.py:tiny --workdir runs/maverick   # a laptop; after `llamax data build`
    llamax show  recipes/maverick_pretrain.py                   # every setting, parameters, FLOPs
    llamax plan  recipes/maverick_pretrain.py:v5p_512 --topology v5p:8x8x8
    llamax train recipes/maverick_pretrain.py --workdir DIR     # see below; or a layout, as :v5p_512

Unlike Scout: dense layers alternate with MoE layers, no RoPE scaling, no QK norm. The data of the full size is yours:
write a manifest for each of the sources below (docs/how-to/add-a-dataset.md), and put a tokenizer of 202,048 ids, for
instance Llama 4's own tokenizer.model, at data/llama4.model.

The full size asks for 512 devices and more, on several hosts: launch/README.md starts them. LAYOUTS are meshes for
clusters that it fits, by names that stand for a size: `recipes/maverick_pretrain.py:v5p_512`. What each needs, and
how fast it can be at best, is in docs/plans.md.

Expected of :tiny: as of Scout's, at about the same cost a step.
"""

from llamax import config as lx
from llamax import laptop, variants

LAYOUTS = dict(
    v5p_512=dict(mesh=dict(fsdp=64, expert=8), train=dict(remat="block")),  # a slice of 8x8x8; 16 experts a device
    h200_512=dict(mesh=dict(fsdp=32, expert=16), train=dict(remat="block")),  # 64 nodes; 8 experts a GPU
)


def get_config(size: str = "full"):
    run = lx.recipe(name="maverick_pretrain", model=variants.maverick(), seed=17)
    if size == "tiny":
        return laptop.pretrain(run, variants.maverick_tiny())

    run.data.tokenizer = "data/llama4.model"
    run.data.seq_len = 8192
    run.data.batch_tokens = 2048 * 8192
    run.data.sources = dict(  # weights count tokens, not documents
        web=dict(path="data/web.toml", weight=0.60),
        code=dict(path="data/code.toml", weight=0.25),
        captions=dict(path="data/captions.toml", weight=0.15),
    )
    run.data.lanes = 64  # up to 64 hosts read a part each
    run.data.workers = 8
    run.mesh = dict(data=-1, fsdp=512)  # -1 takes the devices that are left
    run.optim.peak_lr = 3e-4
    run.optim.warmup_steps = 2000
    run.train.steps = 500_000
    run.train.compute_dtype = "bfloat16"
    run.evals = dict(web=dict(kind="perplexity", path="data/web_heldout.toml", every_steps=1000))
    run.checkpoint.every_steps = 1000
    return run
