"""Sinks, the destinations of published scalars: TensorBoard, JSON lines, trackers, console."""
