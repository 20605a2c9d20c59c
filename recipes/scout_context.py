"""Scout's context extended from 8,192 to 262,144 tokens in two stages, from a pretrained Scout.

    llamax train recipes/scout_context.py:tiny --workdir runs/context   # a laptop, minutes; after `make quickstart`
    llamax show  recipes/scout_context.py                      # every setting, every stage
    llamax plan  recipes/scout_context.py:v5p_256 --topology v5p:8x8x4 --stage to_256k
    llamax train recipes/scout_context.py --workdir DIR --config.init.path=PRETRAINED   # or a layout, as :v5p_256

PRETRAINED is any model: a run's workdir, a converted model, a folder in Hugging Face's format; its parameters are
taken and the optimizer is fresh. Tokens a step stay what they are, 8.4M, while rows grow. A third of the tokens are
short documents, so that what was learnt on short rows is held; a seventh asks for what stands far back, with exact
answers. No position method is set: local layers never see a distance beyond their chunk of 8,192 tokens, whatever the
row (docs/how-to/positions.md).

The data of the full size is yours: a manifest for each source (docs/how-to/add-a-dataset.md), and data/llama4.model as
for the pretraining. Tasks are here, in data/tasks, and take their text from data/books.toml. The evaluations ask at
both lengths, in data/books_heldout.toml, whose documents are to have 262,144 tokens.

Meta published the lengths, 256k in training, and neither stages nor tokens nor mixture: those here are ours. LAYOUTS
are meshes; `v5p_256_1024k` adds a stage of rows of 1,048,576 tokens, text alone. What the stages of v5p_256 need is in
docs/plans.md, and what longer rows do in docs/ten-million.md.

Expected of :tiny, from rows of 512 tokens to 2,048: it takes the code paths of the full size (tasks, joined files and
pictures beside what the pretraining read, another mixture in each stage), and is too small to look far back. What a
small model can do, and what it took, is what the two others are for (docs/how-to/extend-context.md), text alone, on two
cores: a model of 256 tokens a row, and its context extended to 2,048.

    llamax train recipes/scout_context.py:small_short --workdir runs/short
    llamax train recipes/scout_context.py:small --workdir runs/small
"""

from llamax import config as lx
from llamax import laptop, variants

K = 1024
SIZES = ("small", "small_short")
PAIRS = dict(key_kind="pairs", value_kind="pairs", wording="plain", n_words=64)
ASKED = dict(  # of :small
    key_value=PAIRS,  # 400 records in 2,048 tokens, and nothing else
    key_value_short=dict(records=16, **PAIRS),  # 16 of them in text
    needle=PAIRS,  # one
)

LONGER = dict(  # tasks of to_256k
    tasks=dict(path="data/tasks/to_256k.toml"), pictures=dict(path="data/tasks/pictures_256k.toml")
)
TO_1024K = dict(  # text alone
    tokens=5_000_000_000,
    data=dict(
        seq_len=1024 * K,
        lanes=8,
        multimodal_steps=0.0,
        sources=dict(
            captions=dict(weight=0.0),
            pictures=dict(weight=0.0),
            tasks=dict(path="data/tasks/to_1024k.toml", weight=0.14),
        ),
    ),
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
    if size in SMALLER:
        return SMALLER[size](run)

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
        to_64k=dict(tokens=20_000_000_000, data=dict(seq_len=64 * K, lanes=64), mesh=dict(fsdp=32, context=8)),
        to_256k=dict(
            tokens=20_000_000_000,
            data=dict(seq_len=256 * K, lanes=32, sources=LONGER),
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
    """From the quickstart's rows of 512 tokens to 1,024 and to 2,048."""
    run = laptop.context(run, variants.scout_tiny())
    run.init.path = "runs/quickstart"
    return run


def small(run):
    """From rows of 256 tokens to 2,048. Documents a little longer than a chunk come first: those that are much longer
    teach the layers that see all nothing before they look up at all."""
    run = _small(run, batch_tokens=4096)
    run.init.path = "runs/short"
    run.data.seq_len = 256
    run.data.sources = dict(docs=source("built/docs", 0.1), python=source("built/python", 0.2))  # in all stages
    run.optim.update(peak_lr=3e-3, schedule="wsd", warmup_steps=20, decay_steps=20, end_lr_ratio=0.3)
    run.stages = dict(
        at_256_far=dict(  # what the layers that see all are for: documents longer than a chunk, and none much longer
            tokens=300 * 4096,
            data=dict(sources=dict(far=source("tasks/far", 1.0), near=source("tasks/near", 0.3))),
        ),
        at_256_whole=dict(tokens=100 * 4096, model=dict(chunk_len=256), data=dict(sources=sources(256))),
        to_512=dict(tokens=100 * 4096, model=dict(chunk_len=256), data=dict(seq_len=512, sources=sources(512))),
        to_1024=dict(tokens=100 * 4096, model=dict(chunk_len=256), data=dict(seq_len=1024, sources=sources(1024))),
        to_2048=dict(
            tokens=300 * 4096,
            model=dict(chunk_len=256),
            data=dict(seq_len=2048, sources=sources(2048)),
            optim=dict(decay_steps=150, end_lr_ratio=0.05),
        ),
    )
    return run


def small_short(run):
    """The model that :small goes on from: it says lines again within its chunks of 32 tokens, and reads text."""
    run = _small(run, batch_tokens=2048)
    run.name = "scout_short"
    run.data.seq_len = 64
    run.data.sources = dict(near=source("tasks/near"))
    run.optim.update(peak_lr=3e-3, schedule="wsd", warmup_steps=40, decay_steps=50, end_lr_ratio=0.1)
    text = dict(docs=source("built/docs", 0.2), python=source("built/python", 0.2))
    run.stages = dict(
        rows_64=dict(tokens=400 * 2048),
        rows_256=dict(
            tokens=300 * 2048,
            data=dict(seq_len=256, sources=dict(near=dict(weight=0.4), **text)),
            optim=dict(decay_steps=100, end_lr_ratio=0.05),
        ),
    )
    return run


def _small(run, batch_tokens):
    """What the laptop's two runs share."""
    run = laptop.pretrain(run, variants.scout_context_tiny())
    run.train.steps = 0
    run.data.batch_tokens = batch_tokens
    run.data.multimodal_steps = 0.0
    held_out = "data/built/docs_heldout.toml"
    run.evals = dict(  # at the end. Depths are fifths: at quarters of 2,048 tokens a chunk ends
        far=dict(
            kind="needle", path=held_out, lengths=(256, 2048), depths=6, samples=10, tasks=tuple(ASKED), options=ASKED
        ),
        position=dict(kind="position", path="data/built/long_heldout.toml", lengths=(2048,)),
        short_docs=dict(kind="position", path=held_out, lengths=(256,)),
        short_python=dict(kind="position", path="data/built/python_heldout.toml", lengths=(256,)),
    )
    for one in run.evals.values():
        one.every_steps = 0
    run.checkpoint.every_steps = 100
    return run


def source(name, weight=1.0):
    return dict(path=f"data/{name}.toml", weight=weight)


def sources(length):
    """What stands beside short text. Half of the tokens ask for what stands far back, a fifth are long documents."""
    return dict(
        lookups=source(f"tasks/lookups_{length}", 0.35),
        needles=source(f"tasks/needles_{length}", 0.15),
        packages=source("built/packages", 0.2),
    )


SMALLER = dict(tiny=tiny, small=small, small_short=small_short)
