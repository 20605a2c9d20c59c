"""Scout pretraining: 17B active of 109B parameters, 16 experts, text and pictures, rows of 8,192 tokens.

    llamax train recipes/scout_pretrain.py:tiny --workdir runs/scout   # a laptop, minutes; after `llamax data build`
    llamax show  recipes/scout_pretrain.py                   # every setting, parameters, FLOPs
    llamax plan  recipes/scout_pretrain.py:v5p_256 --topology v5p:8x8x4
    llamax train recipes/scout_pretrain.py --workdir DIR     # see below; or a layout, as :v5p_256

The data of the full size is yours: write a manifest for each of the sources below (docs/how-to/add-a-dataset.md), and
put a tokenizer of 202,048 ids, for instance Llama 4's own tokenizer.model, at data/llama4.model.

The full size asks for 256 devices and more, on several hosts: launch/README.md starts them. LAYOUTS are meshes for
clusters that it fits, by names that stand for a size: `recipes/scout_pretrain.py:v5p_256`. What each needs, and
how fast it can be at best, is in docs/plans.md.

Expected of :tiny: it learns Python and English (bits per byte well under a unigram's), and names colour and shape of
drawings that it has never seen; `make quickstart` prints the table.
"""

from llamax import config as lx
from llamax import laptop, variants

TEXT = dict(multimodal_steps=0.0, sources=dict(captions=dict(weight=0.0)))
LONG = dict(seq_len=262_144, batch_tokens=32 * 262_144, lanes=32, **TEXT)

LAYOUTS = dict(
    v5p_256=dict(mesh=dict(fsdp=64, expert=4), train=dict(remat="block")),  # a slice of 8x8x4
    h100_256=dict(mesh=dict(fsdp=32, expert=8), train=dict(accumulate=2, remat="block")),  # tokens stay in their node
    # Rows of 262,144 tokens, 16,384 a device.
    v5p_256_long=dict(mesh=dict(fsdp=4, expert=4, context=16), data=LONG, train=dict(remat="block")),
)


def get_config(size: str = "full"):
    run = lx.recipe(name="scout_pretrain", model=variants.scout(), seed=17)
    if size == "tiny":
        return laptop.pretrain(run, variants.scout_tiny())

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
