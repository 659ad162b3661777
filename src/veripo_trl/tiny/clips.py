"""Short clips of moving coloured shapes, drawn from a seed and written as real mp4 files.

Two kinds. A **count** clip shows 1 to 6 shapes at once, each moving within a cell of its own, so that none ever hides
another. An **order** clip shows three shapes of different colours one after another. A clip is described by a flat
spec (`clip_spec`), which knows the truth that questions are asked about; drawing needs nothing else.
"""

import os

import av
import numpy as np

SIZE = 56  # pixels, square: 2 x 2 visual tokens per pair of frames for a 14-pixel patch merged 2 x 2
NUM_FRAMES = 8
FPS = 2
MAX_COUNT = 6
ORDER_LENGTH = 3
BACKGROUND = (16, 16, 16)
COLOURS = {
    "red": (230, 30, 30),
    "green": (30, 190, 30),
    "blue": (40, 60, 235),
    "yellow": (235, 225, 30),
    "purple": (190, 40, 200),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "diamond", "triangle")
KINDS = ("count", "order")


def clip_spec(kind: str, key: list[int]) -> dict:
    """Describe one clip. `key`: non-negative integers (world seed, split, number, ...); same key, same clip.

    Returns `{"kind", "colours": [name, ...], "shapes": [shape, ...]}`: the colours in drawing order (for an order clip
    that is the order of appearance; for a count clip their number is the truth), and for each shape a dict of
    `form, colour, radius, start, end` (centres in pixels, y then x) and `first, last` (frame numbers, last excluded).
    """
    rng = np.random.default_rng([KINDS.index(kind), *key])
    if kind == "count":
        return _count_spec(rng)
    return _order_spec(rng)


def _count_spec(rng: np.random.Generator) -> dict:
    count = int(rng.integers(1, MAX_COUNT + 1))
    cell = SIZE / 3
    shapes = []
    for place in rng.permutation(9)[:count]:
        radius = float(rng.uniform(5.0, 6.5))
        corner = np.array([place // 3, place % 3]) * cell
        start, end = corner + rng.uniform(radius + 1, cell - radius - 1, size=(2, 2))
        shapes.append(_shape(rng, str(rng.choice(list(COLOURS))), radius, start, end, 0, NUM_FRAMES))
    return {"kind": "count", "colours": [shape["colour"] for shape in shapes], "shapes": shapes}


def _order_spec(rng: np.random.Generator) -> dict:
    colours = [str(name) for name in rng.permutation(list(COLOURS))[:ORDER_LENGTH]]
    # Every shape stays for two frames at least; the two spare frames go to any of them.
    stay = np.full(ORDER_LENGTH, 2)
    np.add.at(stay, rng.integers(0, ORDER_LENGTH, size=NUM_FRAMES - 2 * ORDER_LENGTH), 1)
    bounds = [0, *np.cumsum(stay).tolist()]
    shapes = []
    for number, colour in enumerate(colours):
        radius = float(rng.uniform(9.0, 13.0))
        start, end = rng.uniform(radius, SIZE - radius, size=(2, 2))
        shapes.append(_shape(rng, colour, radius, start, end, bounds[number], bounds[number + 1]))
    return {"kind": "order", "colours": colours, "shapes": shapes}


def _shape(rng, colour, radius, start, end, first, last) -> dict:
    return {
        "form": str(rng.choice(SHAPES)),
        "colour": colour,
        "radius": radius,
        "start": start.tolist(),
        "end": end.tolist(),
        "first": first,
        "last": last,
    }


def draw_clip(spec: dict) -> np.ndarray:
    """Draw a spec: uint8 RGB frames (NUM_FRAMES, SIZE, SIZE, 3)."""
    frames = np.empty((NUM_FRAMES, SIZE, SIZE, 3), dtype=np.uint8)
    frames[:] = BACKGROUND
    y, x = np.mgrid[0:SIZE, 0:SIZE] + 0.5
    for shape in spec["shapes"]:
        start, end = np.array(shape["start"]), np.array(shape["end"])
        for frame in range(shape["first"], shape["last"]):
            way = (frame - shape["first"]) / max(shape["last"] - shape["first"] - 1, 1)
            centre = start + way * (end - start)
            inside = _inside(shape["form"], y - centre[0], x - centre[1], shape["radius"])
            frames[frame][inside] = COLOURS[shape["colour"]]
    return frames


def _inside(form: str, dy: np.ndarray, dx: np.ndarray, radius: float) -> np.ndarray:
    if form == "circle":
        return dy**2 + dx**2 <= radius**2
    if form == "square":
        return np.maximum(np.abs(dy), np.abs(dx)) <= 0.85 * radius
    if form == "diamond":
        return np.abs(dy) + np.abs(dx) <= radius
    return (np.abs(dx) <= (dy + radius) / 2) & (dy <= 0.8 * radius)  # triangle, point up


def write_clip(path: str | os.PathLike, frames: np.ndarray) -> None:
    """Write uint8 RGB frames (T, H, W, 3), H and W even, as H.264 in mp4 at FPS. Same frames, same bytes."""
    with av.open(os.fspath(path), "w", format="mp4") as container:
        # One encoder thread: the bits do not depend on the machine's number of cores.
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "12", "preset": "veryfast", "threads": "1"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def make_clip(path: str | os.PathLike, kind: str, key: list[int]) -> dict:
    """Draw and write the clip of `key`; return its spec."""
    spec = clip_spec(kind, key)
    write_clip(path, draw_clip(spec))
    return spec
