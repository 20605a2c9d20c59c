"""Scout's context extended from 8,192 to 262,144 tokens in two stages, from a pretrained Scout.

    llamax train recipes/scout_context.py:tiny --workdir runs/context --config.init.path=runs/short   # a laptop
    llamax show  recipes/scout_context.py                       # every setting, every stage
    llamax plan  recipes/scout_context.py:v5p_256 --topology v5p:8x8x4 --stage to_256k
    llamax train recipes/scout_context.py --workdir DIR --config.init.path=PRETRAINED   # or a layout, as :v5p_256

PRETRAINED is any model: a run's workdir, a converted model, a folder in Hugging Face's format; its parameters are
taken and the optimizer is fresh. Tokens a step stay what they are, 8.4M, while rows grow. A third of the tokens are
short documents, so that what was learnt on short rows is held; a seventh asks for what stands far back, with exact
answers. No position method is set: local layers never see a distance beyond their chunk of 8,192 tokens, whatever the
row (docs/how-to/positions.md).

Meta published the lengths, 256k in training, and neither stages nor tokens nor mixture: those here are ours. LAYOUTS
are meshes; `v5p_256_1024k` adds a stage of rows of 1,048,576 tokens. What each needs is in docs/plans.md.

Expected of :tiny: see docs/how-to/extend-context.md.
"""

from llamax import config as lx
from llamax import variants

K = 1024

TO_1024K = dict(
    tokens=5_000_000_000,
    data=dict(seq_len=1024 * K, lanes=8, multimodal_steps=0.0),
    optim=dict(peak_lr=1e-5),
    mesh=dict(data=1, fsdp=2, expert=4, context=32),
)
LAYOUTS = dict(  # rows of 16k to 32k tokens a device
    v5p_256=dict(
        stages=dict(
            to_64k=dict(mesh=dict(data=1, fsdp=16, expert=4, context=4)),
            to_256k=dict(mesh=dict(data=1, fsdp=4, expert=4, context=16)),
        )
    ),
    v5p_256_1024k=dict(
        stages=dict(
            to_64k=dict(mesh=dict(data=1, fsdp=16, expert=4, context=4)),
            to_256k=dict(mesh=dict(data=1, fsdp=4, expert=4, context=16)),
            to_1024k=TO_1024K,
        )
    ),
)


def get_config(size: str = "full"):
    run = lx.recipe(name="scout_context", model=variants.scout(), seed=17)
    run.train.steps = 0  # as many as the stages take
    if size == "tiny":
        return tiny(run)

    run.init.path = "runs/scout_pretrain"
    run.data.tokenizer = "data/llama4.model"
    run.data.seq_len = 8 * K  # of the pretraining
    run.data.batch_tokens = 8192 * K
    run.data.sources = dict(  # weights count tokens, not documents
        web=dict(path="data/web.toml", weight=0.18),
        code=dict(path="data/code.toml", weight=0.09),
        captions=dict(path="data/captions.toml", weight=0.05),
        books=dict(path="data/books.toml", weight=0.25),
        repositories=dict(path="data/repositories.toml", weight=0.29),  # `llamax data join` makes such of files
        tasks=dict(path="data/tasks_64k.toml", weight=0.14),
    )
    run.data.multimodal_steps = 0.1
    run.data.workers = 8
    run.mesh = dict(data=-1, fsdp=256)  # -1 takes the devices that are left
    run.optim.peak_lr = 2e-5
    run.optim.warmup_steps = 100
    run.optim.end_lr_ratio = 0.1
    run.train.compute_dtype = "bfloat16"
    run.train.remat = "block"
    run.stages = dict(
        to_64k=dict(tokens=20_000_000_000, data=dict(seq_len=64 * K, lanes=64), mesh=dict(fsdp=32, context=8)),
        to_256k=dict(
            tokens=20_000_000_000,
            data=dict(seq_len=256 * K, lanes=32, sources=dict(tasks=dict(path="data/tasks_256k.toml"))),
            optim=dict(peak_lr=1e-5),
            mesh=dict(fsdp=8, context=32),
        ),
    )
    run.evals = dict(web=dict(kind="perplexity", path="data/web_heldout.toml", every_steps=200))
    run.checkpoint.every_steps = 200
    return run


def tiny(run):
    """From rows of 256 tokens to 1,024 and to 2,048."""
    run = lx.tiny(run, variants.scout_tiny())
    run.train.steps = 0
    run.data.seq_len = 256
    run.optim.update(peak_lr=5e-4, schedule="cosine", warmup_steps=10, end_lr_ratio=0.1)
    run.stages = dict(
        to_1024=dict(tokens=100 * 4096, data=dict(seq_len=1024)),
        to_2048=dict(tokens=200 * 4096, data=dict(seq_len=2048)),
    )
    return run
