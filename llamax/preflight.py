"""What `run.train` makes sure of before it compiles or writes anything: paths, tokenizer, data, devices, steps left."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llamax import config, stripes
from llamax.checkpoint import sums
from llamax.config import ConfigError
from llamax.config_dict import flat
from llamax.data import usable
from llamax.data.encoded import LEARNT
from llamax.data.sources import TASKS, open_source, read_manifest
from llamax.data.tasks.tokens import Tokens
from llamax.data.tokenizer import Tokenizer, check_size
from llamax.losses.preference import ONE_SIDED
from llamax.model.seam import Seam
from llamax.model.skeleton import skeleton
from llamax.observe import provenance
from llamax.parallel import processes
from llamax.stages import Part

SHOWN = 3  # differing entries that an error names


def check_tokenizer(run: config.Run) -> Tokenizer:
    """The run's tokenizer. ConfigError if the embedding has another number of rows than it has ids."""
    tokenizer = Tokenizer(config.resolve_path(run.data.tokenizer))
    change = f"Set --config.model.vocab_size={tokenizer.vocab_size}, or name the model's own tokenizer."
    check_size(tokenizer, run.model.vocab_size, f"model.vocab_size={run.model.vocab_size}", change)
    return tokenizer


def with_paths(run: config.Run, workdir: Path) -> config.Run:
    """The run with its data paths resolved for this machine."""
    sources = {
        name: dataclasses.replace(s, path=str(config.resolve_path(s.path))) for name, s in run.data.sources.items()
    }
    evals = {name: dataclasses.replace(e, path=str(config.resolve_path(e.path))) for name, e in run.evals.items()}
    tokenizer = str(config.resolve_path(run.data.tokenizer))
    data = dataclasses.replace(run.data, sources=sources, tokenizer=tokenizer)
    if run.reference.source == "cache":
        data = dataclasses.replace(data, ref_logp=str(Path(data.ref_logp or workdir / "reference").absolute()))
    tokens = Tokens(tokenizer, run.model.vision)
    for evaluation in evals.values():  # a missing or cut one should not be met after hours of training
        open_source(read_manifest(evaluation.path), tokens)
    return dataclasses.replace(run, data=data, evals=evals)


def aligned(run: config.Run, shards: int) -> config.Run:
    """The run with what documents are aligned to, where rows are cut into so many shards."""
    align = run.data.align_tokens or stripes.alignment(run.model, run.data.seq_len, shards)
    return dataclasses.replace(run, data=dataclasses.replace(run.data, align_tokens=align))


def data_files(parts: Sequence[Part]) -> dict[str, str]:
    """What tells whether data is still the same: the tokenizer's SHA-256, and each source's hashes or file sizes. A
    source that a stage reads from another manifest than the stages before goes by both names."""
    files = {"tokenizer": hashlib.sha256(Path(parts[0].run.data.tokenizer).read_bytes()).hexdigest()}
    for part in parts:
        for name, source in sorted(part.run.data.sources.items()):
            manifest = read_manifest(source.path)
            sizes = {path.name: path.stat().st_size for path in manifest.files}
            content: list[Any] = [manifest.format, manifest.kind, manifest.sha256 or sizes]
            content += [manifest.tasks] if manifest.tasks else []
            content += [manifest.learnt] if manifest.learnt != LEARNT else []
            digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
            files[name if files.get(name, digest) == digest else f"{part.name}.{name}"] = digest
    return files


def sound_step(workdir: Path) -> int:
    """The checkpoint to go on from, compared with its sums, or 0; newer ones that are damaged are set aside.

    ConfigError if only damaged ones are there.
    """
    return sums.newest_sound(workdir / "checkpoints", rename=True)


def check_steps_left(steps: int, latest: int) -> int:
    """`latest`, the step to go on from. ConfigError if the workdir has gone further than the run asks for."""
    if latest > steps:
        raise ConfigError(
            f"--config.train.steps={steps}",
            f"the run in this workdir has taken {latest} steps already",
            f"Set it to {latest} or more, or choose another --workdir.",
        )
    return latest


def check_processes(asked: Mapping[str, Any], workdir: Path, devices: int) -> None:
    """ConfigError, in every process, if one of them has other devices, code or settings than the first.

    Comes before all else that processes say to each other: other code might say it in another order.

    Args:
      asked: the resolved configuration, nested dicts.
      devices: how many this process has of its own.
    """
    check_same(
        {
            "its code": code_hashes(),
            "its versions": provenance.versions(),
            "its devices": devices,
            "its recipe and settings": flat(json.loads(json.dumps(asked))),
            "its --workdir": str(workdir.absolute()),
        }
    )


def check_same(facts: Mapping[str, Any]) -> None:
    """ConfigError, in every process, that names the first difference from the first process's facts (JSON)."""
    processes.from_all([platform.node(), facts], compare)


def compare(said: list[Any]) -> None:
    """ConfigError if facts are not the first one's; `said` is (host, facts) of every process."""
    (first_host, first), *others = said
    for number, (host, other) in enumerate(others, start=1):
        for fact, here in first.items():
            if other.get(fact) != here:
                there, here = difference(other.get(fact), here)
                raise ConfigError(
                    f"Process {number} on {host} in one job with process 0 on {first_host}",
                    f"{fact} differ: {there} there, {here} in process 0",
                    "Start all of them with the same command, code, data and kind of machine.",
                )


def difference(there: Any, here: Any) -> tuple[Any, Any]:
    """What to show of two facts that differ; of dicts, the first entries that do."""
    if not (isinstance(there, dict) and isinstance(here, dict)):
        return there, here
    keys = [key for key in {**here, **there} if there.get(key) != here.get(key)][:SHOWN]
    return {key: there.get(key) for key in keys}, {key: here.get(key) for key in keys}


def code_hashes() -> dict[str, str]:
    """The package's source files, and the start of each one's SHA-256."""
    root = Path(__file__).parent
    paths = sorted(root.rglob("*.py"))
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in paths}


def check_tune(run: config.Run) -> None:
    """ConfigError if the rules of what is trained do not suit the model."""
    if run.tune != config.Tune():
        skeleton(run.model, Seam(), patch_id=0, train=run.train, tune=run.tune)


def check_pairs(parts: Sequence[Part]) -> None:
    """ConfigError if losses of two answers would find none in any source: they would be 0, and teach nothing."""
    wanted = next(filter(None, (_of_two(part.run) for part in parts)), "")
    if not wanted:
        return
    for part in parts:
        tokens = Tokens(part.run.data.tokenizer, part.run.model.vision)
        for source in part.run.data.sources.values():
            manifest = read_manifest(source.path)
            if manifest.format != TASKS and usable.has_pairs(open_source(manifest, tokens)):
                return
    true = "it is of two answers to a prompt, and no source has chosen and rejected ones"
    change = "Name such a source; or, for answers with labels, --config.preference.losses.kto=1 (apo_zero_unpaired)."
    raise ConfigError(f"--config.{wanted}", true, change)


def _of_two(run: config.Run) -> str:
    """A loss of the run that reads two answers; "" if it has none."""
    if run.losses.reward:
        return "losses.reward"
    of_two = [name for name in run.preference.weights if name not in ONE_SIDED]
    return f"preference.losses.{of_two[0]}" if of_two and run.losses.preference else ""


def check_evals(run: config.Run) -> None:
    """ConfigError if an evaluation's data is not what its kind needs, or its lengths are beyond its cache's budget."""
    from llamax.evals import CHECKS

    for evaluation in run.evals.values():
        if evaluation.kind in CHECKS:
            CHECKS[evaluation.kind](run, evaluation)
