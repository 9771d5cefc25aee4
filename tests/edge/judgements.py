"""Judgements for the tests of outputs."""

from __future__ import annotations

import time

import numpy as np

from recontrast_edge.frame import Frame, Judgement, Region, SourceState, StateChange, WebSpan


def rejected(frame_id: int = 0, *, height: int = 96, width: int = 128, **more) -> Judgement:
    image = np.full((height, width, 3), (90, 110, 130), np.uint8)
    anomaly_map = np.full((32, 32), 0.1, np.float32)
    anomaly_map[8:16, 4:12] = 1.6
    region = Region(16, 24, 32, 24, 768, 1.6)
    frame = Frame(frame_id, "test", image, time.monotonic(), truth="defect", **more)
    latency_ms = {"total": 12.345678}
    return Judgement(frame, "REJECT", 1.6, 1.0, (region,), anomaly_map, latency_ms, decided_s=time.monotonic())


def passed(frame_id: int = 0, **more) -> Judgement:
    frame = Frame(frame_id, "test", np.full((96, 128), 100, np.uint8), time.monotonic(), **more)
    anomaly_map = np.full((32, 32), 0.2, np.float32)
    return Judgement(frame, "PASS", 0.2, 1.0, map=anomaly_map, latency_ms={"total": 1.0}, decided_s=time.monotonic())


def faulty(frame_id: int = 0, **more) -> Judgement:
    frame = Frame(frame_id, "test", None, time.monotonic(), fault="unreadable_image", **more)
    return Judgement(frame, "FAULT", None, 1.0, fault="unreadable_image", detail="cut off", decided_s=time.monotonic())


def on_a_web(frame_id: int = 0) -> Judgement:
    return rejected(frame_id, web=WebSpan(first_line=5000, lines=96, line_pitch_mm=0.1))


def state(value: str, *, camera: str | None = None, fault: str | None = None) -> StateChange:
    detail = "no frame for 1.0 s" if fault else None
    return StateChange(camera, "test", SourceState.CONNECTING, SourceState(value), time.monotonic(), fault, detail)
