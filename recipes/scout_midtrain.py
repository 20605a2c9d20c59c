"""Scout's mid-training: a pretrained Scout, at the same length, on a mixture that gets better as the rate falls.

    llamax train recipes/scout_midtrain.py:tiny --workdir runs/midtrain   # a laptop, minutes; after `make quickstart`
    llamax show  recipes/scout_midtrain.py                     # every setting
    llamax train recipes/scout_midtrain.py --workdir DIR --config.init.path=PRETRAINED     # or a layout, as :v5p_256

PRETRAINED is any model: a run's workdir, a converted model, a folder in Hugging Face's format; its parameters are taken
and the optimizer is fresh. The learning rate falls in a line to nothing, and the weights of the sources go from those
of pretraining to others (docs/how-to/mixture.md): half of the web's tokens give way to code, mathematics and captions.
Meta published that Llama 4 was mid-trained, not how: mixture, tokens and rates are ours.

The full size asks for 256 devices and more; the layout's plan is that of scout_pretrain:v5p_256 in docs/plans.md.

Expected of :tiny: bits per byte on held-out text, and the names of held-out drawings, a little better than those of the
quickstart that it starts from.
"""

from llamax import config as lx
from llamax import laptop, variants

TOKENS = 200_000_000_000
LAYOUTS = dict(v5p_256=dict(mesh=dict(fsdp=64, expert=4), train=dict(remat="block")))  # a slice of 8x8x4


def get_config(size: str = "full"):
    run = lx.recipe(name="scout_midtrain", model=variants.scout(), seed=18)
    if size == "tiny":
        return tiny(run)

    run.init.path = "runs/scout_pretrain"
    run.data.tokenizer = "data/llama4.model"
    run.data.seq_len = 8192
    run.data.batch_tokens = 1024 * 8192
    run.data.sources = dict(  # weights count tokens, not documents; `later` is where they go, and by when
        web=dict(path="data/web.toml", weight=0.60, later=((TOKENS, 0.30),)),
        code=dict(path="data/code.toml", weight=0.25, later=((TOKENS, 0.30),)),
        captions=dict(path="data/captions.toml", weight=0.15, later=((TOKENS, 0.20),)),
        mathematics=dict(path="data/mathematics.toml", weight=0.0, later=((TOKENS, 0.20),)),
    )
    run.data.lanes = 64  # up to 64 hosts read a part each
    run.data.workers = 8
    run.mesh = dict(data=-1, fsdp=256)  # -1 takes the devices that are left
    run.train.steps = TOKENS // run.data.batch_tokens
    run.train.compute_dtype = "bfloat16"
    anneal(run, peak_lr=1e-4, warmup_steps=200)
    run.evals = dict(web=dict(kind="perplexity", path="data/web_heldout.toml", every_steps=1000))
    run.checkpoint.every_steps = 1000
    return run


def tiny(run):
    run = laptop.pretrain(run, variants.scout_tiny())
    run.init.path = "runs/quickstart"
    run.train.steps = 200
    anneal(run, peak_lr=1e-3, warmup_steps=10)
    half = run.train.steps * run.data.batch_tokens // 2
    run.data.sources.docs.later = ((half, 0.28),)  # twice as much, and less code
    run.data.sources.python.later = ((half, 0.14),)
    return run


def anneal(run, peak_lr, warmup_steps):
    """The learning rate in a line to nothing, from the end of the warm-up on."""
    run.optim.update(peak_lr=peak_lr, schedule="wsd", warmup_steps=warmup_steps, end_lr_ratio=0.0)
    run.optim.decay_steps = run.train.steps - warmup_steps
