"""From nothing to the first token, once: what `herd.bench.cold` starts as a new process.

python -m herd.bench.first PLAYER SETUP PROMPT
"""

from __future__ import annotations

import json
import sys
import time
from importlib import import_module

from herd.bench.players.base import Setup
from herd.bench.worker import PLAYERS

__all__ = ["main"]


def main() -> None:
    """Print one line of JSON when the first token is there: seconds of imports, of loading, of prompt and token."""
    began = time.perf_counter()
    module = import_module(PLAYERS[sys.argv[1]])
    # herd's player imports what it needs above; the others look for their package when opened.
    if sys.argv[1] != "herd":
        import_module({"llama.cpp": "llama_cpp", "transformers": "transformers"}[sys.argv[1]])
    imported = time.perf_counter()
    player = module.open_player(Setup(**json.loads(sys.argv[2])))
    loaded = time.perf_counter()
    player.prefill(json.loads(sys.argv[3]))
    done = time.perf_counter()
    print(
        "first token",
        json.dumps({"imports": imported - began, "load": loaded - imported, "prompt": done - loaded}),
        flush=True,
    )


if __name__ == "__main__":
    main()
