"""Chat templates are foreign programs: rendered as transformers renders them, within limits, and refused in a line."""

import errno
import marshal
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from vlm_jax.errors import RequestError
from vlm_jax.processing import template_process
from vlm_jax.processing.template_process import TemplateFailure, TemplateProcess
from vlm_jax.processing.templates import TEMPLATES, render

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is <this> é 🐈?\n"}]},
    {"role": "assistant", "content": [{"type": "text", "text": " A 'cat'. "}]},
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["<a>", "<b>"]}
SOURCES = {
    "white space": "{% for m in messages %}\n  {% if loop.first %}\n  {{ m.role }}\n  {% endif %}\n{% endfor %}\n end",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ messages | tojson(true, sort_keys=True) }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "loop controls": "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
    "generation": "{% set x = 1 %}{% for m in messages %}{% generation %}{% set x = 2 %}{{ m.role }}{% endgeneration %}{{ x }}"
    "{% endfor %}",
    "none": "{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}{{ unknown is defined }}{{ unknown }}",
    "tokens": "{{ bos_token + eos_token }}{{ additional_special_tokens }}{{ dict(a=1) }}{{ messages | pprint }}",
    "year": "{{ strftime_now('%Y') }}",
    "macro": "{% macro m(x) %}[{{ x }}{{ caller() }}]{% endmacro %}{% call m(1) %}2{% endcall %}{{ 'b a' | wordwrap(1) }}",
}


@pytest.fixture(scope="module")
def process():
    made = TemplateProcess()
    yield made
    made._end()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(template_process, "SECONDS", 0.3)
    made = TemplateProcess()
    yield made
    made._end()


@pytest.mark.parametrize("source", [*TEMPLATES.values(), *SOURCES.values()], ids=[*TEMPLATES, *SOURCES])
def test_the_text_is_transformers(source):
    for ask in (False, True):
        theirs = render_jinja_template([MESSAGES], chat_template=source, add_generation_prompt=ask, **SPECIAL)[0][0]
        assert render(source, MESSAGES, ask=ask, special=SPECIAL) == theirs


DOUBLED = (
    "{% set ns = namespace(x=['a'*9]) %}{% for i in range(99) %}{% set ns.x = FROM %}{% endfor %}{{ ns.x | string | length }}"
)
REFUSED = {
    "{{ raise_exception('no such role') }}": "^no such role$",
    "{{ a.b }}": "'a' is undefined",
    "{{ ''.__class__.__mro__ }}": "'__class__' of 'str' object is unsafe",
    "{% set n = namespace(__x=1) %}": "cannot have the attribute '__x'",
    "{{ messages[0].update({}) }}": "unsafe",
    "a\n{% for %}": "^line 2: Expected an expression",
    "{{ 1 / 0 }}": "ZeroDivisionError: division by zero",
    "{{ messages + 1 }}": "TypeError: can only concatenate list",
    "{{ range(10**9) }}": "Range too big",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "nested too deeply",
    "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}": "nested too deeply",
    "{{ 'a' * 10**10 }}": "more memory",
    "{{ 'a' | center(10**10) }}": "more memory",
    "{{ '%10000000000d' | format(1) }}": "more memory",
    "{{ '{:10000000000}'.format(1) }}": "more memory",
    "{{ 'a' * (2**24 + 1) }}": "writes 16,777,217 characters; at most 16,777,216",
    DOUBLED.replace("FROM", "[ns.x[0] ~ ns.x[0]]"): "more memory",
}


@pytest.mark.parametrize("source", REFUSED, ids=lambda source: source[:30])
def test_a_template_that_is_refused(process, source):
    with pytest.raises(TemplateFailure, match=REFUSED[source]):
        process.render(source, {"messages": MESSAGES})
    alive = process._process.pid
    assert process.render("{{ messages[0].role }}", {"messages": MESSAGES}) == "system" and process._process.pid == alive


NEVER = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("source", [NEVER, DOUBLED.replace("FROM", "[ns.x, ns.x]")], ids=["loops", "shared lists"])
def test_a_template_that_never_ends(quick, source):
    for _ in range(template_process.PATIENCE):
        with pytest.raises(TemplateFailure, match=r"takes more than 0\.3 s"):
            quick.render(source, {})
        assert quick.render("fine", {}) == "fine"
    begin = time.monotonic()
    with pytest.raises(TemplateFailure, match="is not rendered again"):
        quick.render(source, {})
    assert time.monotonic() - begin < template_process.SECONDS


def test_the_error_names_the_turns():
    with pytest.raises(
        RequestError, match=r"^the checkpoint's chat template refuses turns of system, user, assistant: line 1: "
    ):
        render("{% if %}", MESSAGES, ask=True, special={})


OPENING = """
import os, socket, sys
from vlm_jax.processing.template_worker import restrict
restrict(1 << 29)
for step in (lambda: open("/etc/passwd"), lambda: open(sys.argv[1], "w"), socket.socket, os.pipe):
    try:
        step()
    except OSError as error:
        print(error.errno)
"""


def test_a_template_cannot_open_a_file(tmp_path):
    """What breaks out of the sandbox finds a process that can open neither files nor sockets."""
    out = subprocess.run([sys.executable, "-c", OPENING, str(tmp_path / "x")], capture_output=True, text=True)
    assert out.stdout.split() == [str(errno.EMFILE)] * 4, out.stderr


def test_from_many_threads_at_once(process):
    found = []

    def ask(number):
        found.extend(process.render("{{ n }}", {"n": number}) == str(number) for _ in range(50))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 400 and all(found)


def test_a_process_that_is_gone_is_started_again(process):
    assert process.render("{{ 1 }}", {}) == "1"
    os.kill(process._process.pid, signal.SIGKILL)
    with pytest.raises(TemplateFailure, match=r"ends the process that renders it \(signal 9\)"):
        process.render("{{ 1 }}", {})
    assert process.render("{{ 1 }}", {}) == "1"


def test_a_process_that_cannot_start(process, monkeypatch, tmp_path):
    process._end()
    with monkeypatch.context() as patched:
        patched.setattr(template_process, "WORKER", tmp_path / "nowhere.py")
        with pytest.raises(TemplateFailure, match=r"cannot start .*nowhere.py \(exit status 2\)"):
            process.render("{{ 1 }}", {})
    assert process.render("{{ 1 }}", {}) == "1"


def test_an_interruption_leaves_no_half_reply(process, monkeypatch):
    assert process.render("{{ 1 }}", {}) == "1"
    assert os.getpgid(process._process.pid) != os.getpgid(0), "the keyboard's would end it too"

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(template_process, "_read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            process.render("{{ 2 }}", {})
    assert process.render("{{ 3 }}", {}) == "3"


SCRIPT = """
import multiprocessing, os, sys
from vlm_jax.processing.template_process import PROCESS
render = lambda name: print(name, PROCESS.render("{{ n }}", {"n": name}), PROCESS._process.pid, flush=True)
def main():
    render("parent")
    if not os.fork():
        render("fork")
        os._exit(0)
    os.wait()
    child = multiprocessing.get_context("fork").Process(target=render, args=("daemon",), daemon=True)
    child.start()
    child.join()
    render("again")
    if "--kill" in sys.argv:
        os.kill(os.getpid(), 9)
main()
"""


@pytest.mark.parametrize("end", ["", "--kill"])
def test_in_workers_and_nothing_is_left_behind(end):
    out = subprocess.run([sys.executable, "-c", SCRIPT, end], capture_output=True, text=True, timeout=30)
    lines = [line.split() for line in out.stdout.splitlines()]
    assert [line[:2] for line in lines] == [[name, name] for name in ("parent", "fork", "daemon", "again")], out.stderr
    numbers = [line[2] for line in lines]
    assert numbers[0] == numbers[3] and len(set(numbers)) == 3
    assert out.stderr == "" and out.returncode == (-9 if end else 0)
    deadline = time.monotonic() + 5
    while alive := [number for number in numbers if Path(f"/proc/{number}/cmdline").exists() and _worker(number)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.02)


def _worker(number):
    try:
        return b"template_worker" in Path(f"/proc/{number}/cmdline").read_bytes()
    except OSError:
        return False


def test_a_worker_without_a_parent_ends_itself():
    """Its template never ends, and there is nobody to end it."""
    worker = Path(template_process.__file__).with_name("template_worker.py")
    paths = os.pathsep.join(sys.path)
    command = [sys.executable, "-S", "-P", worker, str(1 << 28), "0", "100"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": paths})
    request = marshal.dumps((0, NEVER, {}))
    process.stdin.write(template_process.HEADER.pack(len(request)) + request)
    process.stdin.flush()
    assert process.wait(20) == -signal.SIGXCPU
    process.stdin.close()
    process.stdout.close()
