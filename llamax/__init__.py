"""llamax: train Llama-4-style models (mixture of experts, text and pictures) in JAX, from a laptop to a cluster.

The way through it: recipe -> config -> mesh -> model -> data -> step -> loop -> checkpoint and metrics. run.py reads as
that sentence; docs/tour.md is the house in one page. Importing this package imports nothing else; `llamax.load(FOLDER)`
gives a model that can be run.
"""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`llamax.load` and `llamax.Loaded`: imported when they are asked for, and jax with them."""
    if name in ("load", "Loaded"):
        from llamax import loading

        return getattr(loading, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
