"""Exit codes, and one line for each mistake."""

import errno
import os
import subprocess
import sys

import pytest

from utils.errors import RunError, UserError, run_main


def failing(error):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    "error, code, line",
    [
        (UserError("no cake in kitchen; bake one"), 2, "eat.py: error: no cake in kitchen; bake one\n"),
        (RunError("loss is nan at step 3"), 1, "eat.py: error: loss is nan at step 3\n"),
        (UserError("two\n  lines"), 2, "eat.py: error: two lines\n"),
        (UserError("no \x1b[2J\udcff in é"), 2, "eat.py: error: no \\x1b[2J\\udcff in é\n"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x.jpg"), 2, "eat.py: error: x.jpg: No such file\n"),
        (OSError("cannot identify image"), 2, "eat.py: error: cannot identify image\n"),
        (
            OSError(errno.ENOSPC, "No space left"),
            2,
            "eat.py: error: the disk is full; free some room or choose another",
        ),
        (
            PermissionError(errno.EACCES, "denied", "runs"),
            2,
            "eat.py: error: runs: no permission; choose another folder",
        ),
        (KeyboardInterrupt(), 130, "eat.py: interrupted; --resume goes on from the last checkpoint\n"),
    ],
)
def test_codes_and_lines(error, code, line, capsys):
    assert run_main(failing(error), [], "eat.py") == code
    out, err = capsys.readouterr()
    assert not out and err.startswith(line) and err.count("\n") == 1


def test_success_passes_the_arguments(capsys):
    seen = []
    assert run_main(seen.extend, ["--a", "1"], "eat.py") == 0
    assert seen == ["--a", "1"] and capsys.readouterr() == ("", "")


def test_debug_adds_the_traceback(capsys):
    assert run_main(failing(UserError("no cake")), ["--debug"], "eat.py") == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and err.endswith("eat.py: error: no cake\n")


def test_a_defect_of_ours_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run_main(failing(ZeroDivisionError()), [], "eat.py")


def test_a_reader_that_left_costs_one_line():
    program = (
        "import sys\n"
        "from utils.errors import run_main\n"
        "sys.exit(run_main(lambda argv: [print('x' * 1000) for _ in range(10_000)], [], 'eat.py'))"
    )
    # A pipe whose reading end is closed before the first word.
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120
    )
    os.close(writer)
    assert done.returncode == 2
    assert done.stderr == "eat.py: error: the reader of this command's output closed it\n"


def test_of_a_very_long_message_beginning_and_end_are_told(capsys):
    run_main(failing(UserError(f"no {'x' * 9999}; bake one")), [], "eat.py")
    line = capsys.readouterr().err
    assert line.startswith("eat.py: error: no xxx") and line.endswith("; bake one\n") and len(line) < 3100
