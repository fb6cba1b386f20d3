"""Videos by their files: which frames are sampled, and that they are the ones that are shown then."""

import json

import numpy as np
import pytest
from PIL import Image

from vlm_jax.config import DataConfig, JsonLinesConfig
from vlm_jax.data.sources.jsonl import open_json_lines
from vlm_jax.errors import DataError, ImageError, RequestError
from vlm_jax.processing import video
from vlm_jax.processing.conversation import from_messages
from vlm_jax.processing.media import FittedMedia
from vlm_jax.processing.pictures import file_bytes, picture_name, picture_size, read_image
from vlm_jax.processing.video import sampled_frames

RATE = 4  # frames a second of the films made here


def mp4(path, count=22, size=(32, 16)):
    """Frame n is grey 10 * n."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = *size, "yuv420p", 5
        for number in range(count):
            pixels = np.full((size[1], size[0], 3), 10 * number, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def gif(path, durations, size=(32, 16)):
    frames = [Image.new("L", size, 10 * number) for number in range(len(durations))]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, optimize=False)
    return path


def numbers(frames):
    """Which frame of the film each is."""
    return [round(read_image(frame).mean() / 10) for frame in frames]


@pytest.mark.parametrize(
    ("rate", "most", "expected"),
    [
        (1.0, 8, [0, 4, 8, 12, 16, 20]),  # 5.5 seconds
        (2.0, 11, [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20]),
        (0.1, 8, [0]),
        (4.0, 2, [5, 16]),  # the middles of two halves
        (1.0, 4, [2, 8, 13, 19]),
    ],
)
def test_frames_of_a_film(tmp_path, rate, most, expected):
    frames = sampled_frames(mp4(tmp_path / "x.mp4"), rate=rate, most=most)
    assert numbers(frames) == expected
    assert {picture_size(frame) for frame in frames} == {(16, 32)} and len(set(frames)) == len(frames)
    assert {file_bytes(frame) for frame in frames} == {(tmp_path / "x.mp4").stat().st_size}


def test_an_animated_gif_needs_no_pyav(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "_av", lambda path: pytest.fail("PyAV"))
    frames = sampled_frames(gif(tmp_path / "x.gif", [500, 1000, 200, 300, 1000]), rate=1.0)
    assert numbers(frames) == [0, 1, 4] and picture_size(frames[0]) == (16, 32)
    assert picture_name(frames[1]) == f"{tmp_path}/x.gif at 1.00 s"


def test_a_film_is_decoded_once_for_all_its_frames(tmp_path, monkeypatch):
    frames = sampled_frames(gif(tmp_path / "once.gif", [1000] * 6))
    opened, original = [], video._gif_frames
    monkeypatch.setattr(video, "_gif_frames", lambda path: opened.append(path) or original(path))
    tiles = FittedMedia(8, "stretch", 0).pixels(frames)
    assert [int(tile.mean()) for tile in tiles] == [0, 10, 20, 30, 40, 50] and len(opened) == 1


@pytest.mark.parametrize("kind", ["llava", "llava_image", "messages", "content"])
def test_records_with_a_film(tmp_path, kind):
    gif(tmp_path / "x.gif", [1000] * 9)
    ask, answer = "What happens?", "It gets brighter."
    turns = lambda marker: [{"from": "human", "value": f"{marker}\n{ask}"}, {"from": "gpt", "value": answer}]
    part = {"type": "video", "video": "x.gif"}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": ask}]}, {"role": "assistant", "content": answer}]
    record = {
        "llava": {"video": "x.gif", "conversations": turns("<video>")},
        "llava_image": {"video": "x.gif", "conversations": turns("<image>")},
        "messages": {"messages": messages},
        "content": {"content": [{"video": "x.gif"}, {"text": answer}]},
    }[kind]
    (tmp_path / "x.jsonl").write_text(json.dumps(record) + "\n")
    data = DataConfig(
        source=JsonLinesConfig(train=str(tmp_path / "x.jsonl"), eval=""),
        image_size=8, rows=1, tokens=99, images=1, frames=8, video_rate=0.5, cache_dir=str(tmp_path / "c"),
    )  # fmt: skip
    example = open_json_lines(data, "train")[0]
    (frames,) = example.media
    assert numbers(frames) == [0, 2, 4, 6, 8]
    assert example.conversations[0][-1].text == answer


def test_a_chat_with_a_film(tmp_path):
    gif(tmp_path / "x.gif", [1000] * 3)
    message = {"role": "user", "content": [{"type": "video", "video": "x.gif"}, {"type": "text", "text": "What happens?"}]}
    _, media = from_messages([message], tmp_path)
    assert numbers(media[0]) == [0, 1, 2]


def test_what_is_wrong_with_a_film_is_named(tmp_path, monkeypatch):
    pytest.importorskip("av")
    (tmp_path / "text.mp4").write_text("no film")
    (tmp_path / "text.gif").write_text("no film")
    whole = mp4(tmp_path / "x.mp4")
    (tmp_path / "short.mp4").write_bytes(whole.read_bytes()[:300])
    for name, cause in {
        "none.mp4": "there is no such file",
        "text.mp4": "cannot be read as a video, or is damaged",
        "text.gif": "cannot be read as a video, or is damaged",
        "short.mp4": "cannot be read as a video, or is damaged",
    }.items():
        with pytest.raises(ImageError, match=rf"^video .*{name}: {cause}"):
            sampled_frames(tmp_path / name)
    with pytest.raises(RequestError, match=r"x\.mp4: a slot has one frame: set data\.frames"):
        sampled_frames(whole, most=1)
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    mp4_again = tmp_path / "again.mp4"
    mp4_again.write_bytes(whole.read_bytes())
    with pytest.raises(ImageError, match=r"again\.mp4: needs PyAV: pip install 'vlm_jax\[video\]'"):
        sampled_frames(mp4_again)
    (tmp_path / "x.jsonl").write_text(json.dumps({"video": "none.mp4", "conversations": [{"from": "human", "value": "Q"}]}))
    data = DataConfig(
        source=JsonLinesConfig(train=str(tmp_path / "x.jsonl"), eval=""),
        image_size=8, rows=1, tokens=9, images=1, frames=8, cache_dir=str(tmp_path / "c"),
    )  # fmt: skip
    with pytest.raises(DataError, match=r"x\.jsonl:1: video .*none\.mp4: there is no such file"):
        open_json_lines(data, "train")[0]
