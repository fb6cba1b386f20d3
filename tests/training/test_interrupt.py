"""Signals before, between and after steps: heard at once, nothing lost."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from vlm_jax.training.interrupt import Interrupt, Interrupted

ROOT = Path(__file__).parents[2]


def test_before_the_first_step_a_signal_ends_the_start():
    with pytest.raises(Interrupted, match="SIGTERM before the first step"), Interrupt():
        signal.raise_signal(signal.SIGTERM)
    # Code that passes over errors, as reading a damaged checkpoint does, must not pass over it.
    assert not issubclass(Interrupted, Exception)


def test_once_armed_the_first_is_remembered_and_a_second_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        interrupt.defer_signals()
        assert not interrupt.should_stop(agree=True)
        signal.raise_signal(signal.SIGINT)
        assert interrupt.should_stop(agree=True) and interrupt.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("armed", [False, True])
def test_a_signal_is_heard_while_compiled_code_runs(armed):
    # A wait in C for a lock that is never released: Python cannot run its handlers meanwhile, as in a compilation.
    script = f"""
        import ctypes, sys
        from vlm_jax.training.interrupt import Interrupt, Interrupted, handle_signals
        handle_signals()
        try:
            with Interrupt() as interrupt:
                if {armed}:
                    interrupt.defer_signals()
                print("ready", flush=True)
                ctypes.CDLL(None).usleep(3_000_000)
                ctypes.CDLL(None).usleep(3_000_000)
            sys.exit(7 if interrupt.signal else 8)
        except Interrupted as interrupted:
            sys.exit(128 + interrupted.signal)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGINT)
    said = process.stderr.readline()
    process.wait(timeout=60)
    if armed:
        assert said == "SIGINT: finishing and saving the current step first\n" and process.returncode == 7
    else:
        assert said.startswith("SIGINT before the first step; run the same command again") and process.returncode == 130
