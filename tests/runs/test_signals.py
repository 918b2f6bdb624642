"""Ending on a signal: one sentence, the exit code, what is tidied, at any moment.

The processes here are light.
"""

import os
import signal
import subprocess
import sys
import time

import pytest

from helpers.cli import ROOT

HEAD = f"""import os, signal, sys, time
sys.path.insert(0, {str(ROOT / "src")!r})
from visprompt.runs import signals
signals.install()
def tell(word): os.write(1, word.encode() + b"\\n")
"""
SENTENCES = {
    signal.SIGINT: "interrupted: run the same command again to go on where it stopped\n",
    signal.SIGTERM: "terminated: run the same command again to go on where it stopped\n",
}
BOTH = pytest.mark.parametrize("number", SENTENCES, ids=lambda number: number.name)


def started(code, **env):
    """A process that has told that it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD + code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | env,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def ended(process, *numbers, pause=0.0):
    """Exit code, output and errors of a process after signals."""
    for number in numbers:
        process.send_signal(number)
        time.sleep(pause)
    out, errors = process.communicate(timeout=20)
    return process.returncode, out, errors


@BOTH
def test_a_signal_unwinds_says_one_sentence_and_gives_its_code(number):
    process = started("signals.started()\ntry:\n  tell('ready'); time.sleep(60)\nfinally: tell('tidied')")
    assert ended(process, number) == (128 + number, "tidied\n", SENTENCES[number])


@BOTH
def test_while_the_first_imports_run_there_is_nothing_to_unwind(tmp_path, number):
    body = "try: tell('ready'); time.sleep(60)\nexcept BaseException: tell('swallowed')\n"
    (tmp_path / "heavy.py").write_text(f"import sys, time\ntell = sys.modules['__main__'].tell\n{body}")
    process = started(f"sys.path.insert(0, {str(tmp_path)!r})\nimport heavy\ntime.sleep(60)")
    assert ended(process, number) == (128 + number, "", SENTENCES[number])


def test_temporary_folders_of_the_first_imports_are_removed(tmp_path):
    body = "folder = tempfile.TemporaryDirectory()\nsys.modules['__main__'].tell('ready')\ntime.sleep(60)\n"
    (tmp_path / "heavy.py").write_text(f"import sys, tempfile, time\n{body}")
    (tmp_path / "tmp").mkdir()
    process = started(f"sys.path.insert(0, {str(tmp_path)!r})\nimport heavy", TMPDIR=str(tmp_path / "tmp"))
    assert ended(process, signal.SIGTERM) == (143, "", SENTENCES[signal.SIGTERM])
    assert list((tmp_path / "tmp").iterdir()) == []


def test_an_import_in_the_middle_of_work_is_unwound(tmp_path):
    (tmp_path / "late.py").write_text(
        "import sys, time\nsys.modules['__main__'].tell('ready')\ntime.sleep(60)\n"
    )
    code = (
        f"signals.started()\nsys.path.insert(0, {str(tmp_path)!r})\ntry: import late\nfinally: tell('tidied')"
    )
    assert ended(started(code), signal.SIGTERM) == (143, "tidied\n", SENTENCES[signal.SIGTERM])


@BOTH
def test_a_second_signal_ends_at_once(number):
    process = started("try:\n  tell('ready'); time.sleep(60)\nfinally: time.sleep(60)")
    begun = time.monotonic()
    assert ended(process, number, number, pause=0.7) == (128 + number, "", SENTENCES[number])
    assert time.monotonic() - begun < 3


def test_the_same_signal_twice_within_a_moment_is_one():
    process = started("try:\n  tell('ready'); time.sleep(60)\nfinally: time.sleep(0.5); tell('tidied')")
    assert ended(process, signal.SIGTERM, signal.SIGTERM, pause=0.1) == (
        143,
        "tidied\n",
        SENTENCES[signal.SIGTERM],
    )


def test_a_cleanup_that_hangs_ends_after_some_patience():
    process = started(
        "signals._PATIENCE = 0.5\ntry:\n  tell('ready'); time.sleep(60)\nfinally: time.sleep(60)"
    )
    assert ended(process, signal.SIGTERM) == (143, "", SENTENCES[signal.SIGTERM])


def test_a_finaliser_does_not_swallow_a_signal():
    code = "class Slow:\n  def __del__(self): tell('ready'); time.sleep(60)\nslow = Slow()\ndel slow\ntime.sleep(60)"
    assert ended(started(code), signal.SIGTERM) == (143, "", SENTENCES[signal.SIGTERM])


def test_a_callback_of_the_exit_does_not_swallow_a_signal():
    process = started("import atexit\natexit.register(lambda: (tell('ready'), time.sleep(60)))")
    assert ended(process, signal.SIGTERM) == (143, "", SENTENCES[signal.SIGTERM])


def test_a_signal_that_a_library_swallowed_is_raised_at_the_next_check():
    code = "try: tell('ready'); time.sleep(60)\nexcept BaseException: pass\nsignals.check()\ntell('goes on')"
    assert ended(started(code), signal.SIGTERM) == (143, "", SENTENCES[signal.SIGTERM])


def test_an_error_after_a_signal_is_a_consequence_of_it():
    code = "with signals.consequences():\n  try: tell('ready'); time.sleep(60)\n  finally: 1 / 0"
    assert ended(started(code), signal.SIGTERM) == (143, "", SENTENCES[signal.SIGTERM])


def test_what_is_deferred_is_finished_first():
    code = "with signals.deferred():\n  tell('ready'); time.sleep(1); tell('finished')\ntell('goes on')"
    assert ended(started(code), signal.SIGTERM) == (143, "finished\n", SENTENCES[signal.SIGTERM])


def test_a_forked_child_has_the_handlers_of_python():
    code = "tell('ready')\nif os.fork(): time.sleep(60)\n"
    code += "tell(str(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)); os._exit(0)"
    process = started(code)
    assert process.stdout.readline() == "True\n"
    assert ended(process, signal.SIGTERM)[0] == 143


@pytest.mark.parametrize("env", [{"VISPROMPT_PARENT": "1"}, {"RANK": "1"}, {"SLURM_PROCID": "3"}])
def test_one_process_of_a_run_speaks(env):
    assert ended(started("tell('ready'); time.sleep(60)", **env), signal.SIGTERM) == (143, "", "")


def test_handlers_of_somebody_else_stay():
    code = (
        f"import signal, sys; sys.path.insert(0, {str(ROOT / 'src')!r}); from visprompt.runs import signals\n"
    )
    code += "signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, print); signals.install()\n"
    code += "assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN; assert signal.getsignal(signal.SIGTERM) is print"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20)


def test_every_entry_point_handles_signals_before_it_imports_anything_else():
    for script in (ROOT / "src").glob("*.py"):
        lines = [
            line for line in script.read_text().splitlines() if line and not line.startswith(('"""', "#"))
        ]
        assert lines[0] == "from visprompt.runs import signals"
        assert lines[2].startswith("    signals.install()")


def test_the_module_loads_nothing_that_takes_time():
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r}); before = set(sys.modules)\n"
    code += "import visprompt.runs.signals\n"
    code += "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, timeout=20
    )
    assert set(done.stdout.split()) <= set(sys.stdlib_module_names) | {"visprompt"}
    assert not {"asyncio", "logging", "subprocess", "inspect"} & set(done.stdout.split())
