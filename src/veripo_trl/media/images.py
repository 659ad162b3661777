"""Image files to upright RGB."""

import os
import struct
import zlib

import numpy as np

from veripo_trl.media.containers import BadFile, check_file, open_media
from veripo_trl.media.video import MediaError

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)  # what Pillow's decoders raise
MAX_ASPECT_RATIO = 200  # qwen-vl-utils' and the processors' own bound
MAX_IMAGE_PIXELS = 89_478_485  # Pillow's own bound for a decompression bomb


def load_image(path, *, row_id, name=None):
    """The image at `path` as an RGB PIL.Image, upright by its EXIF, transparency on white.

    Raises MediaError that names `row_id` and `name` or the file.
    """
    try:
        return read_image(os.path.realpath(path))
    except BadFile as error:
        raise MediaError(f"row {row_id!r}, image {os.fspath(name or path)!r}: {error}") from None


def read_image(path):
    from PIL import Image, ImageOps, UnidentifiedImageError

    check_file(path)
    try:
        with open_media(path) as file, Image.open(file, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise BadFile(f"{image.width} x {image.height} pixels, over {MAX_IMAGE_PIXELS}; make it smaller")
            image = ImageOps.exif_transpose(image)
            if image.mode[0] == "I":  # 16 bits of grey: Pillow's conversion makes all above 255 white
                clear = image.info.pop("transparency", None)
                values = np.asarray(image)
                image = Image.fromarray((values // 257).astype(np.uint8))
                if clear is not None:
                    image.putalpha(Image.fromarray(np.uint8(values != clear) * 255))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            if max(image.size) > MAX_ASPECT_RATIO * min(image.size):  # processors refuse it, without the row's id
                sides = f"{image.width} x {image.height} pixels"
                raise BadFile(f"aspect ratio over {MAX_ASPECT_RATIO} ({sides}); crop the image or leave the row out")
            return image.convert("RGB")
    except UnidentifiedImageError:
        raise BadFile(f"is not an image; expected {', '.join(IMAGE_FORMATS)} by its content") from None
    except (*IMAGE_ERRORS, Image.DecompressionBombError) as error:
        raise BadFile(f"cannot be decoded ({error}); convert the file or leave the row out") from None
