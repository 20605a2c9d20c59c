"""What `llamax show RECIPE` prints: the resolved run, its exact parameters, its tokens and FLOPs a step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.text import Text

from llamax import stages
from llamax.config import Model, Run, Tune, to_dict
from llamax.model import count
from llamax.observe.progress import size


def show(run: Run, console: Console | None = None) -> None:
    """Prints `run`; settings that are not the schema's defaults stand out, and are marked with a * in plain output."""
    console = console or Console()
    defaults = dict(flat(to_dict(Run())))
    for path, value in flat(to_dict(run)):
        changed = path not in defaults or defaults[path] != value
        value = plan(run.model) if path == "model.plan" else value
        shown = "''" if value == "" else str(value)
        _line(console, f"{'*' if changed else ' '} {path}", shown, "bold" if changed else "")
    console.print()
    for name, value in facts(run):
        _line(console, f"  {name}", value, "")


def flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every setting, in the schema's order."""
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def plan(model: Model) -> str:
    """The layer plan with its repeats: `(3 x rope_chunk+moe, nope_full+moe) x 12`."""
    segments = []
    for period, repeats in model.plan:
        runs: list[list[Any]] = []
        for kind in period:
            if runs and runs[-1][1] == kind:
                runs[-1][0] += 1
            else:
                runs.append([1, kind])
        kinds = ", ".join(kind if n == 1 else f"{n} x {kind}" for n, kind in runs)
        segments.append(f"({kinds}) x {repeats}")
    return ", ".join(segments)


def facts(run: Run) -> Iterator[tuple[str, str]]:
    """What follows from the settings: (name, value); of a run in stages, from those of the last one."""
    parts = stages.parts(run)
    for part in parts if run.stages else ():
        yield f"stage {part.name}", of_stage(part)
    run = parts[-1].run
    model, data = run.model, run.data
    n = count.parameters(model)
    yield "layers", f"{len(model.layers)} = {plan(model)}"
    yield "parameters", f"{n.total:,}"
    yield "of these text", f"{n.text:,}, of which {n.text_active:,} are active for a token"
    if model.vision:
        yield "of these vision", f"{n.vision:,}"
    kept = count.training_bytes(n.total)
    if run.tune != Tune():
        trained, frozen, names = tuned_of(run)
        yield "trained", f"{trained:,}: {names}"
        yield "frozen", f"{frozen:,}"
        kept = count.training_bytes(trained + frozen, trained)
    states = {"parameters": kept.parameters, "gradients": kept.gradients, "optimizer": kept.optimizer}
    yield "training state", ", ".join(f"{size(n)} {name}" for name, n in states.items()) + ", all devices together"
    for name, context in (("cache of a sequence", data.seq_len), ("", 2**20), ("", 10 * 2**20)):
        yield name, cache(model, context)
    yield "tokens a step", f"{data.batch_tokens:,} = {data.rows:,} rows of {data.seq_len:,}"
    yield "FLOPs a token", f"{count.token_flops(model, data.seq_len):.4g} of text, on average over a row"
    yield "FLOPs a step", f"{count.step_flops(run):.4g} of text"
    if model.vision and data.multimodal_steps:
        tiles = data.rows * data.tiles_per_row
        flops = count.step_flops(run, tiles) - count.step_flops(run)
        yield "", f"{flops:.4g} more in a step with pictures, if all of its {tiles:,} tile slots are filled"
        canvas = model.vision.max_tiles
        yield (
            "a picture",
            f"up to {canvas}{' + 1' if canvas > 1 else ''} tiles of {model.vision.tile_px} px,"
            f" {model.vision.tokens_per_tile} tokens a tile",
        )
    yield "whole run", f"{run.train.steps * data.batch_tokens:,} tokens in {run.train.steps:,} steps"


def tuned_of(run: Run) -> tuple[int, int, str]:
    """Parameters that are trained, and that are frozen; which the trained ones are."""
    import jax

    from llamax.model import tuned
    from llamax.model.seam import Seam
    from llamax.model.skeleton import skeleton

    bones = skeleton(run.model, Seam(), patch_id=0, train=run.train, tune=run.tune)
    trained, frozen = (
        sum(math.prod(x.shape) for x in jax.tree.leaves(part)) for part in bones.split(bones.shapes()[0])
    )
    return trained, frozen, ", ".join(tuned.named(bones.trained, True))


def of_stage(part: stages.Part) -> str:
    """One line: when, on what, and what it changes of positions."""
    run, steps = part.run, part.end - part.first
    rows = f"steps {part.first + 1:,} to {part.end:,}: {steps * run.data.batch_tokens:,} tokens in rows of "
    mesh = ", ".join(f"{axis}={n}" for axis, n in run.mesh.axes.items() if n != 1) or "one device"
    scaling = "" if run.model.rope.scaling == "none" else f" {run.model.rope.scaling}"
    rope = f"theta {run.model.rope.theta:g}{scaling}, chunks of {run.model.chunk_len:,}"
    return f"{rows}{run.data.seq_len:,}; {rope}; learning rate {run.optim.peak_lr:g}; {mesh}; remat {run.train.remat}"


def cache(model: Model, context: int) -> str:
    """What decoding keeps of a sequence of `context` tokens in bfloat16, beside a model without chunks."""
    kept, full = (count.cache_bytes(m, context) for m in (model, dataclasses.replace(model, chunk_len=context)))
    each = f"{kept / context:,.0f} bytes a token, {kept / full:.0%} of full attention's"
    return f"{size(kept)} in bfloat16 after {context:,} tokens: {each}"


def _line(console: Console, name: str, value: str, style: str) -> None:
    console.print(Text(f"{name:<36} ") + Text(value, style), soft_wrap=True)  # whole lines, so that grep works
