"""The process in which chat templates are rendered: `template_process.py` starts this file as a script.

A template comes with a checkpoint, from anyone, and Jinja's sandbox keeps it from the system but not from looping for ever or
from filling the memory. So it runs here, within limits of the operating system, where neither can hurt: no more memory than it
is given, no new file, socket or process, and a limit on the time of the CPU that ends it should the parent be gone.

It says `+` when it is ready. A request is its length and a marshalled (number of the template, its source the first time it is
used, variables). A reply is `=`, a length and the text; or, with the reason in the place of the text, `!`, or `?` if the
template cannot be compiled. Nothing of this library is imported: it starts in 0.1 s.
"""

from __future__ import annotations

import datetime
import json
import marshal
import os
import pprint  # noqa: F401  Jinja imports it, and others below, when no file can be opened any more
import signal
import struct
import sys
import textwrap  # noqa: F401
import time
from typing import Any

import jinja2
import jinja2.constants
import jinja2.debug
import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

try:
    import resource
except ImportError:  # no such limits on this system: the parent's clock still ends what takes too long
    resource = None

READY, HEADER = b"+", struct.Struct("<Q")
OPEN_FILES = 3  # the two pipes and what errors are written to


class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant says, which other trainers read; here it is its content."""

    tags = frozenset({"generation"})

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class PublicNamespace(Namespace):
    """Jinja's, without names that begin with an underscore: Python has its own meanings for them."""

    def __init__(*args: Any, **values: Any) -> None:
        self, *given = args
        Namespace.__init__(self)
        for name, value in dict(*given, **values).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace cannot have the attribute {name!r}")
        super().__setitem__(name, value)


def raise_exception(message: Any) -> None:
    raise TemplateError(message)


def strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment() -> ImmutableSandboxedEnvironment:
    """What transformers gives a chat template (its documentation, "Chat templates")."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    made.filters["tojson"] = to_json
    made.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now, "namespace": PublicNamespace}
    return made


def restrict(memory: int) -> None:
    """Gives up what a template has no use for.

    Args:
      memory: bytes, beyond what is in use.
    """
    if resource is None:
        return
    limits = {"RLIMIT_NOFILE": OPEN_FILES, "RLIMIT_FSIZE": 0, "RLIMIT_NPROC": 0, "RLIMIT_CORE": 0}
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm") as file:
            limits["RLIMIT_AS"] = int(file.read().split()[0]) * resource.getpagesize() + memory
    for name, value in limits.items():
        if hasattr(resource, name):
            resource.setrlimit(getattr(resource, name), (value, value))


def reply_to(templates: dict[int, jinja2.Template], made: Any, request: bytes, longest: int) -> tuple[bytes, str]:
    """
    Args:
      templates: compiled so far; a new one is added.
      made: the environment.
      longest: most characters of a text.
    """
    kind = b"?"
    try:
        number, source, variables = marshal.loads(request)
        if source is not None:
            templates[number] = made.from_string(source)
        kind = b"!"
        text = templates[number].render(variables)
        if len(text) <= longest:
            return b"=", text
        return kind, f"it writes {len(text):,} characters; at most {longest:,} are read"
    except MemoryError:
        return kind, "it needs more memory than it is given"
    except RecursionError:
        return kind, "it is nested too deeply"
    except jinja2.TemplateSyntaxError as error:
        return kind, f"line {error.lineno}: {error.message}"
    except TemplateError as error:
        return kind, f"{error.message:.2000}" if error.message else type(error).__name__
    except Exception as error:  # a template can raise anything
        return kind, f"{type(error).__name__}: {error!s:.2000}"


def main(memory: int, seconds: int, longest: int) -> None:
    """Replies until the parent closes the pipe.

    Args:
      memory: bytes that a template may use.
      seconds: of the CPU, for each request.
      longest: most characters of a text.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    source, sink, made = sys.stdin.buffer, sys.stdout.buffer, environment()
    templates: dict[int, jinja2.Template] = {}
    made.from_string("{{ 'a\\n' }}{{ strftime_now('%c %Z') }}").render()  # what is read late: a codec, the time zone
    restrict(memory)
    sink.write(READY)
    sink.flush()
    while len(header := source.read(HEADER.size)) == HEADER.size:
        request = source.read(HEADER.unpack(header)[0])
        if resource is not None:
            hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
            resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + seconds + 1, hard))
        kind, text = reply_to(templates, made, request, longest)
        reply = text.encode("utf-8", "surrogatepass")
        sink.write(kind + HEADER.pack(len(reply)) + reply)
        sink.flush()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
