"""The schema of a run: frozen dataclasses with units, and the way from a recipe to them.

A recipe calls `recipe(...)`, which returns a locked `ml_collections.ConfigDict` holding every default, and changes what
differs. `load()` reads a recipe file and applies command-line overrides; `freeze()` turns the result into the nested
frozen dataclasses below and makes every check that the configuration alone decides. Past `freeze()` no ConfigDict
exists. Nothing here imports jax, so a wrong configuration is refused before a device is touched.

Beside it: config_dict.py (dicts to dataclasses, ConfigError), config_file.py (recipe files and overrides, behind
`load`) and checks/ (the checks, behind `freeze`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from llamax.config_dict import ConfigError as ConfigError  # everyone takes it from here
from llamax.config_dict import from_dict, to_dict

PROJECT = Path(__file__).resolve().parents[1]  # the folder that holds recipes/ and data/, beside the package
SIZES = ("full", "tiny")  # the sizes that every recipe offers; its LAYOUTS are more
LAYER_KINDS = tuple(f"{a}+{f}" for a in ("rope_chunk", "rope_full", "nope_full") for f in ("dense", "moe"))
ROPE_SCALINGS = ("none", "linear", "ntk", "yarn", "llama3")  # the keys of llamax.model.rope.SCALINGS
ROPE_RAMPS = ("turns", "pairs")
ATTN_SCALES = ("temperature", "ssmax")
TEMPERATURE_WHEN = ("always", "inference")
SCHEDULES = ("cosine", "wsd")
COMPUTE_DTYPES = ("float32", "bfloat16")
REMATS = ("none", "block", "period", "attention", "offload")
RULES = ("fsdp", "zero")  # the keys of llamax.parallel.rules.RESTING
MESH_AXES = ("pipeline", "data", "fsdp", "expert", "context", "tensor")  # an axis further left varies more slowly
ROW_AXES = ("pipeline", "data", "fsdp", "expert")  # mesh axes that split a batch's rows; pipeline: outside of stages
ROUTER_SCORES = ("sigmoid", "softmax")
CHOOSE_BY = ("logits", "scores")
GATE_ON = ("input", "output")
VISION_ENCODERS = ("vit", "linear")
BIAS_UPDATES = ("sign", "proportional")
REFERENCES = ("none", "live", "cache")
REFERENCE_FREE = ("simpo", "orpo", "nll")  # losses that compare answers, and never beside a reference model
F_DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")  # the keys of llamax.losses.paired.DIVERGENCES
ON_NONFINITE = ("skip", "roll_back")
ON_SPIKE = ("warn", "skip", "roll_back")
EVAL_KINDS = (  # the keys of llamax.evals.EVALS
    *("perplexity", "drawings", "needle", "ruler", "position", "answer"),
    *("preference", "reward", "instructions"),
)
LORA_TARGETS = ("attention", "dense", "shared", "experts")  # the keys of llamax.model.lora.TARGETS
TEMPLATES = ("seen", "held_out")
TOO_LONG = ("skip", "cut_begin", "cut_end")


# ------------------------------------------------------------------------------------------------------- the schema


@dataclass(frozen=True)
class Rope:
    """Rotary positions of the text model, as they are or rescaled for longer contexts (docs/how-to/positions.md).

    A new theta is the field `theta` itself. "yarn" with attention_factor=1 is NTK-by-parts.
    """

    theta: float = 500_000.0
    scaling: str = "none"  # none | linear (position interpolation) | ntk | yarn | llama3
    factor: float = 8.0  # how many times longer; read by all but "none"
    low_freq_factor: float = 1.0  # llama3 only, in turns within original_len: pairs with fewer are divided by factor
    high_freq_factor: float = 4.0  # llama3 only: pairs with more are left as they are
    original_len: int = 8192  # tokens of the rows before; yarn and llama3
    beta_slow: float = 1.0  # yarn only: as low_freq_factor
    beta_fast: float = 32.0  # yarn only: as high_freq_factor
    ramp: str = (
        "turns"  # yarn only, between the betas: linear in turns (the paper) | pairs (its authors' code: exports)
    )
    attention_factor: float = 0.0  # yarn only: of queries and of keys; 0: the paper's, 0.1 ln(factor) + 1

    @property
    def sharpening(self) -> float:
        """What the scaling multiplies queries and keys by: logits by its square."""
        if self.scaling != "yarn":
            return 1.0
        return self.attention_factor or 0.1 * math.log(self.factor) + 1.0

    def ntk_theta(self, head_dim: int) -> float:
        """The theta that "ntk" stands for: the slowest pair turns `factor` times slower, the fastest as before."""
        return self.theta * self.factor ** (head_dim / (head_dim - 2))


@dataclass(frozen=True)
class Vision:
    """How pictures become tokens: their tiling, and what stands between pixels and the decoder.

    "vit" is Llama 4's: an encoder, pixel shuffle, an adapter and a projector. "linear" is encoder-free, as in Fuyu: the
    pixels of a token (shuffle x shuffle patches) are projected straight to the decoder's width. Both make the same
    tiles and the same tokens; "linear" reads none of the fields that say "vit only".
    """

    encoder: str = "vit"  # vit | linear
    tile_px: int = 336  # side of a square tile
    patch_px: int = 14
    max_tiles: int = 16  # tiles of a picture's canvas; a global tile comes on top when there is more than one
    dim: int = 1408  # vit only
    n_layers: int = 34  # vit only
    n_heads: int = 16  # vit only
    ffn_dim: int = 5632  # vit only
    adapter_dim: int = 4096  # vit only
    shuffle: int = 2  # pixel shuffle: shuffle x shuffle patches become one token
    rope_theta: float = 10_000.0  # vit only
    norm_eps: float = 1e-5  # vit only

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.tile_px // self.patch_px

    @property
    def tokens_per_tile(self) -> int:
        """`<|patch|>` tokens that one tile fills."""
        return (self.grid // self.shuffle) ** 2


@dataclass(frozen=True)
class Model:
    """A Llama-4-style decoder. The layer plan is data: a list of (period of layer kinds, repeats)."""

    vocab_size: int = 202_048
    dim: int = 5120
    n_heads: int = 40
    n_kv_heads: int = 8
    head_dim: int = 128
    plan: tuple = ((("rope_full+dense",), 1),)  # ((kind, kind, ...), repeats), ...; kinds: LAYER_KINDS
    dense_ffn_dim: int = 16_384
    expert_ffn_dim: int = 8192
    n_experts: int = 16
    top_k: int = 1  # experts a token
    n_shared_experts: int = 1  # run on every token; one feed-forward of n x expert_ffn_dim
    router_score: str = "sigmoid"  # sigmoid (of each logit on its own) | softmax (over all experts)
    router_renormalise: bool = False  # a token's gates, its chosen experts' scores, divided by their sum
    router_scale: float = 1.0  # factor on the gates, after that
    gate_on: str = "input"  # input | output: what of an expert its gate scales
    choose_by: str = "logits"  # logits | scores: what the router's bias is added to, and the top k are taken of
    n_groups: int = 1  # experts stand in groups of equal size, one after the other, and a token
    top_groups: int = 1  # takes its experts from its best groups only
    group_best: int = 1  # experts whose sum ranks a group: DeepSeek-V2 1, DeepSeek-V3 2
    chunk_len: int = 8192  # tokens that a rope_chunk layer can see at most
    qk_norm: bool = True  # on layers with RoPE
    attn_scale: str = "temperature"  # temperature (Llama 4's) | ssmax: what sharpens logits as a row grows
    attn_temperature: float = 0.1  # temperature only: on layers without RoPE; 0 turns it off
    attn_temperature_floor: int = 8192  # tokens
    attn_temperature_when: str = "always"  # always | inference: evaluation and sampling, but not the training step
    ssmax_len: int = 8192  # ssmax only: tokens seen where its factor, which is learnt, begins as 1
    norm_eps: float = 1e-5
    tied_embeddings: bool = False
    reward_head: bool = False  # a score beside the next token: a reward model
    init_std: float = 0.02
    rope: Rope = field(default_factory=Rope)
    vision: Vision | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        """The kind of every layer, first to last."""
        return tuple(kind for period, repeats in self.plan for _ in range(repeats) for kind in period)

    @property
    def in_training(self) -> Model:
        """The model that a training step computes: without temperature, if that is for inference only."""
        return replace(self, attn_temperature=0.0) if self.attn_temperature_when == "inference" else self


def plan_of(kinds: Sequence[str], period: int = 1) -> tuple:
    """The layer plan of a list of layer kinds, first to last: its inverse is `Model.layers`.

    One segment if the list repeats, or is of period `period` (layers) and that is all of it; otherwise the segments
    with the fewest different layers, which is what compiling takes time for.
    """
    kinds, n = tuple(kinds), len(kinds)
    for p in (*range(1, n), period):
        if n % p == 0 and kinds == kinds[:p] * (n // p):
            return ((kinds[:p], n // p),)
    # best[i]: (different layers, segments, plan) of the layers from i on.
    best: list[tuple[int, int, tuple]] = [(0, 0, ())] * (n + 1)
    for i in reversed(range(n)):
        options = []
        for p in range(1, n - i + 1):
            repeats = 1
            while True:
                layers, segments, plan = best[i + p * repeats]
                options.append((layers + p, segments + 1, ((kinds[i : i + p], repeats), *plan)))
                end = i + p * (repeats + 1)
                if end > n or kinds[i : i + p] != kinds[end - p : end]:
                    break
                repeats += 1
        best[i] = min(options, key=lambda option: option[:2])
    return best[0][2]


@dataclass(frozen=True)
class Source:
    path: str = ""  # a manifest (*.toml)
    weight: float = 1.0  # share of tokens, relative to the other sources' weights
    later: tuple = ()  # (tokens of the run, weight then), ...: linear in between, constant after the last

    def weight_at(self, tokens: float) -> float:
        """The weight after so many tokens of all sources."""
        points = ((0.0, self.weight), *self.later)
        for (a, u), (b, v) in itertools.pairwise(points):
            if tokens < b:
                return u + (v - u) * ((tokens - a) / (b - a))
        return points[-1][1]


@dataclass(frozen=True)
class Data:
    tokenizer: str = "data/tokenizer.model"  # tiktoken's file format, or a tokenizer.json
    seq_len: int = 8192  # tokens a row
    batch_tokens: int = 8192  # tokens a step, all devices, all accumulation steps
    sources: dict[str, Source] = field(default_factory=dict)
    multimodal_steps: float = 0.5  # share of steps whose batch carries pictures
    tiles_per_row: int = 32  # picture tiles that one row can hold
    video_frames: int = 8  # frames of a clip that the model sees, at most; each is a picture of its own
    window_docs: int = 256  # documents packed together; a window depends on its number alone
    lanes: int = 1  # parts of a batch's rows, each with windows of its own: a process reads only the lanes it needs
    too_long: str = "skip"  # skip | cut_begin | cut_end: what becomes of a conversation that is longer than a row
    comparisons_per_row: int = 0  # comparisons of answers that one row can hold; 0: the run has none
    ref_logp: str = ""  # reference.source=cache: the folder of what it gave the answers; "": WORKDIR/reference
    mismatched: bool = False  # whether labelled answers have another prompt's answer beside them (KTO's baseline)
    compare_marks: bool = True  # whether an answer's marks (its end of turn, ...) count where answers are compared
    align_tokens: int = 0  # documents are aligned to stripes of so many tokens; 0: to what mesh.context needs
    workers: int = 0  # loader processes of each process; 0 reads in it
    prefetch_batches: int = 4

    @property
    def rows(self) -> int:
        """Rows a step."""
        return self.batch_tokens // self.seq_len


@dataclass(frozen=True)
class Mesh:
    """Devices along each mesh axis; -1, allowed once, takes the devices that are left."""

    pipeline: int = 1  # stages of layers, one after the other
    data: int = -1  # copies of the parameters, over all slices
    fsdp: int = 1  # shards of parameters and optimizer, gathered layer by layer
    expert: int = 1  # parts of the experts; tokens travel to them
    context: int = 1  # parts of a row
    tensor: int = 1  # parts of heads, hidden widths and vocabulary, each on a device of its own
    slices: int = 1  # groups of devices with slow links between them: the outer factor of data; no axis of its own
    rules: str = "fsdp"  # fsdp | zero: whether master weights and optimizer are copied along data, or split there too

    @property
    def axes(self) -> dict[str, int]:
        """Devices along each axis, by name, the slowest first."""
        return {axis: n for axis, n in to_dict(self).items() if axis in MESH_AXES}


@dataclass(frozen=True)
class Optim:
    """AdamW and its schedule."""

    peak_lr: float = 3e-4
    schedule: str = "cosine"  # cosine | wsd (warm-up, stable, decay)
    begins: int = 0  # steps taken before the schedule begins; of a run's stages each has its own
    warmup_steps: int = 2000
    decay_steps: int = 0  # wsd only: steps of the final linear decay
    end_lr_ratio: float = 0.1  # of peak_lr, reached after the last step
    vision_lr_ratio: float = 1.0  # learning rate of vision encoder, adapter and projector, as a share of the others'
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices only
    clip_norm: float = 1.0  # global gradient norm
    moments_dtype: str = "float32"  # float32 | bfloat16: of AdamW's two moments at rest; updates are float32


@dataclass(frozen=True)
class Losses:
    """Weights of the training loss's terms."""

    next_token: float = 1.0
    router_balance: float = 1e-2  # Switch balance, a statistic of the micro-batch
    router_balance_seq: float = 0.0  # the same of every document; exact under any split of the batch
    router_z: float = 1e-3
    preference: float = 1.0  # of what `preference` weighs, if that is anything
    reward: float = 0.0  # of comparisons: Bradley-Terry on the scores of model.reward_head


@dataclass(frozen=True)
class Reference:
    """The model that answers are measured against, which does not change."""

    source: str = "none"  # none | live (its weights are held beside) | cache (what it gave is on disk: data.ref_logp)
    path: str = ""  # a model, as of init; "": the one that init names
    step: int = 0  # of a run; 0: its newest sound checkpoint


@dataclass(frozen=True)
class PreferenceLosses:
    """Weights of the losses that compare answers, by their usual names (docs/how-to/preference-losses.md)."""

    sigmoid: float = 0.0  # DPO
    hinge: float = 0.0
    ipo: float = 0.0
    robust: float = 0.0
    exo_pair: float = 0.0
    nca_pair: float = 0.0
    bco_pair: float = 0.0
    sppo_hard: float = 0.0
    aot: float = 0.0  # sorts the micro-batch
    aot_unpaired: float = 0.0  # sorts the micro-batch
    apo_zero: float = 0.0
    apo_down: float = 0.0
    discopop: float = 0.0
    simpo: float = 0.0
    orpo: float = 0.0
    kto: float = 0.0  # a statistic of the micro-batch
    apo_zero_unpaired: float = 0.0
    nll: float = 0.0  # of chosen answers, each its mean over its tokens; over all tokens: losses.next_token


@dataclass(frozen=True)
class Preference:
    """How answers are compared: what is weighed, and its knobs. A knob that none of the losses reads is an error."""

    losses: PreferenceLosses = field(default_factory=PreferenceLosses)
    beta: float = 0.1  # implicit reward of a nat; ORPO: of its odds ratio
    reference: bool = True  # answers count beside what a reference model gives them; SimPO and ORPO never need one
    per_token: bool = False  # log-ratios are divided by their answers' lengths; beta is then 2 and more
    f_divergence: str = "reverse_kl"  # reverse_kl (DPO) | forward_kl | js | alpha: from the reference
    f_alpha: float = 0.5  # alpha only, in 0..1: towards reverse_kl..forward_kl
    label_smoothing: float = 0.0  # share of comparisons taken to be labelled the wrong way round
    ld_alpha: float = 1.0  # weight of an answer's tokens beyond the shorter answer's length (LD-DPO)
    wpo: bool = False  # comparisons count by how likely the policy is to give their answers (WPO)
    bco_shift: bool = False  # bco_pair only: rewards count from their mean, a statistic of the micro-batch
    simpo_gamma: float = 0.5  # simpo only: rewards should differ by so much
    discopop_temperature: float = 0.05  # discopop only
    desirable_weight: float = 1.0  # kto and apo_zero_unpaired only: of chosen answers
    undesirable_weight: float = 1.0  # kto and apo_zero_unpaired only: of rejected answers
    centring: float = 0.01  # reward models only: what keeps their scores around 0

    @property
    def weights(self) -> dict[str, float]:
        """The losses that are on, and their weights."""
        return {name: weight for name, weight in to_dict(self.losses).items() if weight}

    @property
    def needs_reference(self) -> bool:
        """Whether a reference's log-probabilities are read."""
        return self.reference and any(name not in REFERENCE_FREE for name in self.weights)


@dataclass(frozen=True)
class Advantage:
    """What a sample's reward is measured against (post/advantages.py)."""

    baseline: str = "prompt"  # prompt (GRPO) | leave_one_out (RLOO) | batch (REINFORCE++) | best (pass@k)
    scale: str = "none"  # none (Dr. GRPO) | prompt (GRPO) | batch: what differences are divided by the deviation of
    eps: float = 1e-6  # added to that deviation; TRL has 1e-4
    each: bool = False  # of several kinds of reward each has its own advantage


@dataclass(frozen=True)
class Policy:
    """How a policy learns from its samples (losses/policy.py)."""

    loss: str = "clip"  # clip (PPO's, and so GRPO's, DAPO's, GSPO's) | cispo | sapo | vespo
    ratio: str = "token"  # clip only: token | sequence (GSPO) | sequence_token (GSPO-token) | product (RLOO)
    clip_low: float = 0.2  # clip only: ratios count from 1 - clip_low to 1 + clip_high
    clip_high: float = 0.28
    ratio_max: float = 0.0  # cispo: a ratio's most; clip: that of the ratio that is not clipped (two-sided); 0: none
    dual_clip: float = 0.0  # clip only: of a bad sample, a token's most, in times its advantage; 0: none
    sapo_tau_positive: float = 1.0
    sapo_tau_negative: float = 1.05
    vespo_k_positive: float = 2.0
    vespo_k_negative: float = 3.0
    vespo_lambda_positive: float = 3.0
    vespo_lambda_negative: float = 2.0
    average: str = "token"  # token (DAPO) | sample (GRPO) | sum (LUSPO) | constant (Dr. GRPO) | prompt | batch
    constant_tokens: int = 0  # constant only: tokens that a sample is divided by, its most
    count_masked: bool = True  # sample, sum, constant: samples without a trained token count too
    kl: str = "none"  # none | k2 | k3 | k3_ratio: to the reference
    kl_weight: float = 1e-3
    importance: str = "none"  # none | truncate | mask | sequence_{truncate,mask,drop}: weights for what the sampler did
    importance_low: float = 0.5  # mask, sequence_mask and sequence_drop: less is dropped
    importance_high: float = 2.0  # and more; truncate, sequence_truncate: the most
    stale_above: float = 0.0  # nats a token: bad samples that the policy has left so far behind are dropped; 0: none
    top_entropy: float = 1.0  # the share of tokens that is trained, those with the largest entropy
    entropy: float = 0.0  # weight of the entropy, which is then held up


@dataclass(frozen=True)
class RouterBias:
    """Balance without a loss: after every step, idle experts' biases rise and busy ones' fall (DeepSeek-V3)."""

    rate: float = 0.0  # a step, of what model.choose_by names: logits, or scores in 0..1; 0 turns it off
    update: str = "sign"  # sign | proportional (to the load's distance from an even share)


@dataclass(frozen=True)
class Health:
    """What a run does about bad steps and stalls. A step whose loss or gradient is not finite is never applied."""

    on_nonfinite: str = "skip"  # skip | roll_back (to the last good checkpoint, past the batches seen since)
    on_spike: str = "warn"  # warn | skip | roll_back
    spike_sigmas: float = 8.0  # a spike is a loss so many robust standard deviations above the last steps' median
    spike_window: int = 64  # steps, those with pictures and those without each
    max_bad_steps: int = 10  # this many steps in a row without an update stop the run
    max_roll_backs: int = 3  # without a new checkpoint; one more stops the run
    norms_every_steps: int = 100  # gradient and activation norms of every block
    stall_s: float = 600.0  # seconds in one phase after which the watchdog writes down every thread's stack


@dataclass(frozen=True)
class Train:
    steps: int = 100_000  # 0: as many as the stages take
    accumulate: int = 1  # micro-batches a step
    compute_dtype: str = "float32"  # float32 | bfloat16; master weights are float32
    remat: str = "period"  # none | block | period | attention | offload: what backward recomputes (model/remat.py)
    pipeline_microbatches: int = 0  # of each of these, a multiple of mesh.pipeline; 0: as many as that
    expert_buffer: float = 2.0  # tokens that mesh.expert exchanges at once, of an even share; what is over goes after
    expert_capacity: float = 0.0  # of an even share of a row: the tokens that an expert takes; the rest drop; 0: none
    log_every_steps: int = 10


@dataclass(frozen=True)
class Eval:
    """One evaluation. What asks a model about long contexts (needle, ruler, answer) draws samples of tasks
    (llamax/data/tasks); `position` reads documents."""

    kind: str = "perplexity"  # a key of llamax.evals.EVALS
    path: str = ""  # a manifest of held-out data; of needle, ruler, answer: the text around what is asked for
    every_steps: int = 1000  # 0: only at the end
    max_docs: int = 512  # at most, spread evenly over the manifest (perplexity, drawings, position)
    lengths: tuple = ()  # tokens of a sample with its answer (needle, ruler, answer), or of a document (position: one)
    depths: int = 5  # needle: places of what is asked for, evenly from the beginning of the context to its end
    samples: int = 8  # of every task at every length (and depth)
    tasks: tuple = ()  # keys of llamax.data.tasks.TASKS; (): the kind's own
    options: dict = field(default_factory=dict)  # of tasks: {"key_value": {"n_words": 64}}, as in a manifest
    templates: str = "seen"  # seen | held_out: whether questions are worded as in training
    qa: str = ""  # ruler: a JSONL file of questions with contexts and answers, for RULER's two tasks of that sort
    threshold: float = 0.856  # ruler: a length counts as effective above it; in the paper, Llama 2 7B at 4k tokens
    buckets: int = 8  # position: equal parts of a document
    seed: int = 0  # of the samples
    max_tokens: int = 64  # instructions: of an answer
    patience: int = 3  # a figure that should not fall and does, at so many evaluations in a row, is warned of
    cache_gb: float = 4.0  # what keys and values of the rows worked on together may take, in 10^9 bytes


@dataclass(frozen=True)
class Checkpoint:
    every_steps: int = 1000
    keep: int = 3  # newest checkpoints kept
    keep_every_steps: int = 0  # checkpoints of these steps (its multiples) are kept for good; 0: none


@dataclass(frozen=True)
class Init:
    """What the weights are before the first step: drawn at random, or another model's, with a fresh optimizer."""

    path: str = ""  # a run's workdir, a converted model, or a folder in Hugging Face's format; "": drawn at random
    step: int = 0  # of a run; 0: its newest sound checkpoint
    differs: tuple = ()  # fields of model in which it may differ from this run's: ("rope.theta",), ("rope.*",)


@dataclass(frozen=True)
class Tune:
    """Which parameters are trained: all, but for those that rules freeze (model/tuned.py); or adapters beside them."""

    freeze: tuple = ()  # patterns over paths, frozen; "!PATTERN": trained after all; of several that match, the last
    lora_rank: int = 0  # of the adapters that are trained instead of all else (model/lora.py); 0: there are none
    lora_alpha: float = 32.0  # adapters count alpha / rank times
    lora_targets: tuple = ()  # what has adapters: attention, dense, shared, experts; (): what of these the model has


@dataclass(frozen=True)
class Stage:
    """A part of a run with settings of its own. Stages come one after the other, in the order of their names (a number
    in a name counts as a number); each goes on with the weights and the optimizer of the one before.

    `model`, `data`, `mesh`, `optim` and `train` are sections as the run's, of which they hold what differs. What may
    differ: stages.MAY_DIFFER.
    """

    tokens: int = 0  # that it trains on, rounded up to whole steps
    model: dict = field(default_factory=dict)
    data: dict = field(default_factory=dict)
    mesh: dict = field(default_factory=dict)
    optim: dict = field(default_factory=dict)
    train: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    name: str = ""
    seed: int = 0
    init: Init = field(default_factory=Init)
    tune: Tune = field(default_factory=Tune)
    stages: dict[str, Stage] = field(default_factory=dict)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    mesh: Mesh = field(default_factory=Mesh)
    optim: Optim = field(default_factory=Optim)
    losses: Losses = field(default_factory=Losses)
    reference: Reference = field(default_factory=Reference)
    preference: Preference = field(default_factory=Preference)
    router_bias: RouterBias = field(default_factory=RouterBias)
    health: Health = field(default_factory=Health)
    train: Train = field(default_factory=Train)
    evals: dict[str, Eval] = field(default_factory=dict)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)


# ------------------------------------------------------------------------------------------- from a recipe to a run


def recipe(name: str, model: Model, **fields: Any) -> ConfigDict:
    """A locked `ConfigDict` with every default of `Run`; `fields` are other fields of `Run` (`seed=17`).

    Only `data.sources`, `evals` and `stages` accept new keys. A dict assigned to a section (`run.mesh = dict(fsdp=8)`)
    means "the defaults, but for these": what it leaves out is filled in when the recipe is loaded.
    """
    return to_config(Run(name=name, model=model, **fields))


def to_config(run: Run) -> ConfigDict:
    """A run as a locked `ConfigDict`, open to new `data.sources`, `evals` and `stages`. `from_dict(Run, cfg)` is the
    inverse."""
    cfg = ConfigDict(to_dict(run)).lock()
    for names_of_its_own in (cfg.data.sources, cfg.evals, cfg.stages):
        names_of_its_own.unlock()
    return cfg


def load(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The configuration of `"recipes/x.py"`, `"recipes/x.py:tiny"`, or the full size by one of the recipe's LAYOUTS,
    after `--config.a.b=value` overrides.

    Raises:
        ConfigError: no such file or size, or a key or type that the schema does not have.
    """
    from llamax import config_file  # reads this module, so it is imported on use

    return config_file.load(spec, overrides)


def freeze(cfg: ConfigDict) -> Run:
    """The run as frozen dataclasses, after every check that the configuration alone decides.

    Raises:
        ConfigError: a setting that cannot work; the message names the nearest one that can.
    """
    from llamax import checks  # reads this module, so it is imported on use

    run = from_dict(Run, cfg)
    checks.check(run)
    return run


def check_devices(run: Run, n_devices: int) -> Mesh:
    """The mesh with its -1 resolved for `n_devices` devices (all processes). Call it before any compile.

    Raises:
        ConfigError: the axes do not multiply to `n_devices`, or a micro-batch's rows do not split over them.
    """
    from llamax.checks import mesh  # reads this module, so it is imported on use

    return mesh.resolve(run, n_devices)


def resolve_path(path: str | Path) -> Path:
    """An absolute path as it is; a relative one from the current folder if it exists there, else from the project."""
    path = Path(path)
    if path.is_absolute() or path.exists() or not (PROJECT / path).exists():
        return path
    return PROJECT / path
