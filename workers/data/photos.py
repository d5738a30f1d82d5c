"""Photographs that other packages bring with them: something real to look at without a download.

None of these packages is imported; only its folder is looked up. Which of them are there depends on
the machine, so the photographs are for looking and comparing, never for scores.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from studio_state.errors import WorkloadError

# package, folder inside it, photographs; gradio is always there where the whole studio is installed
PLACES = (
    ("gradio", "media_assets/images", ("cheetah1.jpg", "lion.jpg", "tower.jpg", "cheetah.jpg", "groot.jpeg")),
    ("skimage", "data", ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")),
    ("sklearn", "datasets/images", ("china.jpg", "flower.jpg")),
)


def package_photos() -> list[Path]:
    """The photographs that are there, in a fixed order.

    Raises:
        WorkloadError: there is none.
    """
    found = []
    for package, folder, names in PLACES:
        spec = find_spec(package)
        for place in (spec.submodule_search_locations or ()) if spec else ():
            found += [path for name in names if (path := Path(place, folder, name)).is_file()]
    if not found:
        packages = ", ".join(package for package, _, _ in PLACES)
        raise WorkloadError(
            f"no installed package brings photographs ({packages} were looked at); give a folder of your own images as the source"
        )
    return found
