"""Ctrl-C and SIGTERM wait for the end of a step, once."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from autowidth.signals import stop_asked


@pytest.fixture(autouse=True)
def handled() -> object:
    """Handlers as a program in the foreground has them, and afterwards as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_handlers_are_put_back(number: signal.Signals) -> None:
    with stop_asked() as asked:
        assert not asked and asked.signal is None
        signal.raise_signal(number)
        assert asked and asked.signal == number
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_interrupt_is_raised_at_once() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), stop_asked():  # noqa: PT012
        signal.raise_signal(signal.SIGTERM)
        reached.append("waits")
        signal.raise_signal(signal.SIGINT)
        reached.append("never")
    assert reached == ["waits"]


def test_a_second_sigterm_ends_the_process() -> None:
    program = (
        "import os, signal, time\n"
        "from autowidth.signals import stop_asked\n"
        "with stop_asked() as asked:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print(asked.signal.name, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(30)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "SIGTERM\n")


def test_signals_that_are_ignored_stay_ignored_and_threads_have_none() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with stop_asked() as asked:
        signal.raise_signal(signal.SIGTERM)
        assert not asked
    seen = []

    def inside() -> None:
        with stop_asked() as asked:
            seen.append(bool(asked))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [False]
