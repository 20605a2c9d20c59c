"""Maverick's context extended from 8,192 to 262,144 tokens in two stages, from a pretrained Maverick.

    llamax train recipes/maverick_pretrain.py:tiny --workdir runs/maverick          # what :tiny goes on from
    llamax train recipes/maverick_context.py:tiny --workdir runs/maverick_context   # a laptop, minutes
    llamax show  recipes/maverick_context.py                   # every setting, every stage
    llamax plan  recipes/maverick_context.py:v5p_512 --topology v5p:8x8x8 --stage to_256k
    llamax train recipes/maverick_context.py --workdir DIR --config.init.path=PRETRAINED   # or a layout, as :v5p_512

PRETRAINED is any model: a run's workdir, a converted model, a folder in Hugging Face's format; its parameters are
taken and the optimizer is fresh. Tokens a step stay what they are, 16.8M, while rows grow. A third of the tokens are
short documents, so that what was learnt on short rows is held; a seventh asks for what stands far back, with exact
answers. No position method is set: local layers never see a distance beyond their chunk of 8,192 tokens, whatever the
row (docs/how-to/positions.md).

The data of the full size is yours: a manifest for each source (docs/how-to/add-a-dataset.md), and data/llama4.model as
for the pretraining. Tasks are here, in data/tasks, and take their text from data/books.toml. The evaluations ask at
both lengths, in data/books_heldout.toml, whose documents are to have 262,144 tokens.

Meta published the lengths, 256k in training, and neither stages nor tokens nor mixture: those here are ours. What the
layout needs is in docs/plans.md.

Expected of :tiny: as of Scout's, from rows of 512 tokens to 2,048.
"""

from llamax import config as lx
from llamax import laptop, variants

K = 1024

LONGER = dict(  # tasks of to_256k
    tasks=dict(path="data/tasks/to_256k.toml"), pictures=dict(path="data/tasks/pictures_256k.toml")
)
LAYOUTS = dict(  # rows of 16k tokens a device, two of them
    v5p_512=dict(
        stages=dict(
            to_64k=dict(mesh=dict(data=1, fsdp=16, expert=8, context=4)),
            to_256k=dict(mesh=dict(data=1, fsdp=4, expert=8, context=16)),
        )
    )
)


def get_config(size: str = "full"):
    run = lx.recipe(name="maverick_context", model=variants.maverick(), seed=17)
    run.train.steps = 0  # as many as the stages take
    if size == "tiny":
        return tiny(run)

    run.init.path = "runs/maverick_pretrain"
    run.data.tokenizer = "data/llama4.model"
    run.data.seq_len = 8 * K  # of the pretraining
    run.data.batch_tokens = 16_384 * K
    run.data.sources = dict(  # weights count tokens, not documents
        web=dict(path="data/web.toml", weight=0.18),
        code=dict(path="data/code.toml", weight=0.09),
        captions=dict(path="data/captions.toml", weight=0.05),
        books=dict(path="data/books.toml", weight=0.25),
        repositories=dict(path="data/repositories.toml", weight=0.29),  # `llamax data join` makes such of files
        tasks=dict(path="data/tasks/to_64k.toml", weight=0.12),
        pictures=dict(path="data/tasks/pictures_64k.toml", weight=0.02),
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
        to_64k=dict(tokens=30_000_000_000, data=dict(seq_len=64 * K, lanes=64), mesh=dict(fsdp=32, context=8)),
        to_256k=dict(
            tokens=30_000_000_000,
            data=dict(seq_len=256 * K, lanes=64, sources=LONGER),
            optim=dict(peak_lr=1e-5),
            mesh=dict(fsdp=8, context=32),
        ),
    )
    run.evals = dict(
        web=dict(kind="perplexity", path="data/web_heldout.toml", every_steps=200),
        far=dict(kind="needle", path="data/books_heldout.toml", lengths=(64 * K, 256 * K), samples=4),
        position=dict(kind="position", path="data/books_heldout.toml", lengths=(256 * K,), max_docs=64),
    )
    for name in ("far", "position"):
        run.evals[name].update(every_steps=1000, cache_gb=20.0)  # 256k tokens and an answer take 17.3
    run.checkpoint.every_steps = 200
    return run


def tiny(run):
    """From the pretraining's rows of 512 tokens to 1,024 and to 2,048."""
    run = laptop.context(run, variants.maverick_tiny())
    run.init.path = "runs/maverick"
    return run
