"""What a run shows of itself: metrics, TensorBoard, the live line, logs, and where it came from."""
