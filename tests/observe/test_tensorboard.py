"""Event files, read back record by record."""

from __future__ import annotations

import io
import struct
import threading

import numpy as np
import pytest
from PIL import Image
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from llamax.observe import tensorboard
from llamax.observe.tensorboard import TensorBoard


def events(folder):
    """All events in the order in which TensorBoard reads them: a length, its checksum, the event, its checksum."""
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def shown(folder):
    """What TensorBoard shows: a restart at step s hides earlier events with step >= s."""
    values = []  # (tag, step, value)
    for event in events(folder):
        if event.session_log.status == SessionLog.START:
            values = [v for v in values if v[1] < event.step]
        values += [(v.tag, event.step, v) for v in event.summary.value]
    return values


def picture(folder, tag):
    (value,) = [v for t, _, v in shown(folder) if t == tag]
    return np.asarray(Image.open(io.BytesIO(value.image.encoded_image_string)))


def test_resume_shows_every_step_once(tmp_path):
    def run(start, stop):
        with TensorBoard(tmp_path, start_step=start) as board:
            for step in range(start + 1, stop + 1):
                board.scalars({"loss/next_token": start + step / 100, "optim/lr": float("nan")}, step)

    def curve():
        return {step: round(v.simple_value, 2) for tag, step, v in shown(tmp_path) if tag == "loss/next_token"}

    run(0, 6)  # dies after step 6; its last checkpoint is of step 4
    run(4, 8)
    assert curve() == {1: 0.01, 2: 0.02, 3: 0.03, 4: 0.04, 5: 4.05, 6: 4.06, 7: 4.07, 8: 4.08}
    assert len(shown(tmp_path)) == 8, "no step twice, and nothing of what is not finite"
    run(0, 2)  # no checkpoint was there
    assert curve() == {1: 0.01, 2: 0.02}
    assert len(list(tmp_path.iterdir())) == 3, "starts in the same second have files of their own"


def test_pictures_carry_their_captions(tmp_path):
    red, blue = np.zeros((56, 56, 3), np.uint8), np.zeros((400, 300, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    with TensorBoard(tmp_path) as board:
        board.pictures("samples", [red, blue] * 3, ["a red square", "blue\nand a caption of many words " * 3] * 3, 5)
        board.pictures("none", [], [], 5)
    sheet = picture(tmp_path, "samples")
    assert sheet.shape[1] == tensorboard.COLUMNS * (tensorboard.TILE_PX + 6), "six tiles make two rows"
    assert (sheet == (255, 0, 0)).all(-1).any() and (sheet == (0, 0, 255)).all(-1).any()
    without = tensorboard.captioned(red, " ")
    with_words = tensorboard.captioned(red, "a red square")
    below = np.asarray(with_words)[168:]  # 3 x 56 pixels of picture
    assert with_words.size == without.size and (below < 128).sum() > 100 > (np.asarray(without)[168:] < 128).sum()


def test_heat_map_colours_mean_what_the_ramp_says(tmp_path):
    load_LE = np.array([[10.0, 10, 10, 10], [0, 0, 0, 40], [np.nan, 0, 0, 0]])
    with TensorBoard(tmp_path) as board:
        board.expert_loads(load_LE, layers=[1, 3, 5], step=2)
    image, cell = picture(tmp_path, "experts/load"), tensorboard.CELL_PX
    middle = image[cell // 2 :: cell, 2 * cell + cell // 2 :: cell]
    assert middle.shape == (3, 4, 3)
    assert (middle[0] == 255).all() and (middle[1, :3] == 0).all() and (middle[1, 3] == (200, 20, 20)).all()
    assert (image[:, : 2 * cell] < 128).any(), "the layers' numbers"


def test_config_is_a_table(tmp_path):
    with TensorBoard(tmp_path) as board:
        board.config({"name": "a|b", "model": {"plan": ((("x",), 1),), "dim": 8}})
    ((tag, _, value),) = shown(tmp_path)
    assert tag == "config/text_summary"
    rows = value.tensor.string_val[0].decode().splitlines()
    assert rows[2:] == ['| name | "a\\|b" |', '| model.plan | [[["x"], 1]] |', "| model.dim | 8 |"]


def test_captions_and_pictures_must_pair(tmp_path):
    with TensorBoard(tmp_path) as board, pytest.raises(ValueError, match="shorter"):
        board.pictures("x", [np.zeros((4, 4, 3), np.uint8)], [], 0)


def test_a_full_disk_neither_hangs_nor_ends_the_run(tmp_path, monkeypatch, caplog):
    """It ends the thread that writes events; those after it would wait for that thread for ever."""
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    room = threading.Event()
    write = EventsWriter.write_event

    def full(self, event):
        if not room.is_set():
            raise OSError(28, "No space left on device")
        return write(self, event)

    with TensorBoard(tmp_path) as board:
        monkeypatch.setattr(EventsWriter, "write_event", full)
        board.scalars({"loss": 1.0}, 1)
        board._writer.file_writer.event_writer._worker.join(10)
        for step in range(2, 50):
            board.scalars({"loss": 1.0}, step)
        room.set()
        board.scalars({"loss": 1.0}, 50)
    assert [step for _, step, _ in shown(tmp_path)] == [50]
    assert caplog.text.count("the disk is full") == 1


def test_loads_over_time_show_a_collapse_that_ends(tmp_path):
    """Time to the right, a band for each layer, a row for each expert; more steps are seen after a restart too."""
    load_SLE = np.full((20, 2, 4), 0.25)
    load_SLE[:10, 1] = [0, 0, 1, 0]  # the second layer's first ten steps: everything to expert 2
    with TensorBoard(tmp_path) as board:
        board.expert_loads_over_time(load_SLE, list(range(1, 21)), layers=[3, 7])
    image = picture(tmp_path, "experts/load_over_time")
    margin, row = 2 * tensorboard.CELL_PX, tensorboard.CELL_PX // 2
    band = 4 * row + tensorboard.FONT_PX
    early, late = margin + 5, image.shape[1] - 5

    def pixel(layer, expert, x):
        return tuple(image[layer * band + expert * row + row // 2, x])

    white, black, red = tensorboard.RAMP_COLOURS[2], tensorboard.RAMP_COLOURS[0], tensorboard.RAMP_COLOURS[3]
    assert pixel(0, 2, early) == pixel(0, 0, late) == pixel(1, 0, late) == pixel(1, 2, late) == white
    assert pixel(1, 2, early) == red and pixel(1, 0, early) == pixel(1, 3, early) == black
