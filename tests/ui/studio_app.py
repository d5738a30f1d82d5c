"""Starts the real studio (server, dispatcher, record) with the replaying worker.

``studio_app.py PORT DATA_DIR [--auth] [--remote] [--claims FOLDER]``
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from app.dispatch.runner import Settings
from app.server import serve
from studio_state.claims import load_claims
from tests.ui.catalogue import catalogue

WORKER = Path(__file__).with_name("replay_worker.py")

if __name__ == "__main__":
    port, data = int(sys.argv[1]), sys.argv[2]
    auth = ("ada", "lovelace") if "--auth" in sys.argv else None
    settings = Settings(command=lambda device: [sys.executable, str(WORKER)], grace_s=1.0)
    claims = load_claims(Path(sys.argv[sys.argv.index("--claims") + 1])) if "--claims" in sys.argv else None
    serve(
        "127.0.0.1",
        port,
        auth,
        data,
        settings=settings,
        catalog=catalogue(),
        claims=claims,
        local_paths="--remote" not in sys.argv,
    )
