"""Images, and files that are none."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from veripo_trl.media.images import load_image
from veripo_trl.media.video import MediaError


def test_images(tmp_path):
    picture = Image.new("RGB", (60, 30), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg", row_id="q1").size == (30, 60)
    for mode, color in (("RGBA", (0, 0, 0, 0)), ("LA", (0, 0)), ("L", 255), ("1", 1), ("I;16", 65535)):
        Image.new(mode, (4, 4), color).save(tmp_path / "picture.png")
        image = load_image(tmp_path / "picture.png", row_id="q1")
        assert (image.mode, image.getpixel((0, 0))) == ("RGB", (255, 255, 255)), mode
    depth = Image.fromarray(np.uint16([[0, 257, 300, 25700, 65535]]))
    for options in ({}, {"transparency": 0}, {"transparency": 300}):
        depth.save(tmp_path / "depth.png", **options)
        greys = [255 if value == options.get("transparency") else value // 257 for value in (0, 257, 300, 25700, 65535)]
        image = load_image(tmp_path / "depth.png", row_id="q1")
        assert [image.getpixel((x, 0)) for x in range(5)] == [(grey,) * 3 for grey in greys], options


def image_bomb(path, side=100_000):
    data = b"\x89PNG\r\n\x1a\n"
    for kind, chunk in (
        (b"IHDR", struct.pack(">II5B", side, side, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(9))),
    ):
        data += struct.pack(">I", len(chunk)) + kind + chunk + struct.pack(">I", zlib.crc32(kind + chunk))
    path.write_bytes(data)


def cut_image(path):
    Image.effect_noise((64, 64), 50).save(path, format="PNG")
    path.write_bytes(path.read_bytes()[:1000])


BAD_IMAGES = {
    "missing": (lambda path: None, "No such file"),
    "empty": (lambda path: path.write_bytes(b""), "empty file"),
    "text": (lambda path: path.write_text("no image"), "not an image"),
    "other format": (lambda path: Image.new("RGB", (4, 4)).save(path, format="TIFF"), "not an image"),
    "truncated": (cut_image, "cannot be decoded"),
    "bomb": (image_bomb, "decompression bomb"),
    "small bomb": (lambda path: image_bomb(path, 10_000), "over 89478485"),
    "strip": (lambda path: Image.new("RGB", (4000, 2)).save(path, format="PNG"), "aspect ratio"),
}


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images(tmp_path, name):
    write, message = BAD_IMAGES[name]
    write(tmp_path / "bad.png")
    with pytest.raises(MediaError, match=message) as error:
        load_image(tmp_path / "bad.png", row_id="row-7")
    assert "'row-7'" in str(error.value) and "bad.png" in str(error.value)
