"""Short clips of moving coloured shapes, drawn from a seed and written as real mp4 files.

A **count** clip shows 1 to 6 shapes at once, each moving within a cell of its own, so that none
ever hides another. An **order** clip shows three shapes of different colours one after another; a
**marked** clip is one with a number on each. A **change** clip shows one shape that keeps its
colour or changes it, a **progress** clip one that moves to the right, and perhaps back. A
**stream** clip shows four shapes of different colours, two frames each; a **steps** clip likewise,
of three colours that may come again. A clip is by a flat spec (`clip_spec`), which knows the truth
that questions are asked about; drawing needs nothing else.
"""

import os

import av
import numpy as np
from PIL import Image

SIZE = 56  # pixels, square: 2 x 2 visual tokens a pair of frames (patches of 14, merged 2 x 2)
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
KINDS = ("count", "order", "marked", "change", "progress", "stream", "steps")
STREAM_LENGTH = 4
STREAM_STAY = [NUM_FRAMES // STREAM_LENGTH] * STREAM_LENGTH
TURN = NUM_FRAMES // 2  # the first frame of a progress clip's second leg
DIGITS = {  # 3 x 5, drawn twice as large: a mark of 6 x 10 pixels
    1: ("010", "110", "010", "010", "111"),
    2: ("111", "001", "111", "100", "111"),
    3: ("111", "001", "111", "001", "111"),
    4: ("101", "101", "111", "001", "001"),
}


def clip_spec(kind: str, key: list[int]) -> dict:
    """Describe one clip. `key`: non-negative integers (world seed, split, number, ...); same key,
    same clip.

    Returns `{"kind", "colours": [name, ...], "shapes": [shape, ...]}`: the colours in drawing order
    (for an order clip that is the order of appearance; for a count clip their number is the truth),
    and for each shape a dict of `form, colour, radius, start, end` (centres in pixels, y then x)
    and `first, last` (frame numbers, last excluded); with marks `mark` (1 to 4). A progress clip
    adds `percent`: how far the shape is at its turn, and at the end; a steps clip `palette`: the
    three colours.
    """
    rng = np.random.default_rng([KINDS.index(kind), *key])
    return _SPECS[kind](rng)


def _count_spec(rng: np.random.Generator) -> dict:
    count = int(rng.integers(1, MAX_COUNT + 1))
    cell = SIZE / 3
    shapes = []
    for place in rng.permutation(9)[:count]:
        radius = float(rng.uniform(5.0, 6.5))
        corner = np.array([place // 3, place % 3]) * cell
        start, end = corner + rng.uniform(radius + 1, cell - radius - 1, size=(2, 2))
        shapes.append(
            _shape(rng, str(rng.choice(list(COLOURS))), radius, start, end, 0, NUM_FRAMES)
        )
    return {"kind": "count", "colours": [shape["colour"] for shape in shapes], "shapes": shapes}


def _order_spec(rng: np.random.Generator) -> dict:
    colours = [str(name) for name in rng.permutation(list(COLOURS))[:ORDER_LENGTH]]
    # Every shape stays for two frames at least; the two spare frames go to any of them.
    stay = np.full(ORDER_LENGTH, 2)
    np.add.at(stay, rng.integers(0, ORDER_LENGTH, size=NUM_FRAMES - 2 * ORDER_LENGTH), 1)
    return _one_by_one("order", colours, stay.tolist(), rng)


def _stream_spec(rng: np.random.Generator) -> dict:
    colours = [str(name) for name in rng.permutation(list(COLOURS))[:STREAM_LENGTH]]
    return _one_by_one("stream", colours, STREAM_STAY, rng)


def _steps_spec(rng: np.random.Generator) -> dict:
    palette = [str(name) for name in rng.permutation(list(COLOURS))[:3]]
    colours = [str(name) for name in rng.choice(palette, STREAM_LENGTH)]
    return {**_one_by_one("steps", colours, STREAM_STAY, rng), "palette": palette}


def _one_by_one(
    kind: str, colours: list[str], stay: list[int], rng: np.random.Generator
) -> dict:
    """`stay`: for how many frames each is there."""
    shapes, first = [], 0
    for colour, frames in zip(colours, stay, strict=True):
        radius = float(rng.uniform(9.0, 13.0))
        start, end = rng.uniform(radius, SIZE - radius, size=(2, 2))
        shapes.append(_shape(rng, colour, radius, start, end, first, first + frames))
        first += frames
    return {"kind": kind, "colours": colours, "shapes": shapes}


def _marked_spec(rng: np.random.Generator) -> dict:
    spec = _order_spec(rng)
    for shape, mark in zip(spec["shapes"], rng.permutation(list(DIGITS)), strict=False):
        shape["mark"] = int(mark)
        if shape["form"] == "triangle":  # too narrow at its point
            shape["form"] = "square"
    return {**spec, "kind": "marked"}


def _change_spec(rng: np.random.Generator) -> dict:
    """One shape on one way, the second half of it in another colour in every other clip."""
    before, after = (str(name) for name in rng.permutation(list(COLOURS))[:2])
    colours = [before, after if rng.random() < 0.5 else before]
    radius = float(rng.uniform(9.0, 13.0))
    start, end = rng.uniform(radius, SIZE - radius, size=(2, 2))
    turn = int(rng.integers(3, NUM_FRAMES - 2))
    middle = [start + (end - start) * frame / (NUM_FRAMES - 1) for frame in (turn - 1, turn)]
    first = _shape(rng, colours[0], radius, start, middle[0], 0, turn)
    second = _shape(rng, colours[1], radius, middle[1], end, turn, NUM_FRAMES)
    return {
        "kind": "change",
        "colours": colours,
        "shapes": [first, {**second, "form": first["form"]}],
    }


def _progress_spec(rng: np.random.Generator) -> dict:
    """A shape on its way from the left edge (0) to the right one (100 percent), in two legs, the
    second perhaps back."""
    radius = 8.0
    percent = [int(rng.integers(1, 11)) * 10, int(rng.integers(0, 11)) * 10]
    y, colour = rng.uniform(radius, SIZE - radius), str(rng.choice(list(COLOURS)))
    points = [np.array([y, radius + share / 100 * (SIZE - 2 * radius)]) for share in (0, *percent)]
    first = _shape(rng, colour, radius, points[0], points[1], 0, TURN)
    second = _shape(rng, colour, radius, points[1], points[2], TURN, NUM_FRAMES)
    shapes = [first, {**second, "form": first["form"]}]
    return {"kind": "progress", "colours": [colour], "percent": percent, "shapes": shapes}


_SPECS = {
    "count": _count_spec,
    "order": _order_spec,
    "marked": _marked_spec,
    "change": _change_spec,
    "progress": _progress_spec,
    "stream": _stream_spec,
    "steps": _steps_spec,
}


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
            if "mark" in shape:
                digit = np.kron(
                    np.array([list(map(int, line)) for line in DIGITS[shape["mark"]]]),
                    np.ones((2, 2)),
                )
                top, left = (centre - (5, 3)).round().astype(int)
                frames[frame][top : top + 10, left : left + 6][digit == 1] = BACKGROUND
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
    """Write uint8 RGB frames (T, H, W, 3), H and W even, as H.264 in mp4 at FPS. Same frames, same
    bytes."""
    with av.open(os.fspath(path), "w", format="mp4") as container:
        # One encoder thread: the bits do not depend on the machine's number of cores.
        stream = container.add_stream(
            "libx264", rate=FPS, options={"crf": "12", "preset": "veryfast", "threads": "1"}
        )
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def make_clip(
    path: str | os.PathLike,
    kind: str,
    key: list[int],
    shown: list[int] | None = None,
    hold: int = 1,
) -> dict:
    """Draw and write the clip of `key`, or the frames of these numbers: as a clip, each `hold` times,
    or, as a PNG, side by side; return its spec."""
    spec = clip_spec(kind, key)
    frames = draw_clip(spec)
    if os.fspath(path).endswith(".mp4"):
        write_clip(path, (frames if shown is None else frames[shown]).repeat(hold, axis=0))
    else:
        Image.fromarray(np.concatenate(list(frames[shown]), axis=1)).save(path)
    return spec
