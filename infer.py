"""Asks a trained model questions about images: a single one, or a file of them."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from vlm_jax import Encoder

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # silences transformers' "PyTorch was not found"

EXAMPLES = """
one question about one image:
  infer.py --checkpoint=runs/flamingo --image=a.png --prompt="what color is the shape?"

several images, each where the prompt says <image> (without <image> they all come first):
  infer.py --checkpoint=runs/flamingo --image=a.png --image=b.png --prompt="is <image> larger than <image>?"

solved examples before the question (few-shot); "-" instead of an image for an example without one:
  infer.py --checkpoint=runs/flamingo --shot c.png "what color is the shape?" red --image=a.png --prompt="what color is it?"

the attention over the image for each word of the answer:
  infer.py --checkpoint=runs/flamingo --image=a.png --prompt="what color is the shape?" --attention=looks.png

a file of questions; run the same command again to resume (questions whose images were changed are asked again):
  infer.py --checkpoint=runs/flamingo --input=questions.jsonl --output=answers.jsonl

  a line of the input:   {"id": "7", "prompt": "what color is it?", "image": "a.png"}
                         "images": [...] for several, "shots": [{"image", "question", "answer"}] for solved examples,
                         or "messages": a chat as below; paths are relative to the file
  a line of the output:  {"line": 1, "id": "7", "prompt": "what color is it?", "answer": "blue"}

a chat of several turns, as an OpenAI-style list of messages; image paths are relative to the file:
  infer.py --checkpoint=runs/flamingo --messages=chat.json

  [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "what color is it?"}]},
   {"role": "assistant", "content": "blue"}, {"role": "user", "content": "what shape?"}]

a published checkpoint: a folder saved by transformers, or a name on the hub:
  infer.py --checkpoint=llava-hf/llava-1.5-7b-hf --image=a.png --prompt="What is in this image?"

zero-shot classification with CLIP or SigLIP:
  infer.py --checkpoint=openai/clip-vit-base-patch32 --image=a.png --classes="cat,dog,red bicycle"

a model sharded over eight devices:
  infer.py --checkpoint=runs/large --mesh=tensor=8 --dtype=bfloat16 --image=a.png --prompt="what is this?"
"""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"infer.py: {message}; see infer.py --help\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="infer.py", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    sources = "the --workdir of a run of train.py, a folder saved by transformers, or the name of a hub repository"
    add("--checkpoint", required=True, metavar="PATH", help=sources)
    add("--step", type=int, help="which checkpoint of a run (default: the newest)")
    add("--prompt", help="the question; <image> in it marks the place of an image")
    add("--image", action="append", default=[], metavar="FILE", help="an image; repeat it for several")
    add("--messages", type=Path, metavar="FILE.json", help="a chat of several turns to continue")
    shot = ("IMAGE", "QUESTION", "ANSWER")
    add("--shot", action="append", default=[], nargs=3, metavar=shot, help="a solved example; repeat it for several")
    add("--classes", metavar="NAMES", help="comma-separated class names for zero-shot classification (CLIP, SigLIP)")
    add("--template", default="a photo of a {}.", help="prompt; {} is replaced by the class name (default: %(default)r)")
    add("--input", type=Path, metavar="FILE.jsonl", help="a file of questions, one per line")
    add("--output", type=Path, metavar="FILE.jsonl", help="a file for the answers; questions that have one there are skipped")
    add("--batch", type=int, default=16, metavar="N", help="maximum questions answered at once (default: %(default)s)")
    add("--max-new-tokens", type=int, metavar="N", help="maximum tokens generated (default: the checkpoint's, or 64)")
    warm = "0: greedy; 1: sample from the model's distribution (default: the checkpoint's, or 0)"
    add("--temperature", type=float, help=warm)
    add("--top-k", type=int, metavar="K", help="sample from the K most likely tokens (default: the checkpoint's, or all)")
    nucleus = "sample from the most likely tokens with total probability P (default: the checkpoint's, or 1)"
    add("--top-p", type=float, metavar="P", help=nucleus)
    penalty = "above 1 penalises tokens already in the prompt or the answer (default: the checkpoint's, or 1)"
    add("--repetition-penalty", type=float, metavar="P", help=penalty)
    add("--beams", type=int, metavar="N", help="beam search with N beams (default: the checkpoint's, or 1)")
    lengths = "beam search: above 0 prefers longer answers, 0 ranks by log-probability alone (default: the checkpoint's, or 1)"
    add("--length-penalty", type=float, metavar="P", help=lengths)
    add("--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text; repeat it for several")
    add("--seed", type=int, default=0, help="random seed for sampling (default: %(default)s)")
    add("--stream", action=argparse.BooleanOptionalAction, help="print words as they come (default: on a terminal)")
    add("--attention", type=Path, metavar="OUT.png", help="draw the attention over the image for each word of the answer")
    add("--mesh", metavar="AXES", help='devices, as in "tensor=8" or "data=2,tensor=4" (default: one device)')
    adapter = "an adapter in PEFT's format, or written by vlm_jax.export(..., adapter=...)"
    add("--adapter", type=Path, metavar="FOLDER", help=adapter)
    add("--pickles", action="store_true", help="read PyTorch's .bin files where there are no safetensors; nothing is executed")
    add("--pad-to-square", action="store_true", help="LLaVA-1.5 only: pad images to squares first, as its authors evaluated it")
    add("--dtype", choices=("float32", "bfloat16"), help="dtype of parameters and computation (default: the run's)")
    args = parser.parse_args(argv)
    if sum(given is not None for given in (args.prompt, args.messages, args.input, args.classes)) != 1:
        parser.error("give one of --prompt, --messages and --input, or --classes for CLIP and SigLIP")
    if args.classes is not None and not args.image:
        parser.error("--classes needs an --image")
    if args.classes is not None and not all(name.strip() for name in args.classes.split(",")):
        parser.error(f"--classes={args.classes!r}: expected comma-separated names")
    if args.classes is not None and (args.attention or args.shot or args.stop or args.stream or args.adapter):
        parser.error("--attention, --shot, --stop, --stream and --adapter need a --prompt")
    if args.classes is not None and "{}" not in args.template:
        parser.error(f"--template={args.template!r} has no {{}}, which is replaced by the class name")
    if (args.input is None) != (args.output is None):
        parser.error("--input and --output go together")
    if args.input and (args.image or args.shot or args.attention or args.stream):
        parser.error("--image, --shot, --attention and --stream need a --prompt; with --input, images belong in its lines")
    if args.messages and (args.image or args.shot):
        parser.error("--image and --shot need a --prompt; with --messages, images belong in the file")
    if args.batch < 1:
        parser.error(f"--batch={args.batch}: expected 1 or more")
    return args


def classify(encoder: Encoder, args: argparse.Namespace) -> None:
    """Prints the probability of every class, the most likely first."""
    names = [name.strip() for name in args.classes.split(",")]
    for image, chances in zip(args.image, encoder.classify(args.image, names, args.template), strict=True):
        if len(args.image) > 1:
            print(image)
        for chance, name in sorted(zip(chances, names, strict=True), reverse=True):
            print(f"{chance:7.2%}  {name}")


def run(args: argparse.Namespace) -> None:
    from absl import logging

    import vlm_jax
    from vlm_jax import runtime
    from vlm_jax.api import open_checkpoint
    from vlm_jax.errors import counted
    from vlm_jax.generation.answer_file import answer_file
    from vlm_jax.generation.questions import read_questions
    from vlm_jax.generation.request import Request, chat_file
    from vlm_jax.processing.conversation import Shot, from_prompt
    from vlm_jax.processing.pictures import picture_size
    from vlm_jax.progress import bytes_read

    logging.set_verbosity(logging.ERROR)
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "beams", "length_penalty", "seed")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None} | {"stop": tuple(args.stop)}
    shots = [Shot([] if image == "-" else [image], question, answer) for image, question, answer in args.shot]
    # Errors in the request are found before a large model is read.
    checkpoint = open_checkpoint(args.checkpoint, args.step, pickles=args.pickles, pad_to_square=args.pad_to_square)
    encodes = not checkpoint.processor.answers
    if encodes and not checkpoint.processor.has_text:
        raise ValueError(f"{args.checkpoint} has no text encoder; use vlm_jax.load({args.checkpoint!r}).features([...])")
    if encodes != (args.classes is not None):
        raise ValueError(
            f"{args.checkpoint} is an image-text encoder: use --classes"
            if encodes
            else f"{args.checkpoint} answers questions; --classes is for CLIP and SigLIP"
        )
    if encodes:
        for image in args.image:
            picture_size(image)
        runtime.prepare()
        with bytes_read("reading") as progress:
            rows = min(args.batch, len(args.image))
            encoder = vlm_jax.load(checkpoint, args.mesh, dtype=args.dtype, rows=rows, progress=progress)
        classify(encoder, args)
        return
    settings = checkpoint.processor.defaults.changed(**given)
    questions = read_questions(args.input) if args.input else None
    request = None
    if not questions:
        request = chat_file(args.messages) if args.messages else Request(*from_prompt(args.prompt, args.image, shots))
        checkpoint.processor.lay_out(request.turns, request.sizes, open=True)
    runtime.prepare()
    with bytes_read("reading") as progress:
        adapters = {"adapter": args.adapter} if args.adapter else None
        own = dict(adapters=adapters, merge_adapters=bool(adapters), pickles=args.pickles)
        vlm = vlm_jax.load(checkpoint, args.mesh, dtype=args.dtype, rows=args.batch, progress=progress, **own)
    if questions:
        progress = lambda line: print(line, file=sys.stderr, flush=True)
        refused = answer_file(vlm, questions, output=args.output, settings=settings, progress=progress)
        if refused:
            raise ValueError(
                f"{counted(len(refused), 'question')} left out, see above; mend them and run the same command again"
            )
        return
    if args.attention:
        text, maps = vlm.attention_for_request(request, **given)
        maps.save(args.attention)
        print(text)
    elif args.stream or (args.stream is None and settings.beams == 1 and sys.stdout.isatty()):
        for piece in vlm.generator.stream(request, settings):
            print(piece, end="", flush=True)
        print()
    else:
        print(vlm.answer([request], **given)[0].text)


def end(number: int, frame: FrameType | None) -> NoReturn:
    """Ctrl-C, at any moment: answers are on disk, and an exception within an import may end in a crash."""
    again = "; run the same command again to resume" if any(word.startswith("--input") for word in sys.argv) else ""
    print(f"infer.py: interrupted{again}", file=sys.stderr, flush=True)
    os._exit(128 + number)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        run(args)
    except BrokenPipeError:
        with contextlib.suppress(OSError):
            sys.stdout.close()
        return 141
    except (ValueError, OSError) as error:
        # Every error that a user can cause is one of these, and its message says what to do.
        print(f"infer.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, end)
    sys.exit(main())
