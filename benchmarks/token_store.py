"""What a start costs on a data set of LLaVA-1.5's size, and how soon Ctrl-C is answered: `train.py` as a user starts it.

    python benchmarks/token_store.py --folder=/tmp/store
    python benchmarks/token_store.py --folder=/tmp/store --processes --signals SIGINT --moments 2 10 30 60

The data are made up, in the shape of LLaVA-1.5's mix of 665k conversations: a `train.json` of about 1 GB, 6 % without a
picture, 24 % of 1 to 5 long answers, 70 % of 1 to 9 short ones, words by Zipf's law; 300 JPEGs are shared by all. The
checkpoint is a LLaVA of one layer with real lengths: 576 visual tokens, 32,000 tokens of LLaMA's kind, rows of 2048. Starts on
64 conversations ("few") cost what is none of the data's doing. What `train.py` said, and when, is kept in FOLDER/logs.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
FEW, IMAGES, ROWS, STEPS, WORKERS = 64, 300, 2, 12, 2
WORDS, TEXT = 100_000, 2_000_000  # of the made-up language; of the text whose stretches are the questions and answers
SHARES = (0.1, 0.3, 0.5, 0.7, 0.85, 0.95)  # of a start's seconds to its first step, at which signals are sent
STARTS = ("few-not-compiled", "few", "first", "second")
KINDS = ("trainer until its workers start", "trainer with workers", "worker", "pool process")
IMAGE = "coco/train2017/{:012}.jpg"
CHAT = (  # LLaVA-1.5's
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SHORT = "\nAnswer the question using a single word or phrase."

gb = lambda size: f"{size / 1e9:.3f}"


def write_words() -> tuple[str, list[int]]:
    """A long text of made-up words by Zipf's law, the frequent ones short; and where its words begin."""
    rng = np.random.default_rng(0)
    syllables = [begin + end for begin in "bdfgklmnprstvz" for end in ("a", "e", "i", "o", "u", "an", "en", "or", "il")]
    words = ["".join(three[: 1 + (rank > 100) + (rank > 8000)]) for rank, three in enumerate(rng.choice(syllables, (WORDS, 3)))]
    chance = 1 / (np.arange(WORDS) + 2.7)
    stops = rng.choice([" ", ", ", ". "], TEXT, p=[0.84, 0.08, 0.08])
    pieces = [words[word] + stop for word, stop in zip(rng.choice(WORDS, TEXT, p=chance / chance.sum()), stops, strict=True)]
    return "".join(pieces), np.cumsum([0, *map(len, pieces)]).tolist()


def conversations(count: int, words: tuple[str, list[int]], seed: int) -> Iterator[dict[str, Any]]:
    """Records of LLaVA's format, the same for the same seed."""
    (text, places), dice, last = words, random.Random(seed), TEXT - 2000
    cut = lambda size, begin: text[places[begin] : places[begin + size]].rstrip(" .,")
    for number in range(count):
        kind = dice.choices(("bare", "long", "short"), cum_weights=(0.061, 0.3, 1))[0]
        most, room, mean, spread = {"bare": (5, 1100, 5.4, 0.8), "long": (5, 700, 4.6, 0.5), "short": (9, 400, 0.7, 0.9)}[kind]
        turns: list[dict[str, str]] = []
        for _ in range(dice.randint(1, most)):
            question = cut(max(3, round(dice.gauss(12, 4))), dice.randrange(last)) + "?"
            if not turns:
                question = "<image>\n" * (kind != "bare") + question + SHORT * (kind == "short")
            size = max(1, min(round(dice.lognormvariate(mean, spread)), room))
            room -= size  # a conversation must fit in a row
            answer = cut(size, dice.randrange(last)) + "." * (size > 3)
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        picture = {} if kind == "bare" else {"image": IMAGE.format(dice.randrange(IMAGES))}
        yield {"id": f"{number:012}", **picture, "conversations": turns}


def write_checkpoint(folder: Path, text: str) -> None:
    """A random LLaVA-1.5 of one layer, whose pictures and vocabulary have their real sizes."""
    import transformers as hf
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    fast = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    fast.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    trainer = trainers.BpeTrainer(vocab_size=32_000, special_tokens=special, show_progress=False)
    fast.train_from_iterator([*text.split(". "), "USER: ASSISTANT: ?" + SHORT], trainer)
    # LLaMA's own cuts nothing beforehand: to the BPE a whole text is one word.
    fast.pre_tokenizer, fast.decoder = None, decoders.Metaspace()
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", extra_special_tokens={"image_token": "<image>"})
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", **names)
    sizes = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2)
    vision = hf.CLIPVisionConfig(**sizes, num_hidden_layers=2, image_size=336, patch_size=14)
    language = hf.LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=32_064, max_position_embeddings=4096)
    config = hf.LlavaConfig(vision_config=vision, text_config=language, image_token_index=tokenizer.image_token_id)
    pixels = hf.CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    shape = dict(patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    hf.LlavaForConditionalGeneration(config).save_pretrained(folder)
    hf.LlavaProcessor(pixels, tokenizer, chat_template=CHAT, **shape).save_pretrained(folder)


def make(folder: Path, count: int) -> str:
    """Writes data and checkpoint, unless the folder has them. Returns what they are in words."""
    folder.mkdir(parents=True, exist_ok=True)
    if (note := folder / f"made-{count}.txt").is_file():
        return note.read_text()
    if any(folder.iterdir()):
        sys.exit(f"--folder={folder}: is not empty, and does not hold {count} conversations that this wrote to their end")
    rng, words = np.random.default_rng(1), write_words()
    write_checkpoint(folder / "llava", words[0])
    (folder / IMAGE).parent.mkdir(parents=True)
    for number in range(IMAGES):
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        small.resize(tuple(rng.integers(320, 641, 2).tolist())).save(folder / IMAGE.format(number))
    (folder / "eval.jsonl").write_text("".join(json.dumps(record) + "\n" for record in conversations(FEW, words, seed=3)))
    began, turns = time.perf_counter(), 0
    with (folder / "train.json").open("w") as file:
        for number, record in enumerate(conversations(count, words, seed=2)):
            file.write(("[", ", ")[number > 0] + json.dumps(record))
            turns += len(record["conversations"])
        file.write("]")
        size, seconds = file.tell(), time.perf_counter() - began
    text = f"{count:,} conversations of {turns / count:.1f} turns, {gb(size)} GB, written in {seconds:.0f} s"
    note.write_text(text)
    return text


class Sample(NamedTuple):  # what a process held at a moment, in bytes
    at: float  # seconds since the start
    pid: int
    private: int
    pss: int  # private, and its part of what several processes share
    rss: int


def held(leaders: set[int], at: float = 0.0) -> Iterator[Sample]:
    """What the living processes of these sessions hold, orphans among them, but for multiprocessing's resource tracker."""
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        with contextlib.suppress(OSError):  # it has ended
            if os.getsid(pid) in leaders and b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
                size = {name: 1024 * int(kb) for name, kb in re.findall(r"^(\w+): +(\d+) kB", rollup, re.MULTILINE)}
                yield Sample(at, pid, size["Private_Clean"] + size["Private_Dirty"], size["Pss"], size["Rss"])


class Start:
    """A run of `train.py` in one or several processes, each the first of a session of its own."""

    def __init__(self, args: argparse.Namespace, label: str, train: str, store: Path, compiled: Path, processes: int):
        folder, workdir, self.log = args.folder, args.folder / "runs" / label, args.folder / "logs" / f"{label}.txt"
        shutil.rmtree(workdir, ignore_errors=True)
        self.log.parent.mkdir(exist_ok=True)
        flags = dict(steps=STEPS, log_every=1) | {"data.rows": ROWS, "data.workers": WORKERS}
        flags |= {"data.source.train": folder / train, "data.source.eval": folder / "eval.jsonl"}
        flags |= {"data.cache_dir": store} if not args.without_store else {}
        command = [sys.executable, "train.py", f"--config=configs/finetune.py:{folder / 'llava'}", f"--workdir={workdir}"]
        command += [f"--config.{key}={value}" for key, value in flags.items()]
        with socket.create_server(("localhost", 0)) as probe:
            several = [f"--coordinator=localhost:{probe.getsockname()[1]}", f"--processes={processes}"]
        own = [[*several, f"--process={index}"] for index in range(processes)] if processes > 1 else [[]]
        env = dict(JAX_PLATFORMS="cpu") | os.environ | dict(HF_HUB_OFFLINE="1", PYTHONUNBUFFERED="1", PYTHONPATH=str(ROOT))
        env["JAX_COMPILATION_CACHE_DIR"] = str(compiled)
        print(f"{label} ...", file=sys.stderr, flush=True)
        with self.log.open("w") as out:
            settings: dict[str, Any] = dict(cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
            self.began = time.perf_counter()
            self.processes = [subprocess.Popen(command + one, **settings) for one in own]
        atexit.register(self.end)
        self.leaders = {process.pid for process in self.processes}
        self.metrics, self.said = workdir / "metrics.jsonl", self.log.open()
        self.lines: list[tuple[float, str]] = []
        self.samples: list[Sample] = []
        self.first_step = math.inf

    def watch(self, until: float, memory: bool = False) -> float:
        """Until all have ended, or one has failed, or `until` seconds after the start. Returns the seconds."""
        sampled = 0.0
        while True:
            at, codes = time.perf_counter() - self.began, [process.poll() for process in self.processes]
            self.lines += [(at, line.rstrip()) for line in self.said]
            if self.first_step == math.inf and self.metrics.is_file() and '"step": 1,' in self.metrics.read_text():
                self.first_step = at
            if at >= until or any(codes) or None not in codes:
                return at
            if memory and at - sampled > 0.5:
                sampled, self.samples = at, [*self.samples, *held(self.leaders, at)]
            time.sleep(0.01)

    def end(self) -> int:
        """Kills what is left, and writes times into the log. Returns how many outlived the trainers by five seconds."""
        until = time.perf_counter() + 5 * all(process.poll() is not None for process in self.processes)
        while (left := list(held(self.leaders))) and time.perf_counter() < until:
            time.sleep(0.05)
        for one in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one.pid, signal.SIGKILL)
        atexit.unregister(self.end)  # the sessions' numbers may be others' from now on
        self.watch(0)
        self.log.write_text("".join(f"{at:8.2f}  {line}\n" for at, line in self.lines))
        return len(left)

    def peaks(self) -> Iterator[tuple[str, ...]]:
        """Of each of `KINDS` how many there were, and the most that one of them held: private, Pss, Rss."""
        last = {one.pid: one.at for one in self.samples}
        workers = {pid for pid, at in last.items() if at >= self.first_step} - self.leaders  # a pool has ended by then
        begin = min((one.at for one in self.samples if one.pid in workers), default=math.inf)
        kind = lambda one: one.at >= begin if one.pid in self.leaders else 2 if one.pid in workers else 3
        for number, name in enumerate(KINDS):
            if own := [one for one in self.samples if kind(one) == number]:
                yield name, str(len({one.pid for one in own})), *(gb(max(sizes)) for sizes in list(zip(*own, strict=True))[2:])


def measure(args: argparse.Namespace, name: str, processes: int) -> tuple[float, tuple[str, ...], list[tuple[str, ...]]]:
    """Seconds to the first step, the line of the table of starts, the lines of the table of memory."""
    train = "eval.jsonl" if name.startswith("few") else "train.json"
    store, compiled = args.folder / f"store-{train}-{processes}", args.folder / f"compiled-{processes}"
    for old in {STARTS[0]: (store, compiled), "few": (store,), "first": (store,)}.get(name, ()):
        shutil.rmtree(old, ignore_errors=True)
    run = Start(args, f"{name}-{processes}", train, store, compiled, processes)
    run.watch(args.limit, memory=True)
    codes = [process.poll() for process in run.processes]
    run.end()
    if run.first_step == math.inf or any(code != 0 for code in codes):
        sys.exit("\n".join([*(line for _, line in run.lines[-20:]), f"{name}: exit codes {codes}; None: killed by us"]))
    together = max(sum(one.pss for one in run.samples if one.at == at) for at in {one.at for one in run.samples})
    size = sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
    which = (name, str(processes))
    return run.first_step, (*which, f"{run.first_step:.1f}", gb(together), gb(size)), [(*which, *one) for one in run.peaks()]


def interrupt(args: argparse.Namespace, number: signal.Signals, name: str, moment: float) -> tuple[float, tuple[str, ...]]:
    """Seconds until a signal was answered, and the line of the table. Nothing is compiled beforehand."""
    fresh = args.folder / "interrupted"
    store = args.folder / f"store-train.json-{args.processes[0]}" if name == "second" else fresh / "store"
    run = Start(args, f"{name}-{number.name}-{moment:.1f}", "train.json", store, fresh / "compiled", 1)
    sent, trainer = run.watch(moment), run.processes[0]
    heard, over = len(run.lines), trainer.poll() is not None
    if not over:  # a terminal sends it to all processes, `kill` to one
        os.killpg(trainer.pid, number) if number == signal.SIGINT else os.kill(trainer.pid, number)
    ended, code, left = run.watch(sent + args.limit), trainer.poll(), run.end()
    shutil.rmtree(fresh, ignore_errors=True)
    before, after = [line for _, line in run.lines[:heard] if re.search(r"\w", line)], run.lines[heard:]
    during = "steps" if run.first_step < sent else re.sub(r"^\W+|\|", "", ["imports", *before][-1])[:50]
    answered = min([ended, *(at for at, line in after if number.name in line)]) - sent
    how = "had ended before" if over else "killed by us" if code is None else f"exit code {code}"
    how += ", traceback" * any("Traceback" in line for _, line in after) + f", {left} processes left" * (left > 0)
    return answered, (number.name, name, f"{moment:.1f}", during, f"{answered:.2f}", f"{ended - sent:.2f}", how)


def table(header: str, lines: list[tuple[str, ...]]) -> str:
    names = header.split(", ")
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [names, ["---"] * len(names), *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=lambda name: Path(name).absolute(), required=True, help="for all that is made")
    parser.add_argument("--conversations", type=int, default=665_000, help="of train.json (default %(default)s)")
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2], help="of a start (default 1 2; none: no starts)")
    parser.add_argument("--limit", type=float, default=3600, help="seconds a start or an answer may take (default %(default)s)")
    parser.add_argument("--signals", nargs="+", choices=("SIGINT", "SIGTERM"), default=["SIGINT", "SIGTERM"])
    parser.add_argument("--moments", type=float, nargs="+", help="seconds of a start (default: shares of the starts measured)")
    parser.add_argument("--skip-interrupts", action="store_true", help="send no signals")
    parser.add_argument("--without-store", action="store_true", help=argparse.SUPPRESS)  # for a train.py that has none
    args = parser.parse_args()
    print(f"{len(os.sched_getaffinity(0))} CPU cores, jax {version('jax')}, load average {os.getloadavg()[0]:.1f}")
    print(f"{make(args.folder, args.conversations)}; {WORKERS} workers a process\n", flush=True)
    lines, memory, seconds = [], [], {}  # the seconds of the first of `args.processes`
    for processes in args.processes:
        for name in STARTS:
            found, line, more = measure(args, name, processes)
            seconds.setdefault(name, found)
            lines, memory = [*lines, line], [*memory, *more]
            print(*("  ".join(cells) for cells in (line, *more)), sep="\n", file=sys.stderr)
    if lines:
        print(table("start, processes, seconds to the first step, GB of all processes (Pss), GB of the store", lines))
        print(table("start, processes, most GB held by, of them, private, Pss, Rss", memory), flush=True)
    if args.skip_interrupts or not (args.moments or seconds):
        return
    plan = [("first", moment) for moment in args.moments or ()]
    if not plan:
        until = {name: seconds[name] + seconds[STARTS[0]] - seconds[STARTS[1]] for name in STARTS[2:]}
        plan = [(name, moment) for name in until for moment in (*(share * until[name] for share in SHARES), until[name] + 4)]
    answers = [interrupt(args, signal.Signals[number], *one) for number in args.signals for one in plan]
    print(table("signal, start, sent at s, it had said, answered after s, ended after s, how", [line for _, line in answers]))
    print(f"worst: {', '.join(max(answers)[1])}")


if __name__ == "__main__":
    main()
