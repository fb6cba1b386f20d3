"""infer.py and vlm_jax.load: what comes out, and what is said when something is wrong."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from PIL import Image

import infer
import vlm_jax
from tests.tiny import mesh_of, tiny_run, write_data
from vlm_jax import api
from vlm_jax.processing.tokenizer import train_tokenizer
from vlm_jax.training.checkpoint import Checkpoints, claim
from vlm_jax.training.step import Trainer

NEW = "--max-new-tokens=8"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a run that was saved before its first step, with pictures 0.png, 1.png, ... in data/."""
    folder = tmp_path_factory.mktemp("runs") / "a"
    config = tiny_run()
    claim(folder, config)
    train_tokenizer(["which colour? red green blue"] * 9, config.data.vocab_size).save(folder / "tokenizer")
    mesh = mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        checkpoints = Checkpoints(folder, 1, 0)
        checkpoints.save(Trainer(config, mesh).init(), 4)
        checkpoints.wait()
        checkpoints.close()
    write_data(folder / "data", 4)
    return folder


@pytest.fixture(autouse=True)
def shared(monkeypatch, tmp_path_factory):
    """Programs stay compiled from test to test, and the user's cache is left alone."""
    monkeypatch.setattr(api, "load", load)
    monkeypatch.setattr("vlm_jax.compilation_cache.enable", lambda: None)


load = functools.cache(api.load)


def fails(capsys, *argv: str) -> str:
    """The one line on stderr of a command that exits with 2."""
    try:
        code = infer.main(list(argv))
    except SystemExit as error:  # argparse's way
        code = error.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("infer.py: ") and err.count("\n") == 1
    return err


def succeeds(capsys, *argv: str) -> str:
    assert infer.main(list(argv)) == 0
    return capsys.readouterr().out


def test_an_answer_is_what_generate_gives(capsys, run):
    picture = str(run / "data" / "1.png")
    asked = (f"--checkpoint={run}", f"--image={picture}", "--prompt=which colour?", NEW)
    expected = vlm_jax.load(str(run), None, None, None, 16).generate("which colour?", [picture], max_new_tokens=8)
    assert expected
    assert succeeds(capsys, *asked) == expected + "\n"
    assert succeeds(capsys, *asked, "--stream") == expected + "\n"


def test_attention_draws_a_picture(capsys, run, tmp_path):
    picture, out = run / "data" / "1.png", tmp_path / "looks.png"
    succeeds(capsys, f"--checkpoint={run}", f"--image={picture}", "--prompt=which colour?", NEW, f"--attention={out}")
    with Image.open(out) as drawn:
        assert min(drawn.size) > 200


def test_shots_come_before_the_question(run):
    vlm = load(str(run), None, None, None, 16)
    picture = run / "data" / "1.png"
    request = vlm.request("which?", [picture], [([picture], "what?", "red"), ([], "and?", "blue")])
    tokens = vlm.generator.prompt(request, 0, api.Settings()).layout.tokens
    assert vlm.generator.processor.tokenizer.decode(tokens) == "<BOS><image>what? red<EOC>and? blue<EOC><image>which?"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt=x", "--image=missing.png"], "missing.png: there is no such file"),
        (["--prompt=x", "--image={run}/config.json"], "config.json: is not a picture"),
        (["--prompt=<image> and <image>", "--image={run}/data/1.png"], "2 <image> markers and 1 image:"),
        (["--prompt=<image>?"], "1 <image> marker and 0 images"),
        (["--prompt=" + "long " * 300], "but the model reads at most 256"),
        (["--prompt=x", "--mesh=tensor=3"], "'tensor=3' does not fit: there are 8 devices"),
        (["--prompt=x", "--mesh=model=8"], "expected sizes for some of data, fsdp, tensor"),
        (["--prompt=x", "--mesh=tensor=8", "--stream"], "streaming works on one device"),
        (["--prompt=x", "--attention=out.png"], "needs a picture"),
        (["--prompt=x", "--step=3"], "no checkpoint of step 3; it has [4]"),
        (["--prompt=x", "--temperature=-1"], "temperature=-1.0: expected 0 (greedy) or more"),
        (["--prompt=x", "--top-p=0"], "top_p=0.0"),
        (["--prompt=x", "--checkpoint=nowhere"], "no checkpoint at nowhere"),
        (["--prompt=x", "--checkpoint={run}/data"], "holds no config.json"),
        ([], "give either --prompt or --input"),
        (["--input=a.jsonl"], "--input and --output go together"),
        (["--input=nowhere.jsonl", "--output=b.jsonl"], "nowhere.jsonl: No such file"),
        (["--prompt=x", "--max-new-tokens=many"], "invalid int value: 'many'"),
    ],
    ids=str,
)
def test_errors_are_one_line(capsys, run, argv, message):
    argv = [word.replace("{run}", str(run)) for word in argv]
    assert message in fails(capsys, f"--checkpoint={run}", *argv)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "x"', "in.jsonl:2: not JSON"),
        ("[1]", "in.jsonl:2: expected an object"),
        ('{"id": 1}', "in.jsonl:2: 'prompt' is missing"),
        ('{"prompt": 3}', "in.jsonl:2: 'prompt' is 3; expected a str"),
        ('{"prompt": "x", "picture": "a"}', "in.jsonl:2: unknown key 'picture'"),
        ('{"prompt": "x", "image": "a.png"}', "a.png: there is no such file"),
        ('{"prompt": "<image><image>", "image": "0.png"}', "in.jsonl:2: the prompt has 2 <image> markers and 1 image"),
        (json.dumps({"prompt": "long " * 300}), "in.jsonl:2: the prompt is"),
        ('{"prompt": "x", "shots": [{"question": "y"}]}', "in.jsonl:2: shot 1: 'answer' is missing"),
    ],
)
def test_a_bad_line_is_named(capsys, run, line, message):
    path = run / "data" / "in.jsonl"
    path.write_text('{"prompt": "x", "image": "0.png"}\n' + line + "\n")
    output = run / "bad.jsonl"
    assert message in fails(capsys, f"--checkpoint={run}", f"--input={path}", f"--output={output}")
    assert not output.exists()


def questions(run: Path) -> Path:
    path = run / "data" / "questions.jsonl"
    entries = [
        {"id": "a", "prompt": "which colour?", "image": "0.png"},
        {"id": "b", "prompt": "how many colours do you see in all of this?"},
        {"prompt": "é?", "images": ["1.png", "2.png"], "shots": [{"image": "3.png", "question": "which?", "answer": "red"}]},
        {"id": "d", "prompt": "which?", "image": "3.png"},
        {"id": "e", "prompt": "which colour?", "image": "2.png"},
    ]
    path.write_text("\n\n".join(json.dumps(entry) for entry in entries))
    return path


def read(path: Path) -> dict[int, dict]:
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({entry["line"] for entry in entries}) == len(entries)
    return {entry["line"]: entry for entry in entries}


def test_a_file_of_questions_goes_on_where_it_stopped(capsys, run, tmp_path, monkeypatch):
    source, whole, parts = questions(run), tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    command = (f"--checkpoint={run}", f"--input={source}", NEW, "--temperature=1", "--batch=2")
    succeeds(capsys, *command, f"--output={whole}")
    expected = read(whole)
    assert sorted(expected) == [1, 3, 5, 7, 9]
    assert expected[5]["id"] == 5 and expected[1]["id"] == "a" and expected[3]["prompt"].startswith("how many")

    generator = load(str(run), None, None, None, 2).generator
    batches, seen = type(generator).batches, []

    def interrupted(self, *args):
        for batch in batches(self, *args):
            yield batch
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(generator), "batches", interrupted)
        assert infer.main([*command, f"--output={parts}"]) == 130
        assert "goes on from there" in capsys.readouterr().err
    assert len(read(parts)) == 2
    with parts.open("a") as file:
        file.write('{"line": 7, "id"')  # a line that a crash cut short

    def counted(self, requests, settings):
        seen.extend(requests)
        return batches(self, requests, settings)

    with monkeypatch.context() as patch:
        patch.setattr(type(generator), "batches", counted)
        succeeds(capsys, *command, f"--output={parts}")
    assert len(seen) == 3
    assert read(parts) == expected
    succeeds(capsys, *command, f"--output={parts}")  # nothing is left
    assert read(parts) == expected

    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(expected[1] | {"prompt": "what else?"}) + "\n")
    before = other.read_text()
    assert "is not an answer to a line of the input" in fails(capsys, *command, f"--output={other}")
    assert other.read_text() == before


def test_help_teaches_and_importing_is_cheap():
    shown = subprocess.run([sys.executable, "infer.py", "--help"], capture_output=True, text=True, check=True)
    assert "--shot c.png" in shown.stdout and not shown.stderr
    code = "import sys, vlm_jax, infer; assert 'jax' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
