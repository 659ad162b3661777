"""M-RoPE positions against values worked out by hand from the trained rule."""

from types import SimpleNamespace

import pytest

from veripo_trl.model.positions import mrope_positions

IMAGE, VIDEO, START, END = 100, 101, 102, 103


def config(tokens_per_second=None):
    vision = SimpleNamespace(spatial_merge_size=2)
    if tokens_per_second is not None:
        vision.tokens_per_second = tokens_per_second
    return SimpleNamespace(vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO)


def positions(ids, *, images=None, videos=None, seconds=None, tokens_per_second=2):
    return mrope_positions(
        ids, image_grid_thw=images, video_grid_thw=videos, second_per_grid_ts=seconds, config=config(tokens_per_second)
    ).tolist()


def test_text_counts_up_in_all_axes():
    assert positions([1, 2, 3]) == [[0, 1, 2]] * 3


def test_video_at_two_fps():
    # 2 fps and 2 frames per step: 1 s per step, times 2 tokens per second: steps of 2. The grid is 2×2 after merging.
    ids = [1, START, *[VIDEO] * 12, END, 2]
    assert positions(ids, videos=[[3, 4, 4]], seconds=[1.0]) == [
        [0, 1, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6, 7, 8],
        [0, 1, 2, 2, 3, 3, 2, 2, 3, 3, 2, 2, 3, 3, 7, 8],
        [0, 1, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 7, 8],
    ]


def test_video_at_three_fps_floors_its_times():
    # 2/3 s per step times 2 tokens per second: 0, 1.33, 2.67, 4.0 → 0, 1, 2, 4. The grid is 1×2 after merging.
    ids = [START, *[VIDEO] * 8, END]
    assert positions(ids, videos=[[4, 2, 4]], seconds=[2 / 3]) == [
        [0, 1, 1, 2, 2, 3, 3, 5, 5, 6],
        [0, 1, 1, 1, 1, 1, 1, 1, 1, 6],
        [0, 1, 2, 1, 2, 1, 2, 1, 2, 6],
    ]


def test_text_starts_after_the_last_time_of_a_long_clip():
    # 10 steps of 2 on a grid one cell wide: the block ends at 1 + 18, so the text goes on at 20, not at 1 + 1 = 2.
    ids = [START, *[VIDEO] * 10, END, 5]
    time, height, width = positions(ids, videos=[[10, 2, 2]], seconds=[1.0])
    assert time == [0, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 20, 21]
    assert height == width == [0, *[1] * 10, 20, 21]


def test_text_starts_after_the_width_of_a_short_wide_clip():
    ids = [START, *[VIDEO] * 5, END]
    time, height, width = positions(ids, videos=[[1, 2, 10]], seconds=[1.0])
    assert time == height == [0, 1, 1, 1, 1, 1, 6]
    assert width == [0, 1, 2, 3, 4, 5, 6]


def test_two_videos_keep_their_own_times():
    ids = [START, *[VIDEO] * 2, END, START, *[VIDEO] * 3, END, 7]
    time, height, width = positions(ids, videos=[[2, 2, 2], [3, 2, 2]], seconds=[0.5, 2.0])
    # First block at 1 with steps of 1: 1, 2. Then END at 3, START at 4, second block at 5 with steps of 4: 5, 9, 13.
    assert time == [0, 1, 2, 3, 4, 5, 9, 13, 14, 15]
    assert height == width == [0, 1, 1, 3, 4, 5, 5, 5, 14, 15]


def test_video_then_image():
    ids = [START, *[VIDEO] * 2, END, START, *[IMAGE] * 4, END]
    time, height, width = positions(ids, videos=[[2, 2, 2]], images=[[1, 4, 4]], seconds=[1.0])
    # Block at 1 with times 1 and 3; END 4, START 5, image at 6 without time; END at 8.
    assert time == [0, 1, 3, 4, 5, 6, 6, 6, 6, 8]
    assert height == [0, 1, 1, 4, 5, 6, 6, 7, 7, 8]
    assert width == [0, 1, 1, 4, 5, 6, 7, 6, 7, 8]


def test_qwen3_vl_frames_are_blocks_of_their_own():
    # Two steps of a 2×2 grid, each behind two tokens of timestamp; no temporal extent.
    ids = [9, START, *[VIDEO] * 4, END, 9, START, *[VIDEO] * 4, END]
    time, height, width = positions(ids, videos=[[2, 4, 4]], tokens_per_second=None)
    assert time == [0, 1, 2, 2, 2, 2, 4, 5, 6, 7, 7, 7, 7, 9]
    assert height == [0, 1, 2, 2, 3, 3, 4, 5, 6, 7, 7, 8, 8, 9]
    assert width == [0, 1, 2, 3, 2, 3, 4, 5, 6, 7, 8, 7, 8, 9]


@pytest.mark.parametrize(
    ("ids", "grids", "message"),
    [
        ([START, *[VIDEO] * 3, END], [[1, 4, 4]], "ends at 4, its grids end at 5"),
        ([START, *[VIDEO] * 5, END], [[1, 4, 4]], "ends at 6, its grids end at 5"),
        ([START, END], [[1, 4, 4]], "lacks the tokens"),
        ([START, VIDEO, END], None, "ends at 2, its grids end at 1"),
    ],
)
def test_tokens_and_grids_that_differ_are_refused(ids, grids, message):
    with pytest.raises(ValueError, match=message):
        positions(ids, videos=grids, seconds=None if grids is None else [1.0])
