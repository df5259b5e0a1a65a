"""All five comparisons, run one after another.

python -m benchmarks.promise --peers /path/to/peers/bin/python
"""

from __future__ import annotations

from benchmarks.promise import interruption, micro_batch, observation, tile, world_size
from benchmarks.promise.comparison import compare, options

if __name__ == "__main__":
    peers = options(__doc__).peers
    for script in (micro_batch, world_size, interruption, tile, observation):
        print(f"\n## {script.__name__.rpartition('.')[2].replace('_', ' ')}\n", flush=True)
        compare(script.COMPARISON, peers)
