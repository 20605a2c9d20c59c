"""Training data that every machine can make for itself: the standard library, and drawings whose truth is known."""
