"""Training speed of a tiny Llama 4 in llamax and in Hugging Face transformers: same model, same batch, in turn.

    python bench/l4_tiny.py [--rounds 5] [--steps 15]

L4-tiny: width 256, 4 layers (dense + RoPE, MoE + RoPE, dense + RoPE, MoE + NoPE), 8 query and 2 kv heads of 32,
feed-forwards of 512, 8 experts top-1 and a shared one, QK norm on RoPE layers, chunks of 128, vocabulary 2,048 untied,
8 rows of 256 tokens, float32, AdamW behind a clip at norm 1, no auxiliary loss, no rematerialisation on either side.

llamax's program is the one that `llamax train` runs: `config.Model`, the seam that `make_seam` picks, `make_step`,
one jit with donation. The other is `Llama4ForCausalLM` with `torch.optim.AdamW(fused=True)`. Each lives in a process
of its own and sleeps while the other works. Both start from the same weights; before anything is timed their logits and
loss on the batch are compared, and afterwards their training losses.

Seconds a step are medians over all rounds from the fifth step of the process on. The share of the matmul rate is model
FLOP/s (llamax/model/count.py: 6 x active matmul weights + causal attention within chunks) over the faster of jax's and
torch's 2048^3 float32 matmul, measured between the rounds. Needs torch and transformers >= 5; says so and stops where
they are missing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import in_turn
import numpy as np

B, T, RATE = 8, 256, 1e-3
PERIOD = ("rope_chunk+dense", "rope_chunk+moe", "rope_chunk+dense", "nope_full+moe")
WARM = 4  # steps of a process that do not count


def data() -> tuple[np.ndarray, np.ndarray]:
    """tokens and targets, int32 [B, T]: one document a row."""
    row = np.random.default_rng(0).integers(0, 2048, (B, T + 1), dtype=np.int32)
    return row[:, :-1], row[:, 1:]


# ------------------------------------------------------------------------------------------------- the two frameworks
#
# Each returns (logits(), step(), matmul()): float32 logits [B, T, V] of the batch, the loss of a step taken, and a
# multiplication of two 2048 x 2048 matrices.


def their_settings():
    """transformers' configuration of L4-tiny."""
    from transformers import Llama4TextConfig

    return Llama4TextConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=512,
        intermediate_size_mlp=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=8,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        no_rope_layers=[1, 1, 1, 0],
        attention_chunk_size=128,
        use_qk_norm=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        use_cache=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )


def transformers_side(weights: Path) -> tuple[Callable, Callable, Callable]:
    """Also writes its initial weights to `weights`."""
    import torch
    from transformers import Llama4ForCausalLM

    torch.manual_seed(0)
    settings = their_settings()
    model = Llama4ForCausalLM(settings).float().train()
    model.save_pretrained(weights)
    matrices = [p for name, p in model.named_parameters() if p.ndim > 1 and "embed_tokens" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or "embed_tokens" in name]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), eps=1e-8, fused=True)
    tokens, targets = (torch.from_numpy(x.astype(np.int64)) for x in data())
    a = torch.linspace(-1, 1, 2048 * 2048).reshape(2048, 2048)

    def logits():
        with torch.no_grad():
            return model(input_ids=tokens).logits.numpy()

    def step():
        out = model(input_ids=tokens).logits
        loss = torch.nn.functional.cross_entropy(out.reshape(-1, 2048), targets.reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return loss.item()

    return logits, step, lambda: a @ a


def l4_tiny():
    """The run's configuration."""
    from llamax import config

    model = config.Model(
        vocab_size=2048,
        dim=256,
        n_heads=8,
        n_kv_heads=2,
        head_dim=32,
        plan=((PERIOD, 1),),
        dense_ffn_dim=512,
        expert_ffn_dim=512,
        n_experts=8,
        chunk_len=128,
    )
    return config.Run(
        name="l4_tiny",
        model=model,
        data=config.Data(seq_len=T, batch_tokens=B * T, sources={"random": config.Source()}),
        optim=config.Optim(peak_lr=RATE, schedule="wsd", warmup_steps=0),
        losses=config.Losses(router_balance=0.0, router_z=0.0),
        train=config.Train(steps=1_000_000, remat="none"),
    )


def llamax_side(weights: Path) -> tuple[Callable, Callable, Callable]:
    """Starts from `weights`, which the other side wrote."""
    import jax
    import jax.numpy as jnp

    import llamax
    from llamax.batch import Batch
    from llamax.model.seam import make_seam
    from llamax.model.skeleton import skeleton
    from llamax.optim.build import optimizer
    from llamax.parallel.mesh import make_mesh
    from llamax.train import state as states
    from llamax.train.step import make_step

    run = l4_tiny()
    loaded = llamax.load(weights)
    assert loaded.model == run.model, (loaded.model, run.model)
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    bones = skeleton(run.model, make_seam(mesh), patch_id=-1, train=run.train)
    tx = optimizer(run.optim, run.train.steps, bones.kinds)
    state = jax.jit(lambda: states.init(bones, tx, seed=0, spike_window=run.health.spike_window))()._replace(
        params=loaded.params
    )
    tokens, targets = data()
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    one, tiles = np.ones((B, T), np.int32), np.zeros((B, 0, 0, 0, 3), np.uint8)
    batch = jax.device_put(Batch(tokens, targets, one.astype(np.float32), one, positions, one - 1, tiles))
    program = jax.jit(make_step(run, bones, tx), donate_argnums=0).lower(state, batch).compile()
    matrix = jnp.linspace(-1, 1, 2048 * 2048).reshape(2048, 2048)
    dot = jax.jit(jnp.dot)

    def logits():
        def all_logits(state):
            model = bones.bind(state.params, state.router_bias)
            return model.logits(model(batch)[0])

        return np.asarray(jax.jit(all_logits)(state))

    def step():
        nonlocal state
        state, metrics = program(state, batch)
        return float(metrics.loss)

    return logits, step, lambda: jax.block_until_ready(dot(matrix, matrix))


SIDES = {"transformers": transformers_side, "llamax": llamax_side}


# ------------------------------------------------------------------------------------------------------------- in turn


def commands(side: str, folder: Path) -> dict[str, Callable]:
    logits, step, matmul = SIDES[side](folder / "weights")
    return {
        "logits": lambda: np.save(folder / f"{side}.npy", logits()),
        "steps": step,
        "matmul": lambda: matmul() is None,
    }


def compare(folder: Path) -> None:
    """Logits and loss before the first step."""
    logits = {side: np.load(folder / f"{side}.npy").astype(np.float64) for side in SIDES}

    def loss(x):
        top = x.max(-1, keepdims=True)
        logp = x - top - np.log(np.exp(x - top).sum(-1, keepdims=True))
        return -np.take_along_axis(logp, data()[1][..., None], -1).mean()

    losses = {side: loss(x) for side, x in logits.items()}
    apart = np.abs(logits["llamax"] - logits["transformers"]).max()
    print(
        f"the same model: logits differ by {apart:.1e} at most (their spread is {logits['llamax'].std():.2f}),", end=" "
    )
    print("first loss " + ", ".join(f"{side} {value:.6f}" for side, value in losses.items()))
    assert apart < 1e-4 and abs(losses["llamax"] - losses["transformers"]) < 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=15, help="of each framework, a round")
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return in_turn.serve(lambda: commands(options.serve, options.folder))
    if reason := in_turn.missing():
        return print(reason)
    from llamax.model.count import step_flops

    with tempfile.TemporaryDirectory() as name:
        processes = {}
        for side in SIDES:  # transformers first: it writes the weights
            processes[side] = in_turn.Process(__file__, side, Path(name))
            processes[side].ask("logits")
        compare(Path(name))
        rows: dict[str, list] = {side: [] for side in SIDES}
        matmuls: dict[str, list] = {side: [] for side in SIDES}
        for number in range(options.rounds):
            for side, process in processes.items():
                matmuls[side] += process.ask("matmul", 10)
                rows[side] += process.ask("steps", options.steps)
            medians = {s: statistics.median(r[0] for r in taken[-options.steps :][WARM:]) for s, taken in rows.items()}
            ratio = medians["transformers"] / medians["llamax"]
            times = ", ".join(f"{side} {1e3 * seconds:.0f} ms" for side, seconds in medians.items())
            print(f"round {number + 1}: {times}, ratio {ratio:.2f}, load {os.getloadavg()[0]:.1f}", flush=True)
        for process in processes.values():
            process.close()
    flops, rates = step_flops(l4_tiny()), {s: 2 * 2048**3 / min(r[0] for r in taken) for s, taken in matmuls.items()}
    peak = max(rates.values())
    print(f"\n2048^3 float32 matmul: jax {rates['llamax'] / 1e9:.0f}, torch {rates['transformers'] / 1e9:.0f} GFLOP/s")
    print(f"model FLOPs: {flops / B / T / 1e6:.1f} M a token\n")
    print(f"{'':14} {'s/step':>8} {'CPU s/step':>11} {'tokens/s':>9} {'GFLOP/s':>8} {'of matmul':>9} {'last loss':>10}")
    speed = {}
    for side, taken in rows.items():
        seconds, cpu = (statistics.median(row[i] for row in taken[WARM:]) for i in (0, 1))
        speed[side] = B * T / seconds
        share = flops / seconds / peak
        print(f"{side:14} {seconds:8.3f} {cpu:11.3f} {speed[side]:9,.0f} {flops / seconds / 1e9:8.1f}", end=" ")
        print(f"{share:9.1%} {taken[-1][2]:10.4f}")
    print(f"\nllamax / transformers: {speed['llamax'] / speed['transformers']:.2f} x tokens/s")


if __name__ == "__main__":
    main()
