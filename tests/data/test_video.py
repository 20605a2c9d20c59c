"""Video files: frames by time, from every container; damaged ones; what is said where PyAV is missing."""

from __future__ import annotations

import io
import json
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llamax import config
from llamax.config import ConfigError, Data, Vision
from llamax.data import pipeline, video
from llamax.data.encode import Encoder
from llamax.data.images import PictureError
from llamax.data.sources import Document, Picture
from llamax.data.tokenizer import Tokenizer
from llamax.data.video import container_of, each_frame, read_frames, sample_times

TOKENIZER = Path(__file__).resolve().parents[2] / "data" / "tokenizer.model"
SMALL = Vision(tile_px=28, patch_px=7, max_tiles=4)
NAMES = {"mp4": "mov", "mov": "mov", "matroska": "matroska", "webm": "matroska", "avi": "avi", "mpegts": "mpegts"}
NAMES |= {"mpeg": "mpeg", "flv": "flv", "asf": "asf"}
STEP = 5  # of grey from one frame to the next


@pytest.fixture(scope="module")
def av():
    return pytest.importorskip("av", reason="PyAV is not installed: pip install 'llamax[video]'")


def clip(
    av, container: str = "mp4", codec: str = "mpeg4", n: int = 50, times=None, picture=None, size=(64, 48)
) -> bytes:
    """A video of n frames, ten a second, each greyer than the last; `times` are theirs in tenths of a second."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as opened:
        stream = opened.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = *size, "yuv420p", 12
        stream.codec_context.time_base = Fraction(1, 10)
        stream.bit_rate = 10_000_000 if codec == "mpeg4" else 1_000_000
        for i in range(n):
            pixels = np.full((size[1], size[0], 3), STEP * i, np.uint8) if picture is None else np.asarray(picture)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times:
                frame.pts, frame.time_base = times[i], Fraction(1, 10)
            opened.mux(stream.encode(frame))
        opened.mux(stream.encode())
    return file.getvalue()


def numbers(frames: list[Image.Image]) -> list[int]:
    """Which frames they are, by their grey."""
    return [round(float(np.asarray(frame).mean()) / STEP) for frame in frames]


CONTAINERS = [
    *[("mp4", "mpeg4"), ("mp4", "libx264"), ("mov", "mpeg4"), ("matroska", "libx264"), ("webm", "libvpx")],
    *[("avi", "mpeg4"), ("mpegts", "mpeg2video"), ("mpeg", "mpeg2video"), ("flv", "flv"), ("asf", "wmv2")],
]


@pytest.mark.parametrize(("container", "codec"), CONTAINERS)
def test_frames_of_a_file_written_here(av, tmp_path, container, codec):
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    data = clip(av, container, codec)
    assert container_of(data) == NAMES[container]
    off = 1 if container == "mpeg" else 0  # two of its frames have one time
    every = numbers(read_frames(data, 100))
    assert every == sorted(set(every)) and len(every) == 50 - off
    for budget, kept in ((5, [0, 12, 24, 37, 49]), (2, [0, 49]), (1, [0])):
        np.testing.assert_allclose(numbers(read_frames(data, budget)), kept, rtol=0, atol=off)
    (tmp_path / "clip").write_bytes(data)
    np.testing.assert_allclose(numbers(read_frames(tmp_path / "clip", 3)), [0, 24, 49], rtol=0, atol=off)
    assert read_frames(data, 1)[0].size == (64, 48)


def test_frames_are_spread_over_time_not_over_numbers(av):
    times = [*range(30), *range(100, 500, 20)]  # three quick seconds, then one frame every two
    frames = read_frames(clip(av, "matroska", "ffv1", n=50, times=times), 5)
    assert numbers(frames) == [0, 31, 37, 43, 49]  # at 0, 120, 240, 360 and 480
    assert sample_times(times, 5) == [0, 120, 240, 360, 480]


def test_times_that_are_kept():
    assert sample_times(range(100), 4) == [0, 33, 66, 99]
    assert sample_times([5, 9], 8) == [5, 9]
    assert sample_times([0, 1, 2, 1000], 3) == [0, 2, 1000]
    assert sample_times([0, 1000, 1001], 2) == [0, 1001]
    assert sample_times([0, 1, 999, 1000, 1001], 4) == [0, 1, 999, 1001]  # two moments may have one nearest frame
    rng = np.random.default_rng(0)
    for _ in range(200):
        times = sorted(set(rng.integers(-500, 500, rng.integers(1, 60)).tolist()))
        budget = int(rng.integers(1, 12))
        kept = sample_times(times, budget)
        assert kept == sorted(set(kept)) and set(kept) <= set(times) and len(kept) <= max(budget, 1)
        assert kept[0] == times[0] and (budget == 1 or kept[-1] == times[-1])
        moments = np.linspace(times[0], times[-1], budget)
        if len(times) > budget:
            assert all(min(abs(t - m) for t in kept) == min(abs(t - m) for t in times) for m in moments)


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_jumping_to_key_frames_changes_nothing(av, monkeypatch, codec):
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    data, decoded = clip(av, "mp4", codec), []
    real, times = video._Reader._decoded, video._times
    monkeypatch.setattr(video._Reader, "_decoded", lambda self, frame: (decoded.append(1), real(self, frame))[1])
    for budget in (1, 2, 3, 7, 20):
        jumped, n_jumped = read_frames(data, budget), len(decoded)
        with monkeypatch.context() as without_keys:
            without_keys.setattr(video, "_times", lambda *opened: (times(*opened)[0], []))
            walked, n_walked = read_frames(data, budget), len(decoded) - n_jumped
        assert [frame.tobytes() for frame in jumped] == [frame.tobytes() for frame in walked]
        assert n_jumped < n_walked or budget not in (2, 3)
        decoded.clear()


def test_a_phone_held_upright(av):
    """The file says by how much to turn: here a quarter clockwise, written where MP4 keeps its matrix."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:24, :32] = 255  # top left
    data = clip(av, n=3, picture=pixels)
    one, minus = (0x10000).to_bytes(4, "big"), (-0x10000).to_bytes(4, "big", signed=True)
    zero, unit = bytes(4), (0x40000000).to_bytes(4, "big")
    plain = one + zero * 3 + one + zero * 3 + unit
    at = data.index(plain, data.index(b"tkhd"))
    turned = data[:at] + zero + one + zero + minus + zero * 4 + unit + data[at + 36 :]
    image = np.asarray(read_frames(turned, 1)[0])
    assert image.shape == (64, 48, 3)
    assert image[8, 40].mean() > 200 and image[8, 8].mean() < 50 and image[56, 40].mean() < 50  # top right


def test_an_encoder_keeps_as_many_frames_as_the_config_says(av):
    picture = Picture(clip(av), video=True)
    for n in (1, 3, Data.video_frames):
        encoded = Encoder(TOKENIZER, SMALL, video_frames=n)(Document(("a clip", picture)))
        assert encoded.skip == "" and len(encoded.pictures) == n
    assert len(Encoder(TOKENIZER, SMALL)(Document((picture,))).pictures) == Data.video_frames


def test_a_damaged_video_is_a_picture_error_and_nothing_else(av, tmp_path):
    whole, rng = clip(av, n=20), np.random.default_rng(0)
    refused = 0
    for _ in range(120):
        damaged = bytearray(whole[: rng.integers(1, len(whole))] if rng.random() < 0.5 else whole)
        for at in rng.integers(0, len(damaged), 3):
            damaged[at] ^= int(rng.integers(1, 256))
        try:
            assert 1 <= len(read_frames(bytes(damaged), 4)) <= 4
        except PictureError as error:
            assert error.reason in ("image_unreadable", "image_too_many_pixels")
            refused += 1
    assert refused > 20
    encoder = Encoder(TOKENIZER, SMALL)
    assert encoder(Document((Picture(whole[:900], video=True),))).skip == "image_unreadable"
    assert encoder(Document((Picture(tmp_path / "none.mp4", video=True),))).skip == "image_missing"


def test_too_much_to_decode_is_refused(av, monkeypatch):
    data = clip(av)
    monkeypatch.setattr(video, "MAX_VIDEO_PIXELS", 64 * 48 * 4)
    assert len(read_frames(data, 1)) == 1
    with pytest.raises(PictureError, match="decoded"):
        read_frames(data, 50)
    monkeypatch.setattr(video, "MAX_VIDEO_FRAMES", 49)
    with pytest.raises(PictureError, match="more than 49 frames"):
        read_frames(data, 1)


def test_sound_alone_is_no_video(av):
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as opened:
        stream = opened.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        opened.mux(stream.encode(frame))
    with pytest.raises(PictureError, match="no video"):
        read_frames(file.getvalue())


HEADS = {
    "mov": b"\0\0\0\x18ftypmp42" + bytes(50),
    "avi": b"RIFF\0\0\0\0AVI LIST",
    "matroska": b"\x1aE\xdf\xa3" + bytes(50),
    "ogg": b"OggS\0",
    "flv": b"FLV\1",
    "mpeg": b"\0\0\1\xba",
    "mpegts": (b"G" + bytes(187)) * 3,
    "asf": b"\x30\x26\xb2\x75\x8e\x66\xcf\x11",
}


def test_a_container_is_told_by_its_first_bytes():
    assert {container_of(head): head for head in HEADS.values()} == HEADS
    gif, png, webp = b"GIF89a", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBPVP8 "
    for other in (
        gif,
        png,
        webp,
        b"",
        b"#EXTM3U\nhttp://x",
        b"ffconcat version 1.0",
        b"G" + bytes(600),
        b"GIF89a" + b"G" * 600,
    ):
        assert container_of(other) == ""


def test_ffmpeg_is_told_the_container(av, monkeypatch):
    """Left to guess, it would also take a file for a playlist, and open what that names."""
    data, asked, real = clip(av, "matroska", n=2), [], av.open
    monkeypatch.setattr(av, "open", lambda file, **how: (asked.append(how.get("format")), real(file, **how))[1])
    assert len(read_frames(data, 2)) == 2
    assert set(asked) == {"matroska"}


@pytest.mark.parametrize("container", HEADS)
def test_without_pyav_a_video_says_what_to_install(monkeypatch, container):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match=r"PyAV.*llamax\[video\]") as caught:
        read_frames(HEADS[container])
    assert container in caught.value.asked
    with pytest.raises(ConfigError, match="PyAV"):  # not a document to be left out in silence
        Encoder(TOKENIZER, SMALL)(Document((Picture(HEADS[container], video=True),)))


def test_frames_come_one_at_a_time(av):
    frames = each_frame(clip(av), 50)
    assert numbers([next(frames), next(frames)]) == [0, 1]
    frames.close()


def test_the_streams_frames_are_the_configs(tmp_path):
    """`data.video_frames` reaches training's documents and evaluations'."""
    frames = [Image.new("RGB", (16, 16), (20 * i, 0, 0)) for i in range(12)]
    frames[0].save(tmp_path / "clip.webp", save_all=True, append_images=frames[1:], lossless=True)
    line = json.dumps({"pieces": [{"video": "clip.webp"}, {"text": "a clip"}]})
    (tmp_path / "clips.jsonl").write_text(f"{line}\n" * 4, encoding="utf-8")
    (tmp_path / "clips.toml").write_text('format = "jsonl"\nfiles = ["clips.jsonl"]\nkind = "multimodal"\n')
    path = str(tmp_path / "clips.toml")
    settings = dict(tokenizer=str(TOKENIZER), seq_len=128, batch_tokens=256, sources={"clips": config.Source(path)})
    for n in (3, Data.video_frames):
        data = Data(
            **settings, multimodal_steps=1.0, tiles_per_row=8, window_docs=4, video_frames=n, prefetch_batches=0
        )
        marks = pipeline.HeldOut(path, data, SMALL)
        image = Tokenizer(TOKENIZER).image
        assert sum(int((batch.tokens == image).sum()) for batch in marks) == 4 * n
        streamed = next(iter(pipeline.build(data, SMALL, seed=0)))
        documents = int((streamed.targets == Tokenizer(TOKENIZER).eos).sum())
        assert int((streamed.tokens == image).sum()) >= n * documents > 0
        assert int((streamed.tokens == image).sum()) < (n + 1) * (documents + 1)
