"""infer.py and vlm_jax.load: what comes out, and what is said when something is wrong."""

import base64
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import infer
import vlm_jax
from vlm_jax import api
from vlm_jax.files import lock
from vlm_jax.generation import answer_file

NEW = "--max-new-tokens=8"


@pytest.fixture(autouse=True)
def shared(monkeypatch, tmp_path_factory):
    """Programs stay compiled from test to test, and the user's cache is left alone."""
    monkeypatch.setattr(api, "load", load)
    monkeypatch.setattr("vlm_jax.runtime.prepare", lambda: None)


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
    expected = vlm_jax.load(str(run), rows=16).generate("which colour?", [picture], max_new_tokens=8)
    assert expected
    assert succeeds(capsys, *asked) == expected + "\n"
    assert succeeds(capsys, *asked, "--stream") == expected + "\n"


def test_attention_draws_a_picture(capsys, run, tmp_path):
    picture, out = run / "data" / "1.png", tmp_path / "looks.png"
    succeeds(capsys, f"--checkpoint={run}", f"--image={picture}", "--prompt=which colour?", NEW, f"--attention={out}")
    with Image.open(out) as drawn:
        assert min(drawn.size) > 200


def test_shots_come_before_the_question(run):
    vlm = load(str(run), rows=16)
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
        (["--prompt=x\udcff"], "a text has half of a surrogate pair, or bytes that are not UTF-8: 'x\\udcff'"),
        (["--prompt=x", "--stop=\udcff"], "stop has half of a surrogate pair"),
        (["--prompt=x", "--image=/dev/zero"], "/dev/zero: is not a regular file"),
        (["--prompt=" + "long " * 300], "but the model reads at most 256"),
        (["--prompt=x", "--mesh=tensor=3"], "'tensor=3' does not fit: there are 8 devices"),
        (["--prompt=x", "--mesh=model=8"], "expected sizes for some of data, fsdp, tensor"),
        (["--prompt=x", "--attention=out.png"], "needs a picture"),
        (["--prompt=x", "--step=3"], "no checkpoint of step 3; it has [4]"),
        (["--prompt=x", "--temperature=-1"], "temperature=-1.0: expected 0 (greedy) or more"),
        (["--prompt=x", "--top-p=0"], "top_p=0.0"),
        (["--prompt=x", "--checkpoint=nowhere"], "no checkpoint at nowhere"),
        (["--prompt=x", "--checkpoint={run}/data"], "holds no config.json"),
        ([], "give one of --prompt, --messages and --input"),
        (["--prompt=x", "--messages=a.json"], "give one of --prompt, --messages and --input"),
        (["--messages=a.json", "--image=a.png"], "with --messages, images belong in the file"),
        (["--messages=nowhere.json"], "--messages=nowhere.json: No such file"),
        (["--messages={run}/data/0.png"], "0.png: is not UTF-8"),
        (["--messages={run}/data/data.jsonl"], "data.jsonl: is not JSON: Extra data at line 2"),
        (["--input=a.jsonl"], "--input and --output go together"),
        (["--input=nowhere.jsonl", "--output=b.jsonl"], "nowhere.jsonl: No such file"),
        (["--prompt=x", "--max-new-tokens=many"], "invalid int value: 'many'"),
    ],
    ids=str,
)
def test_errors_are_one_line(capsys, run, argv, message):
    argv = [word.replace("{run}", str(run)) for word in argv]
    assert message in fails(capsys, f"--checkpoint={run}", *argv)


def asked(*messages: dict) -> str:
    """A line of a file of questions."""
    return json.dumps({"messages": messages})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "x"', "in.jsonl:2: is not JSON"),
        ("[" * 100_000, "in.jsonl:2: is nested too deeply"),
        ('{"prompt": "\\ud800"}', "in.jsonl:2: the line has half of a surrogate pair"),
        ('{"id": "\\udfff", "prompt": "x"}', "in.jsonl:2: the line has half of a surrogate pair"),
        ("[1]", "in.jsonl:2: expected an object"),
        ('{"id": 1}', "in.jsonl:2: 'prompt' is missing"),
        ('{"prompt": 3}', "in.jsonl:2: 'prompt' is 3; expected a str"),
        ('{"prompt": "x", "picture": "a"}', "in.jsonl:2: unknown key 'picture'"),
        ('{"prompt": "x", "image": "a.png"}', "a.png: there is no such file"),
        ('{"prompt": "<image><image>", "image": "0.png"}', "in.jsonl:2: the prompt has 2 <image> markers and 1 image"),
        ('{"prompt": "x", "shots": [{"question": "y"}]}', "in.jsonl:2: shot 1: 'answer' is missing"),
        ('{"messages": "x", "prompt": "x"}', "in.jsonl:2: unknown key 'prompt'; expected ['id', 'messages']"),
        (asked({"role": "human", "content": "x"}), "in.jsonl:2: message 1 has the role 'human'"),
        (asked({"role": "assistant", "content": "x"}), "in.jsonl:2: the last message is the assistant's"),
        (asked({"role": "user", "content": [{"image": "a.png"}]}), "data/a.png: there is no such file"),
        (
            asked({"role": "user", "content": [{"image": 3}]}),
            "message 1, part 1: a picture is 3; expected a file's path",
        ),
    ],
)
def test_a_bad_line_is_named(capsys, run, tmp_path, line, message):
    path = run / "data" / "in.jsonl"
    path.write_text("\n" + line + "\n")
    output = tmp_path / "out.jsonl"
    assert message in fails(capsys, f"--checkpoint={run}", f"--input={path}", f"--output={output}")
    assert not output.exists()


def test_questions_that_cannot_be_asked_leave_the_others_theirs(capsys, run, tmp_path, monkeypatch):
    """Known from the file, from the prompt, or from the pixels; a file is laid out some batches at a time."""
    monkeypatch.setattr(answer_file, "WINDOW", 2)
    broken = (run / "data" / "0.png").read_bytes()[:-30]
    (run / "data" / "broken.png").write_bytes(broken)
    lines = [
        '{"prompt": "x\u2028\u0085y"}',
        '{"prompt": "y"',
        '{"prompt": "' + "long " * 300 + '"}',
        '{"prompt": "z", "image": "broken.png"}',
        '{"prompt": "z", "image": "1.png"}',
        '{"prompt": "v"}',
    ]
    path, output = run / "data" / "some.jsonl", tmp_path / "out.jsonl"
    path.write_bytes("\n".join(lines).encode() + b'\n{"prompt": "\xff"}\n')
    command = (f"--checkpoint={run}", f"--input={path}", f"--output={output}", "--batch=2", NEW)
    assert infer.main(list(command)) == 2
    said = capsys.readouterr().err
    for problem in (
        "some.jsonl:2: is not JSON",
        "some.jsonl:3: the prompt is",
        "some.jsonl:4: picture",
        "some.jsonl:7: is not UTF-8",
        "4 questions left out",
    ):
        assert problem in said
    before = read(output)
    assert sorted(before) == [1, 5, 6] and before[1]["prompt"] == "x\u2028\u0085y"
    lines[1:4] = '{"prompt": "y"}', '{"prompt": "short"}', '{"prompt": "z", "image": "0.png"}'
    path.write_text("\n".join(lines))
    succeeds(capsys, *command)
    assert sorted(read(output)) == [1, 2, 3, 4, 5, 6] and before.items() <= read(output).items()


def test_a_question_that_was_changed_is_asked_again(capsys, run, tmp_path):
    """Another picture under its name, one more picture, other bytes inline, another solved example."""
    picture = lambda number: (run / "data" / f"{number}.png").read_bytes()
    inline = lambda number: {"image": f"data:image/png;base64,{base64.b64encode(picture(number)).decode()}"}
    chat = lambda *parts: {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "which?"}]}]}
    shots = lambda answer: {"prompt": "which?", "shots": [{"question": "what?", "answer": answer}]}
    for name, number in {"a.png": 0, "b.png": 1}.items():
        (tmp_path / name).write_bytes(picture(number))
    lines = [{"prompt": "which?", "image": "a.png"}, {"prompt": "which?", "image": "b.png"}, {"prompt": "which?"}]
    lines += [chat(inline(0)), shots("red"), {"prompt": "which?"}]
    path, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    command = (f"--checkpoint={run}", f"--input={path}", f"--output={output}", NEW)
    succeeds(capsys, *command)
    before = read(output)
    (tmp_path / "b.png").write_bytes(picture(2))
    lines[2:5] = {"prompt": "which?", "image": "a.png"}, chat(inline(1)), shots("blue")
    path.write_text("\n".join(map(json.dumps, lines)))
    assert infer.main(list(command)) == 0
    said = capsys.readouterr().err
    assert "2 of 6 were answered already" in said and "4 questions will be asked again" in said and "6/6" in said
    after = read(output)
    assert {number for number in after if after[number] == before[number]} == {1, 6}
    assert {number for number in after if after[number]["asked"] == before[number]["asked"]} == {1, 6}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png", "in.jsonl", "out.jsonl"]


def test_one_question_with_broken_pixels(capsys, run, tmp_path):
    (tmp_path / "broken.png").write_bytes((run / "data" / "0.png").read_bytes()[:-30])
    (tmp_path / "in.jsonl").write_text('{"prompt": "which?", "image": "broken.png"}')
    command = (f"--checkpoint={run}", f"--input={tmp_path / 'in.jsonl'}", f"--output={tmp_path / 'out.jsonl'}", NEW)
    assert infer.main(list(command)) == 2
    assert "1 question left out" in capsys.readouterr().err


def test_somebodys_file_is_left_alone(capsys, run, tmp_path):
    (tmp_path / "notes").write_text("no newline behind it")
    command = (f"--checkpoint={run}", f"--input={questions(run)}", f"--output={tmp_path / 'notes'}", NEW)
    assert "line 1 is not an answer to a line of the input" in fails(capsys, *command)
    assert (tmp_path / "notes").read_text() == "no newline behind it"


def test_two_at_once_do_not_write_one_file(capsys, run, tmp_path):
    output = tmp_path / "out.jsonl"
    command = (f"--checkpoint={run}", f"--input={questions(run)}", f"--output={output}", NEW)
    with output.open("a") as file:
        lock(file, "")
        assert "another infer.py is writing it" in fails(capsys, *command)
    succeeds(capsys, *command)


@pytest.mark.usefixtures("within_a_minute")
def test_an_output_that_is_no_file(capsys, run, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for name in (tmp_path / "fifo", tmp_path, "/dev/full"):
        command = (f"--checkpoint={run}", f"--input={questions(run)}", f"--output={name}", NEW)
        assert f"--output={name}: is not a regular file" in fails(capsys, *command)


def test_a_chat_in_a_file(capsys, run, tmp_path):
    """Of several turns, its pictures beside it; the same chat as a line of a file of questions."""
    chats = run / "data" / "chats"
    chats.mkdir()
    content = lambda *parts: {"role": "user", "content": list(parts)}
    image = lambda name: {"type": "image", "image": f"../{name}"}
    said = lambda text: {"type": "text", "text": text}
    turns = [content(said("which colour?"), image("0.png")), {"role": "assistant", "content": "red"}]
    (chats / "a.json").write_text(json.dumps([*turns, content(image("1.png"), said("and é?"))]))
    picture = lambda number: str(run / "data" / f"{number}.png")
    vlm = load(str(run), rows=16)
    shots = [([picture(0)], "which colour?", "red")]
    expected = vlm.generate("and é?", [picture(1)], shots, max_new_tokens=8)
    command = (f"--checkpoint={run}", NEW)
    assert succeeds(capsys, *command, f"--messages={chats / 'a.json'}") == expected + "\n"
    lines = [{"id": "c", "messages": json.loads((chats / "a.json").read_text())}, {"prompt": "which?", "image": "../2.png"}]
    (chats / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    succeeds(capsys, *command, f"--input={chats / 'in.jsonl'}", f"--output={tmp_path / 'out.jsonl'}")
    answers = read(tmp_path / "out.jsonl")
    assert all(len(answer.pop("asked")) == 16 for answer in answers.values())
    assert answers == {
        1: {"line": 1, "id": "c", "prompt": "and é?", "answer": expected},
        2: {"line": 2, "id": 2, "prompt": "which?", "answer": vlm.generate("which?", [picture(2)], max_new_tokens=8)},
    }


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
    entries = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    assert len({entry["line"] for entry in entries}) == len(entries)
    return {entry["line"]: entry for entry in entries}


def test_a_file_of_questions_goes_on_where_it_stopped(capsys, run, tmp_path, monkeypatch):
    source, whole, parts = questions(run), tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    command = (f"--checkpoint={run}", f"--input={source}", NEW, "--temperature=1", "--batch=2")
    succeeds(capsys, *command, f"--output={whole}")
    expected = read(whole)
    assert sorted(expected) == [1, 3, 5, 7, 9]
    assert expected[5]["id"] == 5 and expected[1]["id"] == "a" and expected[3]["prompt"].startswith("how many")

    generator = load(str(run), rows=2).generator
    batches, seen = type(generator).batches, []

    def interrupted(self, *args, **rest):
        for batch in batches(self, *args, **rest):
            yield batch
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(generator), "batches", interrupted)
        with pytest.raises(KeyboardInterrupt):
            infer.main([*command, f"--output={parts}"])
        capsys.readouterr()
    assert len(read(parts)) == 2
    with parts.open("a") as file:
        file.write('{"line": 7, "id"')  # a line that a crash cut short

    def counted(self, prompts, settings, **rest):
        seen.extend(prompts)
        return batches(self, prompts, settings, **rest)

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


@pytest.mark.parametrize("seconds", [0.1, 0.6])
def test_ctrl_c_is_one_line(run, tmp_path, seconds):
    """Also while modules are imported, which an exception could crash."""
    root = Path(__file__).parents[1]
    command = [
        sys.executable,
        "infer.py",
        f"--checkpoint={run}",
        f"--input={questions(run)}",
        f"--output={tmp_path / 'out.jsonl'}",
    ]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, "infer.py: interrupted; run the same command again to resume\n")
