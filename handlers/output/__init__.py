"""Writing that never ends a run: the base class of handlers that write, and files that wait."""
