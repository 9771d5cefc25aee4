"""``preprocess.cu``, its own source on the host, against ``preprocess.preprocess``."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from recontrast_edge.errors import InputError
from recontrast_edge.kernels import PreprocessPlan
from recontrast_edge.preprocess import YuvStandard, nv12_to_bgr, preprocess
from recontrast_edge.spec import InputSpec, Roi
from tests.kernels.host import Host

BOUND = {np.float32: 1e-5, np.float16: 2e-3}


def make_spec(**changes: Any) -> InputSpec:
    options: dict[str, Any] = {
        "size_wh": (32, 24),
        "resize_wh": (36, 29),
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
    } | changes
    return InputSpec(**options)


def with_pitch(rows: NDArray[np.uint8], pitch: int) -> NDArray[np.uint8]:
    """The same (H, W) or (H, W, 3) rows, ``pitch`` bytes apart; what lies between must not matter."""
    row_bytes = rows[0].size
    memory = np.full((rows.shape[0], pitch), 255, np.uint8)
    memory[:, :row_bytes] = rows.reshape(rows.shape[0], -1)
    return memory[:, :row_bytes]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_frame_becomes_the_oracles_input(host: Host, data: st.DataObject) -> None:
    width = data.draw(st.integers(2, 130), "width")
    height = data.draw(st.integers(2, 90), "height")
    pixel_format = data.draw(st.sampled_from(["bgr8", "rgb8", "mono8", "nv12"]), "pixel_format")
    if pixel_format == "nv12":
        width, height = 2 * (width // 2), 2 * (height // 2)
    roi = None
    if data.draw(st.booleans(), "with_roi"):
        x, y = data.draw(st.integers(0, width - 1), "x"), data.draw(st.integers(0, height - 1), "y")
        roi = Roi(
            x=x,
            y=y,
            width=data.draw(st.integers(1, width - x), "roi_width"),
            height=data.draw(st.integers(1, height - y), "roi_height"),
        )
    resize_wh = (data.draw(st.integers(5, 70), "resize_width"), data.draw(st.integers(5, 40), "resize_height"))
    spec = make_spec(
        resize_wh=resize_wh,
        size_wh=(
            data.draw(st.integers(1, resize_wh[0]), "out_width"),
            data.draw(st.integers(1, resize_wh[1]), "out_height"),
        ),
        colour=data.draw(st.sampled_from(["rgb", "bgr"]), "colour"),
        roi=roi,
    )
    dtype = data.draw(st.sampled_from([np.float16, np.float32]), "dtype")
    plan = PreprocessPlan(spec, (width, height), pixel_format, dtype=dtype)
    padding = data.draw(st.integers(0, 5), "padding")
    rng = np.random.default_rng(data.draw(st.integers(0, 99), "seed"))
    chroma = None
    if pixel_format == "nv12":
        frame = rng.integers(0, 256, (height * 3 // 2, width), dtype=np.uint8)
        image = nv12_to_bgr(frame)
        source = with_pitch(frame[:height], width + padding)
        chroma = with_pitch(frame[height:], width + 2 * padding)
    else:
        image = rng.integers(0, 256, (height, width) if pixel_format == "mono8" else (height, width, 3), dtype=np.uint8)
        memory = image[:, :, ::-1] if pixel_format == "rgb8" else image
        source = with_pitch(np.ascontiguousarray(memory), image[0].size + padding)
    out = host.preprocess(source, plan, chroma=chroma)
    assert out.dtype == dtype
    assert np.abs(out - preprocess(image, spec)).max() <= BOUND[dtype]


@pytest.mark.parametrize(("pitch", "shift"), [(300, 0), (301, 0), (304, 0), (304, 1)])
def test_word_loads_only_where_rows_are_aligned(host: Host, pitch: int, shift: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8)
    memory = np.zeros(60 * pitch + shift, np.uint8)[shift:].reshape(60, pitch)
    memory[:, :300] = image.reshape(60, 300)
    source = memory[:, :300]
    plan = PreprocessPlan(make_spec(), (100, 60), "bgr8", dtype=np.float32)
    params = plan.params(source_pointer=source.ctypes.data, source_pitch=pitch, out_pointer=4, constants_pointer=16)
    assert params.word_loads == (pitch % 4 == 0 and shift == 0)
    assert np.abs(host.preprocess(source, plan) - preprocess(image, make_spec())).max() <= BOUND[np.float32]


@pytest.mark.parametrize("pixel_format", ["bgr8", "mono8"])
def test_a_camera_frame_much_larger_than_the_network(host: Host, pixel_format: Any) -> None:
    shape = (600, 1900, 3) if pixel_format == "bgr8" else (600, 1900)
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    spec = make_spec(size_wh=(64, 48), resize_wh=(64, 48))
    plan = PreprocessPlan(spec, (1900, 600), pixel_format, dtype=np.float32)
    assert np.abs(host.preprocess(image, plan) - preprocess(image, spec)).max() <= BOUND[np.float32]


@pytest.mark.parametrize("standard", ["bt601", "bt709"])
def test_nv12_takes_the_matrix_it_is_told(host: Host, standard: YuvStandard) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (48, 40), dtype=np.uint8)
    spec = make_spec(size_wh=(40, 32), resize_wh=(40, 32))
    plan = PreprocessPlan(spec, (40, 32), "nv12", dtype=np.float32, yuv=standard)
    out = host.preprocess(frame[:32], plan, chroma=frame[32:])
    assert np.abs(out - preprocess(nv12_to_bgr(frame, standard), spec)).max() <= 1e-6


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_nv12_with_rows_longer_than_the_picture(host: Host, dtype: type) -> None:
    """As the ISP of a Jetson hands them over; the chroma's pitch need not be the luma's."""
    frame = np.random.default_rng(0).integers(0, 256, (90, 100), dtype=np.uint8)
    spec = make_spec(size_wh=(32, 32), resize_wh=(48, 40), roi=Roi(x=7, y=5, width=71, height=49))
    plan = PreprocessPlan(spec, (100, 60), "nv12", dtype=dtype)
    out = host.preprocess(with_pitch(frame[:60], 128), plan, chroma=with_pitch(frame[60:], 101))
    assert np.abs(out - preprocess(nv12_to_bgr(frame), spec)).max() <= BOUND[dtype]


def test_nv12_oracle_is_bt601_as_opencv_has_it() -> None:
    frame = np.random.default_rng(0).integers(16, 236, (48, 40), dtype=np.uint8)
    theirs = cv2.cvtColor(frame, cv2.COLOR_YUV2BGR_NV12)
    assert np.abs(nv12_to_bgr(frame).astype(int) - theirs).max() <= 1


@pytest.mark.parametrize("standard", ["bt601", "bt709"])
def test_nv12_oracle_keeps_greys_and_primaries(standard: YuvStandard) -> None:
    def colour(y: int, u: int, v: int) -> list[int]:
        frame = np.array([[y, y], [y, y], [u, v]], np.uint8)
        return [int(value) for value in nv12_to_bgr(frame, standard)[0, 0]]

    assert colour(16, 128, 128) == [0, 0, 0]
    assert colour(235, 128, 128) == [255, 255, 255]
    assert colour(0, 0, 0) == [0, max(0, colour(0, 0, 0)[1]), 0]
    red = {"bt601": (81, 90, 240), "bt709": (63, 102, 240)}[standard]
    assert np.abs(np.array(colour(*red)) - [0, 0, 255]).max() <= 2


@pytest.mark.parametrize("shape", [(48,), (47, 40), (48, 41), (0, 40), (48, 40, 1)])
def test_nv12_oracle_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="NV12"):
        nv12_to_bgr(np.zeros(shape, np.uint8))
    with pytest.raises(InputError, match="NV12"):
        nv12_to_bgr(np.zeros((48, 40), np.uint16))  # type: ignore[arg-type]
