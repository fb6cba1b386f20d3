"""What `soak.py` does to runs, published folders, pictures, data, questions and requests: a function draws one attack."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "interop")]

import mutations  # noqa: E402
from PIL import Image  # noqa: E402
from test_idefics import idefics_folder  # noqa: E402

import vlm_jax  # noqa: E402
from tests import tiny  # noqa: E402
from vlm_jax.data.build_store import token_store  # noqa: E402
from vlm_jax.data.sources.jsonl import JsonLinesSource  # noqa: E402
from vlm_jax.generation.questions import read_questions  # noqa: E402
from vlm_jax.processing.pictures import fit_image, picture_size, read_image  # noqa: E402

TOKENS = 32
NOTHING = object()  # instead of an answer, where none is to be compared
NONSENSE = (None, -1, 0, 1e12, float("nan"), "", "x\ud800", "\0", b"\xff", [], {}, [[]], True, 10**40, "<image>" * 9)
NONSENSE += ("a" * 100_000,)


class Refused(Exception):
    """In a clear line."""


@dataclasses.dataclass
class Attack:
    what: str  # what is done, for the report
    run: Callable[[], Any]  # gives the answer, or `NOTHING`
    expected: Any = None


class Ground:
    """A run of the tiny model and an exported IDEFICS, and what they answer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = tiny.write_data(folder / "data")
        self.environment = os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(folder)}
        self.run = folder / "run"
        finish = subprocess.run(self.command(self.run), cwd=ROOT, env=self.environment, capture_output=True, text=True)
        assert finish.returncode == 0, finish.stdout + finish.stderr
        self.metrics = (self.run / "metrics.jsonl").read_bytes()
        self.picture = folder / "data" / "1.png"
        self.vlm = vlm_jax.load(self.run)
        self.answer = self.ask(self.vlm)
        self.published, self.exported = folder / "published", folder / "exported"
        idefics_folder(self.published)
        vlm_jax.export(self.published, self.exported)
        self.exported_answer = self.ask(vlm_jax.load(self.exported))
        self.opened = mutations.opened(self.published)

    def command(self, workdir: Path) -> list[str]:
        flags = [f"--config.data.source.{split}={self.data}" for split in ("train", "eval")]
        return [sys.executable, "train.py", "--config=tests/tiny.py", f"--workdir={workdir}", *flags]

    def ask(self, vlm: Any) -> str:
        return vlm.generate("which colour?", [self.picture], max_new_tokens=TOKENS)


def changed(data: bytes, rng: random.Random) -> bytes:
    """A byte or a few changed, or what stands behind some place cut off."""
    if not data:
        return b"\0"
    if rng.random() < 0.2:
        return data[: rng.randrange(len(data))]
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 4))):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def kill(ground: Ground, rng: random.Random) -> Attack:
    """The next start of a run, that is killed after some seconds; where it gets through, its lines are compared."""
    after, workdir = rng.uniform(0.5, 15), ground.folder / "killed"

    def run() -> Any:
        process = subprocess.Popen(
            ground.command(workdir), cwd=ROOT, env=ground.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            output, _ = process.communicate(timeout=after)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return NOTHING
        if process.returncode:
            raise RuntimeError(output.decode())
        written = (workdir / "metrics.jsonl").read_bytes()
        shutil.rmtree(workdir)
        return written

    return Attack(f"killed after {after:.1f} s", run, ground.metrics)


def damage(ground: Ground, rng: random.Random) -> Attack:
    return _damaged(ground, rng, ground.run, expected=ground.answer)


def export(ground: Ground, rng: random.Random) -> Attack:
    return _damaged(ground, rng, ground.exported, expected=ground.exported_answer)


def _damaged(ground: Ground, rng: random.Random, folder: Path, *, expected: str) -> Attack:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and "tensorboard" not in file.parts)
    files = [file for file in files if file.name not in ("metrics.jsonl", "train.lock", "train.log")]
    # The largest are mostly weights.
    file = rng.choice(files if rng.random() < 0.5 else sorted(files, key=lambda file: -file.stat().st_size)[:4])
    intact = file.read_bytes()
    damaged = changed(intact, rng)

    def run() -> Any:
        file.write_bytes(damaged)
        try:
            return ground.ask(vlm_jax.load(folder))
        finally:
            file.write_bytes(intact)

    return Attack(f"{file}", run, expected)


def folder(ground: Ground, rng: random.Random) -> Attack:
    one = next(mutations.drawn(ground.published, seed=rng.randrange(2**32)))

    def run() -> Any:
        with mutations.applied(ground.published, one):
            verdict = mutations.judged(ground.published, ground.opened)
        if verdict.kind == "refused":
            raise Refused
        if verdict.kind == "raw":
            raise RuntimeError(verdict.detail)
        return "same" if verdict.kind == "same" or mutations.legitimate(one) else verdict.detail

    return Attack(f"{one}", run, "same")


PICTURES = (("png", "RGB"), ("jpeg", "RGB"), ("webp", "RGBA"), ("gif", "P"), ("tiff", "L"), ("bmp", "RGB"), ("png", "LA"))


def picture(ground: Ground, rng: random.Random) -> Attack:
    kind, mode = rng.choice(PICTURES)
    buffer = io.BytesIO()
    Image.effect_noise((40, 30), 60).convert(mode).save(buffer, kind)
    data, fit = changed(buffer.getvalue(), rng), rng.choice(("pad", "crop", "stretch"))

    def run() -> Any:
        picture_size(data)
        fit_image(read_image(data), 16, fit)
        return NOTHING

    return Attack(f"a {kind} of {mode}: {data[:60]!r}", run)


def line(ground: Ground, rng: random.Random) -> Attack:
    chat = {"id": 1, "image": "data/1.png", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    parts = [{"type": "image", "image": "data/1.png"}, {"type": "text", "text": "Q"}]
    messages = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "A"}]}
    content = {"content": [{"image": "data/1.png"}, {"text": "a"}, {"frames": ["data/1.png"]}, {"text": "b", "learn": False}]}
    cache, file = ground.folder / "cache", ground.folder / "line.jsonl"
    config = dataclasses.replace(tiny.tiny_run().data, cache_dir=str(cache))
    raw = mutated(rng.choice((chat, messages, content)), rng)

    def run() -> Any:
        file.write_bytes(raw + b"\n")
        try:
            token_store(config, ground.vlm.processor, JsonLinesSource(file, "", cache_dir=cache), skip=False)
        finally:
            shutil.rmtree(cache, ignore_errors=True)
        return NOTHING

    return Attack(f"a line of data: {raw[:200]!r}", run)


def question(ground: Ground, rng: random.Random) -> Attack:
    shots = [{"image": "data/1.png", "question": "Q", "answer": "A"}]
    asked = {"id": "7", "prompt": "which <image>?", "images": ["data/1.png"], "shots": shots}
    chat = {"messages": [{"role": "user", "content": [{"image": "data/1.png"}, {"type": "text", "text": "Q"}]}]}
    raw, file = mutated(rng.choice((asked, chat)), rng), ground.folder / "questions.jsonl"

    def run() -> Any:
        file.write_bytes(raw + b"\n")
        for one in read_questions(file).asked:
            ground.vlm.generator.prompt(one.request, 1, ground.vlm.settings())
        return NOTHING

    return Attack(f"a question: {raw[:200]!r}", run)


SETTINGS = dict(max_new_tokens=4, temperature=0.5, top_k=3, top_p=0.9, beams=1, stop="x", seed=1, repetition_penalty=1.1)


def request(ground: Ground, rng: random.Random) -> Attack:
    vlm, prompt, images, nonsense = ground.vlm, "which?", [ground.picture], rng.choice(NONSENSE)
    settings = {name: SETTINGS[name] for name in rng.sample(sorted(SETTINGS), 3)}
    message = {"role": "user", "content": [{"type": "image", "image": ground.picture}, {"type": "text", "text": "Q"}]}
    holder, key = rng.choice(list(places([message])))
    holder[key] = nonsense
    calls = {
        "prompt": lambda: vlm.generate(nonsense, images, **settings),
        "images": lambda: vlm.generate(prompt, nonsense, **settings),
        "an image": lambda: vlm.generate(prompt, [nonsense], **settings),
        "a setting": lambda: vlm.generate(prompt, images, **settings | dict.fromkeys(list(settings)[:1], nonsense)),
        "an unknown setting": lambda: vlm.generate(prompt, images, unknown=nonsense),
        "a message": lambda: vlm.chat([message], **settings),
        "messages": lambda: vlm.chat(nonsense, **settings),
        "requests": lambda: vlm.answer(nonsense, **settings),
    }
    what = rng.choice(sorted(calls))

    def run() -> Any:
        calls[what]()
        return NOTHING

    return Attack(f"{what}: {nonsense!r:.80} {settings} {message!r:.200}", run)


def mutated(value: Any, rng: random.Random) -> bytes:
    """As JSON: one of its values replaced, removed or given twice, or its bytes changed."""
    if rng.random() < 0.3:
        return changed(json.dumps(value).encode(), rng).replace(b"\n", b" ")
    value = json.loads(json.dumps(value))
    holder, key = rng.choice(list(places(value)))
    nonsense = [one for one in NONSENSE if not isinstance(one, bytes)]
    if isinstance(holder, dict) and rng.random() < 0.2:
        del holder[key]
    elif isinstance(holder, dict) and rng.random() < 0.2:
        holder[rng.choice(("image", "images", "video", "text", "role", "x"))] = rng.choice(nonsense)
    else:
        holder[key] = rng.choice(nonsense)
    return json.dumps(value).encode()


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a JSON value: what holds it, and its key or index."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield value, key
        yield from places(inner)


ATTACKS = {one.__name__: one for one in (kill, damage, export, folder, picture, line, question, request)}
