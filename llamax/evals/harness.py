"""llamax as a model of EleutherAI's lm-evaluation-harness (the extra `harness`), under the name `llamax`.

    llamax harness runs/quickstart --tasks my_task --include-path tasks                          # the usual ones
    python -m llamax.evals.harness run --model llamax --model_args path=runs/quickstart --tasks ... # all of its options

The harness looks for models in its own list only and takes no plug-ins, so whoever calls it imports this module first.
Log-likelihood, rolling log-likelihood (perplexity) and generation are done for texts; pictures are not.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from llamax import loading
from llamax.checkpoint.hf_read import CONFIG, Source, read_json
from llamax.checkpoint.saved import Saved
from llamax.config import ConfigError
from llamax.config_dict import nearest
from llamax.data import chat
from llamax.evals import continuations
from llamax.evals.continuations import How, Likelihood, Pair
from llamax.loading import Loaded
from llamax.observe import log, provenance
from llamax.observe.progress import track, waiting

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable, make_table
except ModuleNotFoundError as error:
    if error.name != "lm_eval":
        raise
    change = 'Install it: pip install "llamax[harness]".'
    raise ConfigError("Tasks of the lm-evaluation-harness", "lm_eval is not installed", change) from None

ROWS = 8  # texts that are worked on together
NEW_TOKENS = 256  # where a task does not say, as in the harness
UNKNOWN_LENGTH = 2048  # tokens that a model is given which does not say how many it can read, as in the harness
OF_TORCH = ("device", "max_batch_size", "trust_remote_code")  # lm_eval gives them to all models; they mean nothing here
ARGUMENTS = ("path", "dtype", "batch_size", "max_length", "max_gen_toks", "step", "seed")


@register_model("llamax")
class LlamaxLM(LM):
    """A model of any folder that `llamax.load` takes.

    Args:
        path: the folder.
        dtype: float32 or bfloat16.
        batch_size: texts that are worked on together; rounded down to a power of two.
        max_length: tokens that the model is given at most; by default the length of its training rows, or what its
            Hugging Face configuration says.
        max_gen_toks: new tokens of a generation whose task does not say.
        step: of a run; the newest sound checkpoint unless given.
        seed: of texts that are sampled.
    """

    def __init__(
        self,
        path: str | Path = "",
        dtype: str = "float32",
        batch_size: int | str = ROWS,
        max_length: int | None = None,
        max_gen_toks: int = NEW_TOKENS,
        step: int | None = None,
        seed: int = 0,
        **others: Any,
    ):
        super().__init__()
        check_arguments(path, others)
        self.rows = continuations.power_of_two(whole("batch_size", batch_size))
        self.max_gen_toks, self.seed = whole("max_gen_toks", max_gen_toks), whole("seed", seed, 0)
        found = loading.find(path, None if step is None else whole("step", step, 0))
        self.max_length = length_of(found.said) if max_length is None else whole("max_length", max_length)
        tokenizer = loading.tokenizer_of(found.said)
        if tokenizer is None:
            change = "Put the model's tokenizer.model (tiktoken's format) or tokenizer.json beside it."
            raise ConfigError(f"Texts for the model in {path}", "it has no tokenizer that can be read", change)
        self.tokenizer = tokenizer
        self._load = partial(loading.load, path, dtype=dtype, step=found.step)
        self._about = {"model_path": str(path), "model_step": found.step, "model_dtype": dtype}

    @cached_property
    def model(self) -> Loaded:
        """Read when the first text is asked about: all else that can be wrong is known by then."""
        with waiting(f"loading {self._about['model_path']}"):
            return self._load()

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results."""
        return self._about | {"max_length": self.max_length, "versions": provenance.versions()}

    # ---------------------------------------------------------------------------------------------------------- texts

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.path)

    def chat_template(self, chat_template: bool | str = False) -> str:
        return chat.template() if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        return continuations.chat_text(chat_history, self.tokenizer, prompt=add_generation_prompt)

    # ------------------------------------------------------------------------------------------------------- requests

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = [continuations.pair(request.args[0], request.args[1], self.tokenizer) for request in requests]
        found: dict[int, tuple[float, bool]] = {}
        for i, value in self._likelihoods(continuations.fit(pairs, self.max_length), disable_tqdm):
            found[i] = (value.logp, value.greedy)
            self.cache_hook.add_partial("loglikelihood", requests[i].args, found[i])
        return [found[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        texts = [self.tokenizer.encode(request.args[0]) for request in requests]
        of_each = [continuations.windows(ids, self.tokenizer.bos, self.max_length) for ids in texts]
        found = dict(self._likelihoods(list(itertools.chain(*of_each)), disable_tqdm))
        ends = list(itertools.accumulate(map(len, of_each), initial=0))
        return [sum(found[i].logp for i in range(a, b)) for a, b in itertools.pairwise(ends)]

    def _likelihoods(self, pairs: Sequence[Pair], quiet: bool) -> Iterable[tuple[int, Likelihood]]:
        found = continuations.likelihoods(self.model, pairs, self.rows)
        return found if quiet else track(found, "log-likelihoods", len(pairs))

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        found: dict[int, str] = {}
        texts = self._generations([request.args for request in requests])
        for i, text in texts if disable_tqdm else track(texts, "generations", len(requests)):
            found[i] = text
            self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return [found[i] for i in range(len(requests))]

    def _generations(self, asked: Sequence[tuple[str, dict]]) -> Iterator[tuple[int, str]]:
        """(number, text), those of the same settings together, as they are done."""
        groups: dict[How, list[int]] = {}
        for i, (_, settings) in enumerate(asked):
            groups.setdefault(continuations.how_of(settings, self.max_gen_toks, self.seed), []).append(i)
        prompts = {
            how: continuations.prompts_of([asked[i][0] for i in of], self.tokenizer, how.max_tokens, self.max_length)
            for how, of in groups.items()
        }
        for how, of in groups.items():
            for some in continuations.batches(prompts[how], how, self.rows):
                texts = continuations.continued(self.model, [prompts[how][j] for j in some], how, self.rows)
                yield from zip((of[j] for j in some), texts, strict=True)


def check_arguments(path: str | Path, others: Mapping[str, Any]) -> None:
    if not str(path):
        raise ConfigError("model llamax without a path", "it is the model of a folder", "Give path=runs/quickstart.")
    for name, value in others.items():
        if name in OF_TORCH:
            continue
        true = f"the model llamax takes {', '.join(ARGUMENTS)}"
        close = nearest(name, ARGUMENTS)
        raise ConfigError(f"{name}={value}", true, f"Did you mean {close}?" if close else "Leave it out.")


def whole(name: str, value: Any, least: int = 1) -> int:
    """A whole number that may come as text. ConfigError if it is none, or too small."""
    try:
        number = int(str(value))
    except ValueError:
        number = least - 1
    if number < least:
        raise ConfigError(f"{name}={value}", f"it is a whole number from {least} up", "Give one.")
    return number


def length_of(found: Saved | Source) -> int:
    """Tokens that the model was trained for, as far as its folder says."""
    if isinstance(found, Saved) and found.seq_len is not None:
        return found.seq_len
    folder = found.hf if isinstance(found, Saved) else found.folder
    said = read_json(folder / CONFIG) if folder is not None and (folder / CONFIG).is_file() else {}
    return int(said.get("text_config", said).get("max_position_embeddings", UNKNOWN_LENGTH))


# --------------------------------------------------------------------------------------------------------- the command


def run_harness(
    folder: str | Path,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    chat_template: bool = False,
    out: str | Path | None = None,
    **model: Any,
) -> dict[str, Any]:
    """The harness's results of a model on tasks, its groups and tags too; a table is printed.

    Args:
        tasks: their names, or patterns such as python_*.
        include_path: a folder of task files of one's own.
        limit: examples of each task, the first ones.
        fewshot: examples before each question, where the task does not insist on a number.
        chat_template: whether a question is a message to the assistant.
        out: harness.json is written there, and each answer to harness_samples.jsonl.
        model: the arguments of `LlamaxLM`, but for its path.
    Raises:
        ConfigError: there is no such task, model, or folder of tasks, or a task's data cannot be read; before the
            model's weights are.
    """
    log.setup()
    if fewshot is not None:
        whole("--fewshot", fewshot, 0)
    if include_path is not None and not Path(include_path).is_dir():
        asked, change = f"--include-path {include_path}", "Give the folder that holds the tasks' YAML files."
        raise ConfigError(asked, "there is no such folder", change)
    with waiting("looking for tasks"):
        manager = TaskManager(include_path=None if include_path is None else str(include_path))
    names = names_of(manager, tasks, include_path)
    if out is not None:
        make(Path(out))
    lm = LlamaxLM(folder, **model)
    loaded = load_tasks(manager, names)
    how = dict(limit=limit, num_fewshot=fewshot, apply_chat_template=chat_template, batch_size=lm.rows)
    results = simple_evaluate(lm, tasks=loaded, task_manager=manager, log_samples=out is not None, **how)
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    if out is not None:
        write(Path(out), results)
    return results


def names_of(manager: TaskManager, asked: Sequence[str], include_path: str | Path | None) -> list[str]:
    """The harness's names of what is asked for. ConfigError if one stands for nothing."""
    names: list[str] = []
    for name in asked:
        found = manager.match_tasks([name])
        if not found:
            close = nearest(name, manager.all_tasks)
            true = f"none of the {len(manager.all_tasks):,} tasks, groups and tags has that name"
            if include_path is not None:  # files that are no YAML are passed over in silence
                paths = {name: entry.yaml_path for name, entry in manager.task_index.items() if entry.yaml_path}
                own = [name for name, path in paths.items() if Path(include_path).resolve() in path.resolve().parents]
                true += f"; those that can be read in {include_path} are {', '.join(own) or 'none'}"
            hint = f"Did you mean {close!r}?" if close else "Name one, or --include-path for tasks of your own."
            raise ConfigError(f"task {name!r}", true, hint)
        names += sorted(found)
    return list(dict.fromkeys(names))


def load_tasks(manager: TaskManager, names: Sequence[str]) -> list[Any]:
    """Tasks and groups with their data. ConfigError if one cannot be read, stands there twice, or cannot be done."""
    groups: dict[str, Any] = {}
    tasks: dict[str, Any] = {}
    named: dict[str, str] = {}  # task -> what it was asked for as
    for name in names:
        try:
            loaded = manager.load(name)
        except Exception as error:  # a task is the code and the data of others: anything can be wrong with it
            true = f"it cannot be read ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
            change = "Correct its files, give what it needs (its data, the network, a package), or leave it out."
            raise ConfigError(f"task {name!r}", true, change) from error
        for task in loaded["tasks"]:
            if task in named:
                asked, true = f"tasks {named[task]!r} and {name!r}", f"both of them hold {task}"
                raise ConfigError(asked, true, "Name only one of them.")
            named[task] = name
        tasks |= loaded["tasks"]
        groups |= loaded["groups"]
    for name, task in tasks.items():
        check_task(name, task)
    inside = {task.task_name for group in groups.values() for task in group.get_all_tasks()}
    below = {inner.name for group in groups.values() for inner in group.get_all_groups()}
    tops = [group for name, group in groups.items() if name not in below]
    return tops + [task for name, task in tasks.items() if name not in inside]


def check_task(name: str, task: Any) -> None:
    if getattr(task, "MULTIMODAL", False):
        raise ConfigError(
            f"task {name!r}", "it shows pictures or plays sounds, and only texts are asked", "Leave it out."
        )
    if getattr(task, "UNSAFE_CODE", False):
        change = "If you trust it: python -m llamax.evals.harness run ... --confirm_run_unsafe_code"
        raise ConfigError(f"task {name!r}", "it runs the code that the model has written", change)


def make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}", f"it cannot be made: {error}", "Choose another folder.") from None


def write(out: Path, results: dict[str, Any]) -> None:
    answers = [{"task": task} | answer for task, of in results["samples"].items() for answer in of]
    lines = (json.dumps(answer, ensure_ascii=False, default=handle_non_serializable) + "\n" for answer in answers)
    provenance.write_whole(out / "harness_samples.jsonl", "".join(lines))
    told = {key: value for key, value in results.items() if key != "samples"}
    provenance.write_whole(out / "harness.json", json.dumps(told, indent=2, default=handle_non_serializable) + "\n")


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except ConfigError as error:
        print(f"llamax: {error}", file=sys.stderr)
        sys.exit(2)
