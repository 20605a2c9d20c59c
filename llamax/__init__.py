"""llamax: train Llama-4-style models (mixture of experts, text and pictures) in JAX, from a laptop to a cluster.

The way through it: recipe -> config -> mesh -> model -> data -> step -> loop -> checkpoint and metrics. run.py reads as
that sentence; docs/tour.md is the house in one page. Importing this package imports nothing else.
"""

__version__ = "0.1.0"
