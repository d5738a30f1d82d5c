"""Which Chromium the tests drive: Playwright's own, else the system's. ``python tests/browser.py`` prints it.

``--install`` gets one: Playwright's download where it works, else Debian's package where we may install it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

VARIABLE = "PARETO_STUDIO_CHROMIUM"
SYSTEM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ADVICE = (
    "no Chromium was found and none could be installed; run `playwright install chromium` with network access, "
    f"install your system's chromium package, or set {VARIABLE} to its executable"
)


def playwright_has_chromium() -> bool:
    """True if the headless build that this Playwright wants lies complete in its cache and the system can load it."""
    import playwright

    listing = Path(playwright.__file__).parent / "driver" / "package" / "browsers.json"
    revisions = {b["name"]: b["revision"] for b in json.loads(listing.read_text())["browsers"]}
    name = "chromium-headless-shell"
    folder = _playwright_cache() / f"{name.replace('-', '_')}-{revisions[name]}"
    if not (folder / "INSTALLATION_COMPLETE").exists():
        return False
    names = ("chrome-headless-shell", "headless_shell", "chrome-headless-shell.exe", "headless_shell.exe")
    return any(_succeeds([str(f), "--version"], 30) for f in folder.glob("*/*") if f.name in names)


def _playwright_cache() -> Path:
    if chosen := os.environ.get("PLAYWRIGHT_BROWSERS_PATH"):
        return Path(chosen)
    home = Path.home()
    return {"darwin": home / "Library/Caches/ms-playwright", "win32": home / "AppData/Local/ms-playwright"}.get(
        sys.platform, home / ".cache/ms-playwright"
    )


def system_chromium() -> str | None:
    """Path of the system's Chromium or Chrome."""
    return next((path for name in SYSTEM_NAMES if (path := shutil.which(name))), None)


def executable() -> str | None:
    """What to hand to Playwright as ``executable_path``; None = its own build.

    Raises:
        RuntimeError: there is no Chromium at all; the message says how to get one.
    """
    if chosen := os.environ.get(VARIABLE):
        return chosen
    if playwright_has_chromium():
        return None
    if found := system_chromium():
        return found
    raise RuntimeError(ADVICE)


def launch_options() -> dict[str, str]:
    """Keyword arguments for ``browser_type.launch``."""
    path = executable()
    return {"executable_path": path} if path else {}


def install(timeout_s: float) -> None:
    """Get a Chromium: Playwright's download within the time given, else ``apt-get`` as root.

    Raises:
        RuntimeError: neither works.
    """
    print("Getting a Chromium for the tests (once) ...", file=sys.stderr)
    if _succeeds([sys.executable, "-m", "playwright", "install", "chromium"], timeout_s) and playwright_has_chromium():
        return
    if shutil.which("apt-get") and os.name == "posix" and os.geteuid() == 0:
        print("Playwright's download does not work here; installing the system's package ...", file=sys.stderr)
        get = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=300"]
        if _succeeds([*get, "update"], 600) and _succeeds(
            [*get, "install", "--yes", "--no-install-recommends", "chromium"], 1800
        ):
            return
    raise RuntimeError(ADVICE)


def _succeeds(command: list[str], timeout_s: float) -> bool:
    """Run a command with its output on stderr; past the time, end it with everything that it started."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        process = subprocess.Popen(command, stdout=sys.stderr, env=environment, start_new_session=True)
    except OSError:
        return False
    try:
        return process.wait(timeout_s) == 0
    except subprocess.TimeoutExpired:
        if os.name == "posix":
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
        return False


def main() -> int:
    """Print the Chromium in use; install one first where asked to and where there is none."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--install", action="store_true")
    parser.add_argument("--timeout", type=float, default=120)
    options = parser.parse_args()
    try:
        if options.install:
            try:
                executable()
            except RuntimeError:
                install(options.timeout)
        print(executable() or "Playwright's own Chromium")
    except RuntimeError as e:
        print(e, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
