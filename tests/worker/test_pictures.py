"""Opening images: upright, RGB, on white, of a size that can be worked with; one sentence for what is no image."""

from __future__ import annotations

import ast
import base64
import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from studio_state.errors import WorkloadError
from workers.data import pictures
from workers.data.pictures import ArrayPicture, FilePicture, as_png, check_image, open_image, shown

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def refused(act: Callable[[], Any]) -> str:
    """What a WorkloadError says: one sentence for a person."""
    with pytest.raises(WorkloadError) as error:
        act()
    text = str(error.value)
    assert text
    assert "\n" not in text
    assert not any(w in text for w in ("Traceback", "Error", " object at 0x"))
    return text


def close(found: Any, wanted: tuple[int, int, int], within: int = 12) -> bool:
    return all(abs(a - b) <= within for a, b in zip(found, wanted, strict=True))


def image_file(path: Path, colour: tuple[int, int, int] = RED, size: tuple[int, int] = (12, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_photograph_lying_on_its_side_is_opened_upright(form: str, tmp_path: Path) -> None:
    lying = Image.new("RGB", (40, 20), RED)
    lying.paste(BLUE, (20, 0, 40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the stored left edge is the top of what was seen (EXIF 2.3, tag Orientation)
    lying.save(tmp_path / "phone.img", form, exif=exif, **({"quality": 95} if form == "JPEG" else {}))
    upright = open_image(tmp_path / "phone.img")
    assert (upright.size, upright.mode) == ((20, 40), "RGB")
    assert close(upright.getpixel((10, 5)), RED)
    assert close(upright.getpixel((10, 35)), BLUE)


def test_transparency_is_on_white(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (3, 1), (0, 0, 0, 0))
    clear.putpixel((1, 0), (255, 0, 0, 255))
    clear.putpixel((2, 0), (0, 0, 255, 51))  # a fifth of blue
    clear.save(tmp_path / "rgba.png")
    found = open_image(tmp_path / "rgba.png")
    assert found.mode == "RGB"
    assert [found.getpixel((x, 0)) for x in range(3)] == [WHITE, RED, (204, 204, 255)]

    Image.fromarray(np.array([[[9, 0], [9, 255]]], np.uint8), "LA").save(tmp_path / "la.png")
    found = open_image(tmp_path / "la.png")
    assert [found.getpixel((x, 0)) for x in range(2)] == [WHITE, (9, 9, 9)]

    wide = Image.new("RGBA", (3000, 30), (0, 0, 0, 0))  # transparent pixels are black underneath: none of it may show
    wide.paste((255, 0, 0, 255), (0, 0, 1500, 30))
    wide.save(tmp_path / "wide.png")
    found = open_image(tmp_path / "wide.png")
    assert found.size == (2048, 20)
    assert np.asarray(found)[..., 0].min() >= 254


def test_a_palette_gif(tmp_path: Path) -> None:
    picture = Image.new("P", (4, 2), 0)
    picture.putpalette([*RED, *BLUE, 0, 255, 0])
    picture.paste(1, (2, 0, 4, 2))
    picture.putpixel((0, 0), 2)
    picture.save(tmp_path / "moving.gif", save_all=True, append_images=[Image.new("RGB", (4, 2))], transparency=2)
    found = open_image(tmp_path / "moving.gif")
    assert (found.mode, found.size) == ("RGB", (4, 2))
    assert [found.getpixel(at) for at in ((0, 0), (1, 1), (3, 1))] == [WHITE, RED, BLUE]


def test_greys_of_more_than_8_bits_keep_their_range(tmp_path: Path) -> None:
    deep = np.array([[1000, 2000], [3000, 5000]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert Image.open(tmp_path / "deep.png").mode.startswith("I;16")
    found = open_image(tmp_path / "deep.png")
    assert found.mode == "RGB"
    assert np.asarray(found)[..., 0].tolist() == [[0, 64], [128, 255]]  # 1000 -> 0, 5000 -> 255
    Image.fromarray(np.array([[0.0, np.nan], [0.5, 1.0]], np.float32)).save(tmp_path / "map.tiff")
    assert np.asarray(open_image(tmp_path / "map.tiff"))[..., 2].tolist() == [[0, 0], [128, 255]]
    Image.fromarray(np.full((2, 2), 7, np.uint16)).save(tmp_path / "even.png")
    assert len(set(np.asarray(open_image(tmp_path / "even.png")).ravel().tolist())) == 1


@pytest.mark.parametrize(("mode", "form"), [("1", "PNG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("L", "BMP"), ("RGB", "WEBP")])
def test_other_kinds_of_pixels(mode: str, form: str, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), WHITE).convert(mode).save(tmp_path / "x", form)
    found = open_image(tmp_path / "x")
    assert (found.mode, found.size) == ("RGB", (16, 16))
    assert close(found.getpixel((8, 8)), WHITE)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="tells the peak of memory on Linux only")
def test_a_large_photograph_is_shrunk_and_never_unpacked_whole(tmp_path: Path) -> None:
    rough = np.random.default_rng(0).integers(0, 255, (57, 86, 3), dtype=np.uint8)
    path = tmp_path / "large.jpg"
    Image.fromarray(rough).resize((5472, 3648)).save(path)  # 20 megapixels: 80 MB when unpacked
    image_file(tmp_path / "small.jpg")
    code = (
        "import re, sys; from pathlib import Path; from workers.data.pictures import open_image\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"  # not inherited
        "open_image(Path(sys.argv[1])); before = peak(); image = open_image(Path(sys.argv[2]))\n"
        "print([*image.size, peak() - before])"
    )
    said = subprocess.run([sys.executable, "-c", code, tmp_path / "small.jpg", path], capture_output=True, text=True, check=True)
    width, height, grown = ast.literal_eval(said.stdout)
    assert (width, height) == (2048, 1365)
    assert grown < 60_000  # kB


@pytest.mark.parametrize(("size", "wanted"), [((2048, 9), (2048, 9)), ((2049, 2049), (2048, 2048)), ((9000, 1), (2048, 1))])
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_the_longest_edge(size: tuple[int, int], wanted: tuple[int, int], form: str, tmp_path: Path) -> None:
    Image.new("RGB", size, BLUE).save(tmp_path / "x", form)
    found = open_image(tmp_path / "x")
    assert found.size == wanted
    assert close(found.getpixel((0, 0)), BLUE)


def claimed_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims a size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


def bad_images(folder: Path) -> dict[str, tuple[Path, str]]:
    good = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(good, "PNG")
    contents = {
        "text.jpg": (b"This is a letter, not a photograph.", "is not an image that can be read"),
        "empty.png": (b"", "is not an image that can be read"),
        "vector.png": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "is not an image that can be read"),
        "half.png": (good.getvalue()[: len(good.getvalue()) // 2], "is damaged"),
        "bomb.png": (claimed_png(30_000, 30_000), "has 30000 x 30000 pixels; at most 200 megapixels are allowed"),
    }
    for name, (data, _) in contents.items():
        (folder / name).write_bytes(data)
    found = {name: (folder / name, part) for name, (_, part) in contents.items()}
    (folder / "folder.jpg").mkdir()
    return found | {
        "folder.jpg": (folder / "folder.jpg", "is not there"),
        "missing": (folder / "no.jpg", "is not there"),
        "long": (folder / ("a" * 300 + ".jpg"), "is damaged"),
        "break": (folder / "a\nb.jpg", "is not there"),
    }


BAD_IMAGES = ["text.jpg", "empty.png", "vector.png", "half.png", "bomb.png", "folder.jpg", "missing", "long", "break"]


@pytest.mark.parametrize("name", BAD_IMAGES)
@pytest.mark.parametrize("act", [open_image, check_image, lambda p: FilePicture(p).open()], ids=["open", "check", "picture"])
def test_what_is_no_image_is_one_sentence(name: str, act: Callable[[Path], Any], tmp_path: Path) -> None:
    path, part = bad_images(tmp_path)[name]
    before = Image.MAX_IMAGE_PIXELS
    said = refused(lambda: act(path))
    assert part in said
    assert repr(str(path)) in said
    assert before == Image.MAX_IMAGE_PIXELS, "the library's own limit was not put back"


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # TIFF warns before it fails
def test_damaged_files_are_one_sentence_or_an_image(form: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    saved = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(saved, form)
    whole, path = saved.getvalue(), tmp_path / "x"
    for trial in range(60):
        data = bytearray(whole[: int(rng.integers(1, len(whole)))] if trial % 2 else whole)
        for at in rng.integers(min(64, len(data) - 1), len(data), 5):  # past the header, so that no size grows
            data[at] = rng.integers(256)
        path.write_bytes(data)
        for act in (check_image, open_image):
            try:
                act(path)
            except WorkloadError as error:
                assert "\n" not in str(error)  # noqa: PT017


def test_good_images_pass_the_check_and_stay_closed(tmp_path: Path) -> None:
    for suffix in pictures.SUFFIXES:
        check_image(image_file(tmp_path / f"x{suffix}"))
        assert open_image(tmp_path / f"x{suffix}").size == (12, 8)


def test_arrays_are_pictures() -> None:
    grey = ArrayPicture(np.array([[0, 255]], np.uint8)).open()
    assert (grey.mode, grey.getpixel((1, 0))) == ("RGB", WHITE)
    assert ArrayPicture(np.array([[RED, BLUE]], np.uint8)).open().getpixel((1, 0)) == BLUE


def decoded(data: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_what_is_shown_is_small() -> None:
    tiny_one = Image.new("RGB", (28, 28), BLUE)
    sent = shown(tiny_one)
    assert (sent["mime"], sent["width"], sent["height"]) == ("image/png", 28, 28)
    assert np.array_equal(np.asarray(decoded(sent["data"])), np.asarray(tiny_one))
    large = Image.new("RGB", (1000, 500), RED)
    sent = shown(large)
    assert (sent["mime"], sent["width"], sent["height"]) == ("image/jpeg", 1000, 500)
    assert decoded(sent["data"]).size == (384, 192)
    assert decoded(sent["data"]).format == "JPEG"
    assert large.size == (1000, 500), "the image itself was shrunk"


def test_maps_as_png() -> None:
    found = decoded(as_png(np.array([[0.0, 0.5, 1.0], [-3.0, 7.0, 0.25]])))
    assert np.asarray(found).tolist() == [[0, 128, 255], [0, 255, 64]]
