from __future__ import annotations

import inspect
import os
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recontrast_edge.camera_plan import CameraPlan, Retry
from recontrast_edge.cli.run import run_command
from recontrast_edge.config import (
    CAMERA_OPTIONS,
    LINE_OPTIONS,
    MAX_BYTES,
    PRODUCT_OPTIONS,
    CameraConfig,
    LineConfig,
    PartsConfig,
    ProductConfig,
    example,
    load_config,
    option_name,
    tables,
)
from recontrast_edge.errors import InputError, ModelError, RecontrastError, UsageError
from recontrast_edge.frame import Frame
from recontrast_edge.health import Watch
from recontrast_edge.line_setup import _by_part_id, check_line, check_places, parts_merger
from recontrast_edge.onnxfile import SPEC_KEY, read_spec, replace_metadata
from recontrast_edge.pipeline import Line
from recontrast_edge.secrets import masked_uri
from recontrast_edge.uri_paths import anchored_output, anchored_source

_TEXTS = st.text(min_size=1).filter(lambda text: masked_uri(text) == text and "***" not in text)
PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
BASE = '[products.a]\nengine = "demo"\n[cameras.top]\nsource = "usb:0"\n'
TWO = BASE + '[cameras.side]\nsource = "usb:1"\n'


@pytest.fixture
def load(tmp_path: Path):
    """Write a file and load it."""

    def call(text: str, **options: object) -> LineConfig:
        path = tmp_path / "line.toml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, options)

    return call


def test_defaults_are_those_of_the_line(load) -> None:
    camera = load(BASE).cameras["top"]
    assert (camera.watch, camera.retry) == (Watch(), Retry())
    plan = {name: field.default for name, field in CameraPlan.__dataclass_fields__.items()}
    shared = CameraConfig.model_fields.keys() & plan.keys()
    assert {name: getattr(camera, name) for name in shared - {"source"}} == {name: plan[name] for name in shared}
    line = inspect.signature(Line).parameters
    for name in ("engine_timeout_s", "batch_wait_s", "max_frames"):
        assert LineConfig.model_fields[name].default == line[name].default


@pytest.mark.parametrize("name", Watch.__dataclass_fields__)
def test_ranges_of_the_watch_are_the_same_in_both_places(name: str) -> None:
    limits = {}
    for limit in CameraConfig.model_fields[name].metadata:
        limits |= {side: getattr(limit, side) for side in ("ge", "le") if hasattr(limit, side)}
    Watch(**{name: limits["ge"]})
    Watch(**{name: limits["le"]})
    for outside in (limits["ge"] - 1e-4, limits["le"] + (1 if limits["le"] > 1e3 else 1e-4)):
        with pytest.raises(UsageError, match=name):
            Watch(**{name: outside})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('outptus = ["jsonl:x"]\n' + BASE, "line.toml:1: outptus: unknown key; did you mean 'outputs'?"),
        (BASE + "\n# a comment\ngate_dealy_s = 1\n", ":7: cameras.top.gate_dealy_s: .*did you mean 'gate_delay_s'"),
        (BASE.replace("engine", "engin"), ":2: products.a.engin: unknown key; did you mean 'engine'"),
        (BASE + 'outputs = ["jsonl:x"]\n', ":5: .*outputs belongs at the top of the file, before the first"),
        ('source = "usb:0"\n' + BASE, r":1: .*source belongs in a table \[cameras.NAME\]"),
        (BASE + "xyzzy = 1", ":5: .*known: source, products"),
        (BASE + 'mode = "sometimes"\n', ':5: cameras.top.mode: expected "live" or "every", got "sometimes"'),
        (
            BASE + 'gate_delay_s = "soon"\n',
            ':5: cameras.top.gate_delay_s: expected a number from 0 to 86400, got "soon"',
        ),
        (BASE + "queue_frames = 0\n", "queue_frames: expected a whole number from 1 to 100000, got 0"),
        (BASE + "queue_frames = 1.5\n", "expected a whole number .*got 1.5"),
        (BASE + "queue_frames = true\n", "expected a whole number .*got true"),
        (BASE + "rate_hz = true\n", "expected a number .*got true"),
        (BASE + "dark_share = nan\n", "expected a number from 0 to 1, got nan"),
        (BASE + "rate_hz = 2026-03-01\n", "expected a number .*got 2026-03-01"),
        (BASE + 'wait_for_source = "yes"\n', 'expected true or false, got "yes"'),
        (BASE + "frozen_after = 1\n", ":5: cameras.top.frozen_after: expected 0 or at least 2"),
        (BASE + "first_retry_s = 10\n", ":5: cameras.top.first_retry_s: expected at most longest_retry_s, 1, got 10"),
        ('outputs = "jsonl:x"\n' + BASE, ":1: outputs: expected a list of texts"),
        ('outputs = [\n  "jsonl:x",\n  3,\n]\n' + BASE, r":1: outputs\[1\]: expected a text, got 3"),
        (
            "quiet = 1\n\n\nmax_frames = 0\n" + BASE,
            r":4: max_frames: .*got 0 \(and 1 more\)",
        ),
        ('outputs = ["jsonl:a", "jsonl:a"]\n' + BASE, r"outputs\[1\]: the same output is given twice"),
        ('[cameras.top]\nsource = "usb:0"\n', "line.toml: products is missing: what parts are judged by"),
        ('[products.a]\nengine = "demo"\n[cameras.top]\n', ":3: cameras.top: source is missing: URI or path"),
        ('cameras = 3\n[products.a]\nengine = "demo"\n', ":1: cameras: expected tables, got 3"),
        ('[products.a]\nengine = "demo"\n[cameras]\ntop = "usb:0"\n', ':4: cameras.top: expected a table, got "usb:0"'),
        ('[products."a/b"]\nengine = "demo"\n[cameras.top]\nsource = "usb:0"\n', ":1: products.a/b: a name is 1 to 64"),
        (BASE + 'products = ["b"]\n', r":5: cameras.top.products: 'b' is not in \[products\]; there are a"),
        (
            BASE + '[products.b]\nengine = "demo"\n',
            ":3: cameras.top: has 2 products, so each needs part_ids .*; a, b have",
        ),
        (BASE + '[products.b]\nengine = "demo"\npart_ids = "("\n', ":7: products.b.part_ids: expected a regular expr"),
        (TWO + '[parts]\ncameras = ["top", "sid"]\nwindow_s = 1\n', "'sid' is not in .*did you mean 'side'"),
        (TWO + '[parts]\ncameras = ["top", "top"]\nwindow_s = 1\n', "parts.cameras: 'top' is named twice"),
        (TWO + '[parts]\ncameras = ["top"]\nwindow_s = 1\n', "expected a list of 2 or more texts, got a list of 1"),
        (TWO + '[parts]\ncameras = ["top", "side"]\nwindow_s = 0\n', "window_s: expected a number above 0 up to 3600"),
        ("roots = []\n" + BASE, "roots: expected a list of 1 or more"),
        (BASE.replace("usb:0", "usb:0?lines=64&overlap=64"), ":4: cameras.top.source: .*overlap must be"),
        (BASE.replace("usb:0", "rtsp://u:se/cret@h/x"), ":4: cameras.top.source: .*percent-encode"),
    ],
)
def test_what_is_wrong_and_where(load, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(text)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"x =\n", r"is no TOML: .*line 1"),
        (b"x = " + b"[" * 100_000, "is no TOML"),
        (b"a = 1\n\xff\xfe", ":2: expected UTF-8"),
        (b"#" * (MAX_BYTES + 1), "larger than"),
    ],
)
def test_files_that_are_none(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "line.toml"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message):
        load_config(path, {})


def test_as_an_editor_on_windows_saves_it(tmp_path: Path) -> None:
    path = tmp_path / "line.toml"
    path.write_bytes(b"\xef\xbb\xbf" + BASE.replace("\n", "\r\n").encode())
    assert load_config(path, {}).cameras["top"].source == "usb:0"
    path.write_bytes(b"\xef\xbb\xbf" + BASE.replace("engine", "engin").replace("\n", "\r\n").encode())
    with pytest.raises(UsageError, match=r"line.toml:2: products.a.engin: unknown key"):
        load_config(path, {})


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "absent", tmp_path / "fifo"):
        with pytest.raises(InputError, match=str(path)):
            load_config(path, {})


class TestOptions:
    """Of the command line, beside a file or alone."""

    def test_they_win(self, load) -> None:
        config = load(TWO + 'mode = "live"\n', mode="every", wait_for_source=True, max_frames=5, engine="demo")
        assert {(camera.mode, camera.wait_for_source) for camera in config.cameras.values()} == {("every", True)}
        assert config.max_frames == 5

    def test_they_make_up_for_what_the_file_lacks(self, load) -> None:
        config = load('outputs = ["jsonl:-"]\n', engine="demo", source="usb:0", threshold=0.5)
        assert config.products == {"product": ProductConfig(engine="demo", threshold=0.5)}
        assert config.cameras["camera"].source == "usb:0"

    @pytest.mark.parametrize(("key", "value"), [("source", "usb:7"), ("engine", "demo"), ("threshold", 1.0)])
    def test_nobody_knows_which_one(self, load, key: str, value: object) -> None:
        text = TWO + '[products.b]\nengine = "demo"\n'
        with pytest.raises(UsageError, match=f"{option_name(key)}: .* has 2 (cameras|products) .*change it there"):
            load(text, **{key: value})

    def test_wrong_values_are_the_options_own(self, load) -> None:
        with pytest.raises(UsageError, match=r"^--queue-frames: expected a whole number from 1 to 100000, got -1$"):
            load(BASE, queue_frames=-1)
        with pytest.raises(UsageError, match=r"^--first-retry-s: expected at most longest_retry_s"):
            load_config(None, {"engine": "demo", "source": "usb:0", "first_retry_s": 5.0})

    @pytest.mark.parametrize("given", [{}, {"engine": "demo"}, {"source": "usb:0"}])
    def test_what_must_be_there(self, given: dict[str, str]) -> None:
        missing = [f"--{key}" for key in ("engine", "source") if key not in given]
        with pytest.raises(UsageError, match=f"^{' and '.join(missing)} missing: expected --engine and --source"):
            load_config(None, given)

    def test_every_key_of_one_camera_is_an_option_and_the_other_way_round(self) -> None:
        about_the_file = {"config", "check_config", "print_config", "example_config"}
        names = inspect.signature(run_command).parameters.keys() - about_the_file
        assert names == PRODUCT_OPTIONS | CAMERA_OPTIONS | LINE_OPTIONS
        only_of_several = {"products", "part_ids", "cameras", "parts"}
        keys = {*ProductConfig.model_fields, *CameraConfig.model_fields, *LineConfig.model_fields}
        assert keys - only_of_several == names

    def test_the_help_tells_the_defaults(self) -> None:
        models = (ProductConfig, CameraConfig, LineConfig)
        defaults = {key: field.default for model in models for key, field in model.model_fields.items()}
        for name, parameter in inspect.signature(run_command, eval_str=True).parameters.items():
            (option,) = parameter.annotation.__metadata__
            if isinstance(defaults.get(name), (int, float)) and not isinstance(defaults[name], bool):
                assert f"[default: {defaults[name]:g}]" in option.help, name


class TestPaths:
    @pytest.mark.parametrize(
        ("uri", "anchored"),
        [
            ("usb:0", "usb:0"),
            ("parts", "/f/parts"),
            ("../belt.mp4?loop=2", "/f/../belt.mp4?loop=2"),
            ("/abs/belt.mp4", "/abs/belt.mp4"),
            ("list:a.txt", "list:/f/a.txt"),
            ("watch:in?after=move:done", "watch:/f/in?after=move:done"),
            ("watch:/in", "watch:/in"),
            ("genicam:lib/x.cti#ID?fps=3", "genicam:/f/lib/x.cti#ID?fps=3"),
            ("genicam:x.cti#ID", "genicam:x.cti#ID"),
            ("gst:filesrc location=a ! decodebin", 'gst:filesrc location="/f/a" ! decodebin'),
            (
                r"gst:filesrc location = 'a b' ! tee name=t ! filesink location=c\ d.raw t. ! videoconvert",
                'gst:filesrc location = "/f/a b" ! tee name=t ! filesink location="/f/c d.raw" t. ! videoconvert',
            ),
            ("gst:rtspsrc location=rtsp://h/s ! decodebin", "gst:rtspsrc location=rtsp://h/s ! decodebin"),
            (
                "rtsps://h/s?credentials=file:pw&ca_file=ca.pem&a=1",
                "rtsps://h/s?credentials=file:/f/pw&ca_file=/f/ca.pem&a=1",
            ),
            ("rtsp://h/s?credentials=env:X", "rtsp://h/s?credentials=env:X"),
        ],
    )
    def test_of_a_source(self, uri: str, anchored: str) -> None:
        assert anchored_source(uri, Path("/f")) == anchored
        assert anchored_source(anchored, Path("/g")) == anchored

    @pytest.mark.parametrize(
        ("uri", "anchored"),
        [
            ("jsonl:-", "jsonl:-"),
            ("jsonl:r.jsonl?keep=3", "jsonl:/f/r.jsonl?keep=3"),
            ("images:/abs", "images:/abs"),
            ("video:a b.mp4", "video:/f/a b.mp4"),
            ("mqtts://h/t?ca=a%20b.pem&which=all", "mqtts://h/t?ca=/f/a%20b.pem&which=all"),
            ("mqtt://h/t?credentials=file:pw", "mqtt://h/t?credentials=file:/f/pw"),
            ("gpiochip:0/17", "gpiochip:0/17"),
        ],
    )
    def test_of_an_output(self, uri: str, anchored: str) -> None:
        assert anchored_output(uri, Path("/f")) == anchored
        assert anchored_output(anchored, Path("/g")) == anchored

    def test_a_folder_that_cannot_stand_in_a_uri(self) -> None:
        with pytest.raises(UsageError, match="question mark"):
            anchored_output("jsonl:a", Path("/what?"))

    def test_of_a_file_begin_at_its_folder_and_those_of_options_here(self, load, tmp_path: Path, monkeypatch) -> None:
        here = tmp_path / "here"
        here.mkdir()
        monkeypatch.chdir(here)
        text = 'outputs = ["jsonl:r.jsonl"]\nsummary = "s.json"\n' + BASE.replace("demo", "m.onnx")
        config = load(text, source="parts")
        assert config.outputs == (f"jsonl:{tmp_path}/r.jsonl",)
        assert (config.summary, config.roots) == (f"{tmp_path}/s.json", (str(tmp_path),))
        assert config.products["a"].engine == f"{tmp_path}/m.onnx"
        assert config.cameras["top"].source == f"{here}/parts"


class TestPrinted:
    def test_reads_back_to_the_same(self, load, tmp_path: Path) -> None:
        text = (
            'outputs = ["jsonl:r.jsonl?keep=3", "mqtt://h/t?credentials=env:X"]\nthreads = 2\n'
            + TWO.replace("usb:0", 'watch:in \\"x\\"?settle_s=1')
            + '[parts]\ncameras = ["top", "side"]\nwindow_s = 0.25\n'
        )
        config = load(text)
        printed = tmp_path / "elsewhere" / "printed.toml"
        printed.parent.mkdir()
        printed.write_text(config.dumps())
        assert load_config(printed, {}) == config

    @settings(max_examples=60, deadline=None)
    @given(
        st.fixed_dictionaries(
            {
                "engine": st.just("demo"),
                "source": _TEXTS,
            },
            optional={
                "mode": st.sampled_from(["live", "every"]),
                "threshold": st.floats(allow_nan=False, allow_infinity=False),
                "gate_delay_s": st.floats(0, 86_400),
                "max_frames": st.integers(1, 2**62),
                "quiet": st.booleans(),
                "outputs": st.lists(_TEXTS.map("jsonl:{}".format), unique=True, max_size=3),
            },
        )
    )
    def test_whatever_the_options(self, tmp_path_factory, options: dict[str, Any]) -> None:
        try:
            config = load_config(None, options).anchored(Path("/f"))
        except RecontrastError:
            return
        path = tmp_path_factory.getbasetemp() / "any.toml"
        path.write_text(config.dumps(), encoding="utf-8")
        assert load_config(path, {}) == config

    def test_a_masked_password_is_refused(self, load) -> None:
        config = load_config(None, {"engine": "demo", "source": "rtsp://u:canary@h/s"})
        assert "canary" not in config.dumps()
        assert "rtsp://u:***@h/s" in config.dumps()
        with pytest.raises(UsageError, match=r"cameras.camera.source: \*\*\* stands for a password that was masked"):
            load(config.dumps())


class TestProducts:
    @pytest.fixture
    def choose(self, load):
        text = '[products.a]\nengine = "demo"\npart_ids = "A-.*"\n[products.b]\nengine = "demo"\npart_ids = "[AB]-1"\n'
        config = load(text + '[cameras.top]\nsource = "usb:0"\n')
        return _by_part_id(config.products_of("top"))

    @pytest.mark.parametrize(
        ("part_id", "product"),
        [("A-7", "a"), ("B-1", "b"), ("A-1", None), ("B-17", None), ("xA-7", None), (None, None)],
    )
    def test_the_one_whose_pattern_matches(self, choose, part_id: str | None, product: str | None) -> None:
        assert choose(Frame(0, "usb:0", None, 0.0, part_id=part_id)) == product


def test_parts_are_decided_as_long_before_the_gate_as_their_cameras_need(load) -> None:
    text = TWO + 'gate_reserve_s = 0.25\n[parts]\ncameras = ["top", "side"]\nwindow_s = 2\n'
    assert parts_merger(load(BASE)) is None
    merger = parts_merger(load(text))
    assert merger is not None
    assert merger._gate_reserve_s == 0.25
    assert parts_merger(load(text + "gate_reserve_s = 0\n"))._gate_reserve_s == 0


def test_the_example_is_well(tmp_path: Path) -> None:
    path = tmp_path / "line.toml"
    path.write_text(example())
    config = load_config(path, {})
    check_line(config)
    assert len(config.cameras) == len(config.products) == 2
    assert list(tmp_path.iterdir()) == [path], "nothing is opened"
    keys = {
        *LineConfig.model_fields,
        *CameraConfig.model_fields,
        *ProductConfig.model_fields,
        *PartsConfig.model_fields,
    }
    assert {key for key in re.findall(r"^#? ?(\w+) = ", example(), re.MULTILINE)} <= keys


def test_the_page_has_every_key() -> None:
    assert tables() in PAGE.read_text(encoding="utf-8"), "python -m recontrast_edge.config prints the tables"


class TestCheck:
    """Without a camera, and without changing anything."""

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('outputs = ["jsonl:r?kep=3"]\n' + BASE, "unknown option 'kep'; did you mean 'keep'"),
            ('outputs = ["ftp:there"]\n' + BASE, "expected one of jsonl:"),
            ('outputs = ["mqtt://h/t?credentials=env:NO_SUCH_LOGIN"]\n' + BASE, "NO_SUCH_LOGIN is not set"),
            (BASE.replace("usb:0", "gopher:0"), "unknown scheme 'gopher'"),
            (BASE.replace("usb:0", "nowhere.mp4"), "no such file or folder"),
            (BASE.replace("usb:0", "line.toml"), "line.toml: not a video"),
            (BASE.replace("usb:0", "."), "holds no images"),
            (BASE.replace("usb:0", "list:nowhere.txt"), "nowhere.txt: cannot be read"),
            (BASE.replace("usb:0", "usb:0?exposure_su=3"), "did you mean 'exposure_us'"),
            (BASE.replace("usb:0", "usb:0?gain=3&lines=64&overlpa=3"), "'overlpa'.*did you mean 'overlap'"),
            (BASE.replace("usb:0", "/dev/video0?pixel_format=H264"), "pixel_format must be one of"),
            (BASE.replace("usb:0", "csi:0?fps=0"), "fps must be a number from 1"),
            (BASE.replace("usb:0", "pylon:?gain_bd=3"), "did you mean 'gain_db'"),
            (BASE.replace("usb:0", "genicam:nowhere.cti#1"), "nowhere.cti: no such GenTL producer"),
            (BASE.replace("usb:0", "aravis:?trigger=software"), "trigger=software needs trigger_rate_hz"),
            (BASE.replace("usb:0", "rtsp://h/s?timeout_s=0"), "timeout_s must be"),
            (BASE.replace("usb:0", "rtsps://h/s?ca_file=nowhere.pem"), "no such file: .*nowhere.pem"),
            (BASE.replace("usb:0", "watch:nowhere"), "nowhere: no such folder"),
            (BASE.replace("usb:0", "watch:.?after=move:.."), "expected a subfolder"),
            (BASE.replace("usb:0", "synthetic://mixed?fsp=3"), "did you mean 'fps'"),
            (BASE.replace("usb:0", "rtsp://h/?credentials=env:NO_SUCH_LOGIN"), "NO_SUCH_LOGIN is not set"),
            (BASE.replace("demo", "nowhere.onnx"), "nowhere.onnx: no such"),
            (BASE.replace("demo", "line.toml"), "line.toml: expected an .onnx or .plan file"),
        ],
    )
    def test_refuses(self, load, text: str, message: str) -> None:
        with pytest.raises(RecontrastError, match=message):
            check_line(load(text))

    @pytest.mark.usefixtures("gi")
    @pytest.mark.parametrize(
        ("pipeline", "message"),
        [("videotestsrc num-bufers=3", "refused: no property"), ("nonsense ! videoconvert", "no element")],
    )
    def test_refuses_pipelines(self, load, pipeline: str, message: str) -> None:
        with pytest.raises(RecontrastError, match=message):
            check_line(load(BASE.replace("usb:0", f"gst:{pipeline}")))

    @pytest.mark.parametrize(
        "source", ["usb:999", "/dev/video999", "rtsp://127.0.0.1:9/s", "watch:.?after=move:done", "watch:.", "part.png"]
    )
    def test_touches_no_camera_and_changes_nothing(self, load, tmp_path: Path, source: str) -> None:
        cv2.imwrite(str(tmp_path / "part.png"), np.zeros((8, 8), np.uint8))
        config = load(BASE.replace("usb:0", source))
        before = sorted(tmp_path.iterdir())
        check_line(config)
        assert sorted(tmp_path.iterdir()) == before

    def test_a_folder_that_is_waited_for_need_not_be_there(self, load) -> None:
        check_line(load(BASE.replace("usb:0", "watch:nowhere"), wait_for_source=True))

    def test_threshold(self, load, tiny_model: Path, tmp_path: Path) -> None:
        check_line(load(BASE.replace("demo", str(tiny_model))))
        model = tmp_path / "m.onnx"
        model.write_bytes(tiny_model.read_bytes())
        spec = read_spec(model).model_copy(update={"threshold": None})
        replace_metadata(model, {SPEC_KEY: spec.dumps()})
        with pytest.raises(ModelError, match="has no threshold yet"):
            check_line(load(BASE.replace("demo", "m.onnx")))
        check_line(load(BASE.replace("demo", "m.onnx"), threshold=0.5))


class TestRoots:
    @pytest.mark.parametrize(
        "text",
        [
            'outputs = ["jsonl:../r.jsonl"]\n' + BASE,
            'outputs = ["images:/elsewhere"]\n' + BASE,
            'outputs = ["video:inside/../../r.mp4"]\n' + BASE,
            'outputs = ["jsonl:out/r.jsonl"]\n' + BASE,
            'outputs = ["jsonl:link.jsonl"]\n' + BASE,
            'outputs = ["jsonl:circle/r.jsonl"]\n' + BASE,
            'summary = "out/s.json"\n' + BASE,
            BASE.replace("usb:0", "watch:out?after=delete"),
            BASE.replace("usb:0", "watch:../?after=move:done"),
            BASE.replace("usb:0", "watch:out?existing=first&after=%64elete&lines=64"),
            'roots = ["other"]\noutputs = ["jsonl:r.jsonl"]\n' + BASE,
            BASE.replace("usb:0", "gst:videotestsrc ! tee name=t ! filesink location=out/r t. ! videoconvert"),
            BASE.replace("usb:0", "gst:videotestsrc ! tee name=t  multifilesink name=m location='../r%d' t. ! m."),
            BASE.replace("usb:0", "gst:videotestsrc ! giosink location=file:///elsewhere/r"),
        ],
    )
    def test_refuse_what_lies_elsewhere(self, load, tmp_path: Path, text: str) -> None:
        outside = tmp_path.parent / f"{tmp_path.name}-outside"
        outside.mkdir()
        (tmp_path / "out").symlink_to(outside)
        (tmp_path / "link.jsonl").symlink_to(outside / "r.jsonl")
        (tmp_path / "circle").symlink_to("circle")
        with pytest.raises(UsageError, match=r"lies outside of|leads nowhere"):
            check_places(load(text))
        assert not list(outside.iterdir())

    @pytest.mark.parametrize(
        "text",
        [
            'outputs = ["jsonl:a/../r.jsonl", "jsonl:-", "images:x", "mqtt://h/t"]\nsummary = "s.json"\n' + BASE,
            'roots = ["/"]\noutputs = ["jsonl:/anywhere/r.jsonl"]\n' + BASE,
            'roots = ["one", ".."]\noutputs = ["jsonl:../r.jsonl"]\n' + BASE,
            BASE.replace("usb:0", "watch:/elsewhere?existing=first"),
            BASE.replace("usb:0", "watch:in?after=delete"),
            BASE.replace("usb:0", "gst:filesrc location=/elsewhere/r ! tee name=t ! filesink location=in/r t. ! x"),
            BASE.replace("usb:0", "gst:rtspsrc location=rtsp://h/s ! tee name=t ! rtspclientsink location=rtsp://h/t"),
            'outputs = ["jsonl:in-link/r.jsonl"]\n' + BASE,
        ],
    )
    def test_allow_what_lies_inside(self, load, tmp_path: Path, text: str) -> None:
        (tmp_path / "in").mkdir()
        (tmp_path / "in-link").symlink_to("in")
        check_places(load(text))


class TestPasswordsInTheFile:
    TEXT = BASE.replace("usb:0", "rtsp://u:canary@h/s")

    @pytest.mark.parametrize("mode", [0o644, 0o604, 0o602])
    def test_that_all_users_may_read(self, tmp_path: Path, mode: int) -> None:
        path = tmp_path / "line.toml"
        path.write_text(self.TEXT)
        path.chmod(mode)
        with pytest.raises(InputError, match=f"holds a password.*{mode:04o}.*chmod o= ") as caught:
            load_config(path, {})
        assert "canary" not in str(caught.value)

    @pytest.mark.parametrize("mode", [0o600, 0o640])
    def test_that_the_service_may_read(self, tmp_path: Path, mode: int) -> None:
        path = tmp_path / "line.toml"
        path.write_text(self.TEXT)
        path.chmod(mode)
        assert load_config(path, {}).cameras["top"].source == "rtsp://u:canary@h/s"

    def test_no_password_no_matter(self, tmp_path: Path) -> None:
        path = tmp_path / "line.toml"
        path.write_text(BASE.replace("usb:0", "rtsp://h/s?credentials=env:X"))
        path.chmod(0o644)
        load_config(path, {})
