"""Converting a synthetic checkpoint of many shards, both ways: peak memory, and the rate beside Orbax's own save.

    python bench/convert.py                    # 4 GB of a mixture of experts, bfloat16
    python bench/convert.py --dense            # the same of a dense Llama, whose matrices are all transposed
    python bench/convert.py --gb 1 --rounds 1

Each conversion runs in a process of its own, which reports two peaks above what it held after its imports: of all
resident memory (`VmHWM`, file pages that are mapped included) and of anonymous memory alone (sampled every 5 ms). They
stand beside the budget: two of the largest shards and one stacked leaf. Then, in turn, in one process: the conversions,
and Orbax's `StandardCheckpointer` saving the same arrays, bytes and dtype, out of memory. The folder of temporary files
needs five times the checkpoint's size and is removed.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

SHARDS = 24


def hf_config(gb: float, dense: bool) -> dict:
    """A Llama of about `gb` GB in bfloat16."""
    common = dict(vocab_size=32_000, hidden_size=1024, num_attention_heads=16, num_key_value_heads=4, head_dim=64)
    params = gb * 1e9 / 2 - 2 * common["vocab_size"] * common["hidden_size"]
    if dense:
        layer = 3 * 1024 * 8192 + 2.5 * 1024 * 1024
        return dict(common, model_type="llama", intermediate_size=8192, num_hidden_layers=max(4, round(params / layer)))
    layer = 17 * 3 * 1024 * 1536 + 2.5 * 1024 * 1024
    layers = max(4, 4 * round(params / layer / 4))
    sizes = dict(intermediate_size=1536, intermediate_size_mlp=4096, num_local_experts=16, num_hidden_layers=layers)
    return dict(common, model_type="llama4_text", **sizes)


def make(folder: Path, gb: float, dense: bool) -> None:
    """Writes the synthetic checkpoint: values as weights have them, whose bytes compress as weights' do."""
    from llamax.checkpoint import hf, hf_names
    from llamax.checkpoint import hf_config as configs

    config = hf_config(gb, dense)
    (folder / "config.json").write_text(json.dumps(config))
    model, form, _ = configs.describe(config, "synthetic")
    tensors = hf_names.tensors(hf_names.leaves(model, form, hf.shapes(model)[0]))
    most = 2 * sum(math.prod(shape) for shape in tensors.values()) / SHARDS
    rng, noise = np.random.default_rng(0), np.empty(0)
    noise = (rng.standard_normal(2**24, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
    groups: list[list[str]] = [[]]
    held = 0.0
    for name in sorted(tensors):
        held += 2 * math.prod(tensors[name])
        groups[-1].append(name)
        if held > most:
            groups.append([])
            held = 0.0
    weight_map = {}
    for number, names in enumerate(groups):
        file = f"model-{number:05d}.safetensors"
        arrays = {}
        for name in names:
            weight_map[name] = file
            n = math.prod(tensors[name])
            arrays[name] = np.resize(np.roll(noise, int(rng.integers(noise.size))), n).reshape(tensors[name])
        save_file(arrays, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


# ---------------------------------------------------------------------------------------------------------- memory


def status(key: str) -> int:
    """A line of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    raise KeyError(key)


def measured(way: str, source: str, out: str, answers) -> None:
    """In a child: one conversion, and its peaks above what was held before it."""
    from llamax.checkpoint import hf

    convert = {"from-hf": hf.from_hf, "to-hf": hf.to_hf}[way]
    base, peak, done = status("VmRSS"), 0, threading.Event()
    base_anonymous = status("RssAnon")

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    convert(source, out, **({"max_shard_gb": 0.2} if way == "to-hf" else {}))
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    answers.put((seconds, status("VmHWM") - base, peak - base_anonymous))


def in_a_child(*args):
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    child = context.Process(target=measured, args=(*args, answers))
    child.start()
    answer = answers.get(timeout=3600)
    child.join()
    return answer


def memory(source: Path, scratch: Path) -> None:
    from llamax.checkpoint import hf, hf_names
    from llamax.checkpoint.hf_read import Source

    opened = Source(source)
    shard = max(one.bytes for one in opened.shards)
    leaves = hf_names.leaves(opened.model, opened.form, hf.shapes(opened.model)[0])
    leaf = max(2 * math.prod(one.shape) for one in leaves)
    total = sum(one.bytes for one in opened.shards)
    print(
        f"{total / 1e9:.2f} GB in {len(opened.shards)} shards; largest {shard / 1e6:.0f} MB, leaf {leaf / 1e6:.0f} MB"
    )
    budget = 2 * shard + leaf
    for way, a, b in (("from-hf", source, scratch / "ckpt"), ("to-hf", scratch / "ckpt", scratch / "back")):
        seconds, resident, anonymous = in_a_child(way, str(a), str(b))
        print(
            f"{way:8} {seconds:6.1f} s  peak resident {resident / 1e6:6.0f} MB, anonymous {anonymous / 1e6:6.0f} MB, "
            f"budget {budget / 1e6:.0f} MB: {'within' if max(resident, anonymous) <= budget else 'OVER'}"
        )
    shutil.rmtree(scratch / "back")
    shutil.rmtree(scratch / "ckpt")


# ------------------------------------------------------------------------------------------------------------ rate


def rate(source: Path, scratch: Path, rounds: int) -> None:
    """Conversion and Orbax's own save in turn; the page cache holds the source in both."""
    import jax
    import orbax.checkpoint as ocp

    import llamax
    from llamax.checkpoint import hf

    params = llamax.load(source, dtype="bfloat16").params
    size = sum(x.nbytes for x in jax.tree.leaves(params))

    def orbax() -> None:
        with ocp.StandardCheckpointer() as saver:
            saver.save(scratch / "orbax", params)
            saver.wait_until_finished()

    ways = {
        "Orbax saves": orbax,
        "from-hf": lambda: hf.from_hf(source, scratch / "ckpt"),
        "to-hf": lambda: hf.to_hf(scratch / "ckpt", scratch / "back"),
    }
    ratios = {way: [] for way in ways}
    for number in range(rounds):
        seconds = {}
        for way in (*list(ways)[number % 2 :: -1], *list(ways)[1 + number % 2 :]):  # who is first changes
            warm(size)
            began = time.perf_counter()
            ways[way]()
            seconds[way] = time.perf_counter() - began
        for folder in ("orbax", "ckpt", "back"):
            shutil.rmtree(scratch / folder)
        line = []
        for way, took in seconds.items():
            ratios[way].append(seconds["Orbax saves"] / took)
            line.append(f"{way} {size / took / 1e6:.0f} MB/s ({ratios[way][-1]:.2f}x)")
        print(f"round {number}: {', '.join(line)}")
    medians = [f"{way} at {np.median(ratios[way]):.2f}x" for way in list(ways)[1:]]
    print(f"median: {', '.join(medians)} of Orbax's own save rate")


def warm(n: int) -> None:
    """Touches memory and frees it: a virtual machine pays some 2 s a GB for pages that its host has not given it yet,
    which would count against whoever comes first."""
    np.ones(n, np.uint8)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--gb", type=float, default=4.0)
    arguments.add_argument("--dense", action="store_true")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--scratch", help="a folder for temporary files")
    args = arguments.parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch) as temporary:
        source = Path(temporary, "source")
        source.mkdir()
        make(source, args.gb, args.dense)
        memory(source, Path(temporary))
        rate(source, Path(temporary), args.rounds)


if __name__ == "__main__":
    main()
