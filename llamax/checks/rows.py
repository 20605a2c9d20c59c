"""Checks of `freeze()`: a step divides into rows, and a row holds what has to fit into it."""

from __future__ import annotations

from llamax.config import Run
from llamax.config_dict import ConfigError, divisors, nearest_divisor, nearest_multiple


def check(run: Run) -> None:
    """Raises ConfigError at the first setting that cannot work."""
    _rows(run)
    _pictures(run)
    _compares(run)


def _rows(run: Run) -> None:
    """The step divides into rows, the rows into micro-batches."""
    data, accumulate = run.data, run.train.accumulate
    if data.batch_tokens % data.seq_len:
        fits = nearest_multiple(data.seq_len * accumulate, data.batch_tokens)
        asked, true = f"--config.data.batch_tokens={data.batch_tokens}", f"rows have seq_len={data.seq_len} tokens"
        raise ConfigError(asked, true, f"Set --config.data.batch_tokens={fits}.")
    if data.rows % data.lanes:
        asked, true = f"--config.data.lanes={data.lanes}", f"each gives an equal part of the {data.rows} rows of a step"
        raise ConfigError(asked, true, f"Set --config.data.lanes={nearest_divisor(data.rows, data.lanes)}.")
    if data.rows % accumulate:
        fits = nearest_divisor(data.rows, accumulate)
        asked = f"--config.train.accumulate={accumulate}"
        true = f"a step has batch_tokens / seq_len = {data.rows} rows, which do not split into as many micro-batches"
        raise ConfigError(asked, true, f"Set --config.train.accumulate={fits}.")


def _compares(run: Run) -> None:
    """What is said of comparisons has some, and what a cache can know."""
    data = run.data
    if data.mismatched and data.ref_logp:
        asked, true = "--config.data.mismatched=True", "a cache (data.ref_logp) knows only answers to their own prompts"
        raise ConfigError(asked, true, "Let the reference give its log-probabilities live: data.ref_logp=''.")
    if data.mismatched and not data.comparisons_per_row:
        asked, true = "--config.data.mismatched=True", "comparisons_per_row=0, so that the run has no labelled answers"
        raise ConfigError(asked, true, "Set --config.data.comparisons_per_row=64, or data.mismatched=False.")


def _pictures(run: Run) -> None:
    """The largest picture fits into a row: its tiles and its tokens (patches, a separator after each tile, 3 marks)."""
    data, vision = run.data, run.model.vision
    if vision is None:
        if data.multimodal_steps > 0:
            asked, true = f"--config.data.multimodal_steps={data.multimodal_steps}", "the model has no vision encoder"
            raise ConfigError(asked, true, "Set --config.data.multimodal_steps=0, or model.vision in the recipe.")
        return
    if data.multimodal_steps == 0:
        return
    canvas = vision.max_tiles
    tiles = canvas + 1 if canvas > 1 else 1  # the global tile
    if data.tiles_per_row < tiles:
        asked = f"--config.data.tiles_per_row={data.tiles_per_row}"
        true = f"one picture has up to {tiles} tiles (model.vision.max_tiles={canvas}, and a global one)"
        raise ConfigError(asked, true, f"Set --config.data.tiles_per_row={tiles} or more.")
    tokens = tiles * vision.tokens_per_tile + (canvas if canvas > 1 else 0) + 3
    if data.seq_len < tokens:
        asked = f"--config.data.seq_len={data.seq_len}"
        true = f"one picture is up to {tokens} tokens ({tiles} tiles of {vision.tokens_per_tile}) and is never cut"
        fits = min((d for d in divisors(data.batch_tokens) if d >= tokens), default=tokens)
        raise ConfigError(asked, true, f"Set --config.data.seq_len={fits}, or lower --config.model.vision.max_tiles.")
