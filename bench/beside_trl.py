"""Post-training speed and losses of a tiny Llama in llamax and in TRL: same model, same data, same batches, in turn.

    python bench/beside_trl.py [sft] [dpo] [--rounds 5]

A dense Llama 3 of width 256 (4 layers, 8 query and 4 kv heads of 32, feed-forwards of 704, untied vocabulary of 4,096,
5.0 M parameters), float32, AdamW without decay at a constant rate behind a clip at norm 1, no rematerialisation on
either side (TRL's own defaults are to recompute, and bfloat16).

The data are conversations of 1 to 6 questions about sums and programs, made by the rule of the embedded instructions;
what the assistant says is learnt. For DPO (sigmoid, beta 0.1; the reference's log-probabilities are computed
beforehand, on both sides) a question behind up to 5 answered ones, a right answer, and a wrong or a hedged one.

llamax reads them from JSONL, packs them and runs the program that `llamax train` runs, `programs.build`, handed each
batch from the host. The other side is TRL's `SFTTrainer` and `DPOTrainer`: their tokenization with the exported
tokenizer and template, their collators, losses and loop, with `adamw_torch_fused`. A batch of theirs are the
conversations that stand in a batch of llamax's rows, padded to the longest; for SFT also one behind the other
(`padding_free`, which TRL's DPO does not have). Each lives in a process of its own and sleeps while the others work.
All start from the same weights, and before anything is timed they are compared: token ids and what of them is learnt
are equal, and the losses of the first 20 steps within 1e-3.

Tokens are real ones: no padding. A round is 20 steps, one pass over the batches; the table has medians over the rounds.
Needs torch, transformers >= 5 and trl; says so and stops where they are missing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import in_turn
import numpy as np
from conversations import BETA, RATE, ROWS, STEPS, T, examples_in, our_batches, our_data, padded, write_data
from trl_loop import trl_side

APART = 1e-3  # what losses of a step may differ by


def our_run(task: str, model: Any, data: Any):
    """The run's configuration."""
    from llamax import config

    run = config.Run(
        name="beside_trl",
        model=model,
        data=data,
        optim=config.Optim(peak_lr=RATE[task], schedule="wsd", warmup_steps=0, weight_decay=0.0),
        train=config.Train(steps=1_000_000, remat="none"),
    )
    if task == "sft":
        return run
    return replace(
        run,
        losses=config.Losses(next_token=0.0),
        reference=config.Reference(source="cache"),
        preference=config.Preference(losses=config.PreferenceLosses(sigmoid=1.0), beta=BETA),
    )


def llamax_side(task: str, folder: Path) -> Callable:
    """train(): the losses of a round."""
    import jax

    import llamax
    from llamax.data import pipeline
    from llamax.model.seam import make_seam
    from llamax.model.skeleton import skeleton
    from llamax.optim.build import optimizer
    from llamax.parallel import place
    from llamax.parallel.mesh import make_mesh
    from llamax.post import reference
    from llamax.train import programs
    from llamax.train import state as states

    loaded = llamax.load(folder / "weights")
    run = our_run(task, loaded.model, our_data(task, folder, str(folder / "ref") if task == "dpo" else ""))
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    bones = skeleton(run.model, make_seam(mesh), patch_id=-1, train=run.train)
    tx = optimizer(run.optim, run.train.steps, bones.split(bones.kinds)[0])
    step, shapes = programs.build(run, bones, tx, mesh)
    fresh = jax.jit(partial(states.init, bones, tx, 0, run.health.spike_window))()
    state = jax.device_put(fresh._replace(params=loaded.params), jax.tree.map(lambda x: x.sharding, shapes))
    if task == "dpo":
        scorer = reference.Scorer(bones, partial(place.put_whole_batch, mesh=mesh), np.asarray)
        weights = (loaded.params, state.router_bias)
        reference.fill(run, reference.left(run, "drawn at random"), scorer, weights, lambda: None)
    batches = list(pipeline.HeldOut(folder / "data.toml", run.data, None))[
        :STEPS
    ]  # with the reference, if there is one
    numbered = our_batches(our_data(task, folder))
    assert all((one.tokens == other.tokens).all() for one, other in zip(batches, numbered, strict=True))
    program = step.lower(state, batches[0]).compile()

    def train() -> list[float]:
        nonlocal state
        losses = []
        for batch in batches:
            state, metrics = program(state, place.put_batch(batch, mesh))
            losses.append(float(metrics.loss))
        return losses

    return train


# ------------------------------------------------------------------------------------------------------------- in turn

SIDES: dict[str, dict[str, Callable]] = {  # TRL first: it writes the weights
    "sft": {"TRL": trl_side, "TRL, padding-free": partial(trl_side, padding_free=True), "llamax": llamax_side},
    "dpo": {"TRL": trl_side, "llamax": llamax_side},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", help="sft, dpo; both unless given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        task, side = options.serve.split(":")
        return in_turn.serve(lambda: {"round": SIDES[task][side](task, options.folder)})
    if reason := in_turn.missing("torch", "transformers", "trl"):
        return print(reason)
    os.environ |= dict.fromkeys(("HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"), "1")
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore::FutureWarning"}
    for task in options.tasks or SIDES:
        with tempfile.TemporaryDirectory() as name:
            beside(task, Path(name), options.rounds)


def beside(task: str, folder: Path, rounds: int) -> None:
    write_data(task, folder)
    batches = our_batches(our_data(task, folder))
    tokens = sum(int((batch.segment_ids > 0).sum()) for batch in batches)
    used = sum(len(examples_in(batch)) for batch in batches)
    print(f"\n{task}: {STEPS} steps of {ROWS} rows of {T}; {used} examples, {tokens:,} tokens,", end=" ")
    print(f"{tokens / (STEPS * ROWS * T):.1%} of llamax's rows and {padded(batches):.1%} of padded ones", flush=True)
    processes = {}
    for side in SIDES[task]:  # one after the other: the first writes the weights
        processes[side] = in_turn.Process(__file__, f"{task}:{side}", folder)
        processes[side].ask("round", 0)
    compare({side: process.ask("round")[0][2] for side, process in processes.items()})
    rates: dict[str, list[float]] = {side: [] for side in processes}
    cpu: dict[str, list[float]] = {side: [] for side in processes}
    for number in range(rounds):
        for side, process in processes.items():
            ((seconds, cpu_seconds, _),) = process.ask("round")
            rates[side].append(tokens / seconds)
            cpu[side].append(tokens / cpu_seconds)
        shown = ", ".join(f"{side} {taken[-1]:,.0f}" for side, taken in rates.items())
        print(f"round {number + 1}: tokens/s: {shown}; load {os.getloadavg()[0]:.1f}", flush=True)
    for process in processes.values():
        process.close()
    print(f"\n{task:18} {'tokens/s':>10} {'llamax':>8} {'tokens/CPU s':>14} {'llamax':>8}")
    for side in processes if rounds else ():
        line = f"{side:18}"
        for taken, width in ((rates, 10), (cpu, 14)):
            line += f" {statistics.median(taken[side]):{width},.0f} {ratio(taken, side):6.2f} x"
        print(line)


def ratio(taken: dict[str, list[float]], side: str) -> float:
    """How many times a side's rate llamax's is: the median over the rounds."""
    return statistics.median(ours / theirs for ours, theirs in zip(taken["llamax"], taken[side], strict=True))


def compare(curves: dict[str, list[float]]) -> None:
    """Prints the losses step by step, and stops where they differ."""
    print(f"{'step':>4} " + " ".join(f"{side:>18}" for side in curves) + f" {'apart':>9}")
    aparts = [max(losses) - min(losses) for losses in zip(*curves.values(), strict=True)]
    for i, losses in enumerate(zip(*curves.values(), strict=True)):
        print(f"{i + 1:4} " + " ".join(f"{loss:18.6f}" for loss in losses) + f" {aparts[i]:9.1e}")
    print(f"largest difference of {len(aparts)} steps: {max(aparts):.1e}", flush=True)
    assert max(aparts) < APART, f"losses differ by {max(aparts):.1e}, more than {APART}"


if __name__ == "__main__":
    main()
