"""Aravis against its simulated GigE Vision camera."""

from __future__ import annotations

import pytest

from tests.edge import gige_camera
from tests.edge.gige_camera import URI, in_namespace


@pytest.fixture(autouse=True)
def _camera() -> None:
    if reason := gige_camera.missing():
        pytest.skip(f"{reason}; .ci/run lists the Debian packages")


def test_ids_and_times_are_kept_and_the_16_bits_of_the_id_wrap_without_a_loss() -> None:
    # The simulated camera counts from 65400 on: the wrap comes after some 135 frames.
    uri = f"{URI}?roi=256x64+8+4&fps=200&exposure_us=100&pixel_format=BayerRG8&part_id=frame&buffers=64"
    outcome = in_namespace("frames", uri, "200")
    frame_ids, camera_ids, times_ns, part_ids, shapes, faults = zip(*outcome["frames"], strict=True)
    lost = outcome["counters"]["lost"]
    assert camera_ids[0] < 0xFFFF < camera_ids[-1], "the wrap was not reached"
    # On a busy machine frames can be lost; both ids must tell so, alike.
    assert [camera_id - camera_ids[0] for camera_id in camera_ids] == list(frame_ids)
    assert lost < 20
    assert frame_ids[-1] <= 199 + lost + 64
    assert list(times_ns) == sorted(set(times_ns))
    assert part_ids == tuple(str(camera_id) for camera_id in camera_ids)
    assert {tuple(shape) for shape, fault in zip(shapes, faults, strict=True) if fault is None} == {(64, 256, 3)}
    assert not outcome["triggered"]


def test_software_trigger_makes_the_rate() -> None:
    outcome = in_namespace("frames", f"{URI}?trigger=software&trigger_rate_hz=10", "12")
    times_ns = [frame[2] for frame in outcome["frames"]]
    # Without the trigger the camera makes 25 a second.
    assert (times_ns[-1] - times_ns[0]) / 1e9 > 0.9 * 11 / 10


def test_options_are_checked_against_the_camera() -> None:
    cases = {
        "gain_db=1": ("UsageError", "no Gain in dB"),
        "feature.GainRaw=11": ("UsageError", "GainRaw must be a whole number from 0 to 10; got '11'"),
        "feature.Gainraw=3": ("UsageError", "did you mean 'GainRaw'?"),
        "feature.DeviceVendorName=x": ("UsageError", "cannot be set"),
        "feature.PixelFormat=Mono16": ("UsageError", "choose pixel_format=Mono8"),
        "feature.TriggerMode=on": ("UsageError", "TriggerMode must be one of Off, On; got 'on'"),
        "feature.TestBoolean=perhaps": ("UsageError", "must be true or false"),
        "feature.TriggerSoftware=1": ("UsageError", "must be execute"),
        "trigger=hardware&trigger_source=Line9": ("UsageError", "TriggerSource must be one of Line0, Software"),
        "pixel_format=Mono8&packet_size=1400&feature.TestBoolean=true&trigger=hardware&trigger_source=Line0": (
            "opened",
            "",
        ),
    }
    outcome = in_namespace("refusals", *(f"{URI}?{query}" for query in cases), "aravis:GV07", "aravis:other")
    for (query, (kind, message)), (got_kind, got_message) in zip(cases.items(), outcome, strict=False):
        assert got_kind == kind, (query, got_message)
        assert message in got_message, query
    # By its serial number, and one that is not there.
    assert outcome[-2][0] == "opened"
    assert outcome[-1][0] == "SourceError"
    assert "Aravis sees Aravis-Fake-GV07" in outcome[-1][1]


def test_a_camera_that_dies_is_noticed_within_a_second_and_runs_again_within_two_of_its_return() -> None:
    # A busy machine may need another try; broken code needs more than three.
    for _ in range(3):
        outcome = in_namespace("killed")
        assert "delivered nothing" in outcome["message"]
        if outcome["noticed_s"] < 1.0 and outcome["closed_s"] < 2.5 and outcome["running_s"] < 2.0:
            return
    pytest.fail(str(outcome))


@pytest.mark.parametrize("times", [10, pytest.param(100, marks=pytest.mark.soak)])
def test_reopening_leaves_nothing_behind(times: int) -> None:
    assert in_namespace("reopened", str(times), timeout_s=10.0 * times + 60) == "nothing stays behind"


def test_the_cameras_command_lists_it() -> None:
    (found,) = (search for search in in_namespace("listed") if search["where"] == "Aravis")
    assert [camera["uri"] for camera in found["cameras"]] == [URI]
