"""Progress bars on real terminals."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
@pytest.mark.parametrize("size", [(0, 0), (40, 100)])
def test_a_bar_shows_loss_rate_and_time_left_on_any_terminal(size: tuple[int, int]) -> None:
    """Also on a terminal without a known size, which tqdm takes for a width of 0."""
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    code = (  # without the package around the module, which takes seconds to import
        "from progress import progress_bar; import time\n"
        "with progress_bar(4, 'training', 'step') as bar:\n"
        "    for _ in range(3):\n        time.sleep(0.15); bar.update(); bar.set_postfix(loss='0.5')\n"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[1] / "ether_diffusion")
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=theirs, stdout=theirs, stdin=theirs, env=environment
    )
    os.close(theirs)
    output = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        output += part
    os.close(ours)
    assert process.wait() == 0
    text = output.decode()
    assert "training:" in text
    assert "3/4" in text
    assert "step/s" in text
    assert "loss=0.5" in text


def test_without_a_terminal_a_line_names_the_stage_every_so_often_and_short_work_prints_nothing() -> None:
    code = (
        "import progress, time; progress.EVERY = 0.2\n"
        "with progress.progress_bar(20, 'encoding latents', 'file') as bar:\n"
        "    for _ in range(12):\n        time.sleep(0.05); bar.set_postfix(loss='0.5', refresh=False); bar.update()\n"
        "with progress.progress_bar(2, 'short', 'file') as bar:\n    bar.update()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1] / "ether_diffusion")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    lines = done.stderr.splitlines()
    assert 1 <= len(lines) <= 3
    assert all(line.startswith("encoding latents: ") and " of 20 files, " in line for line in lines)
    assert lines[0].endswith("loss=0.5")
    assert "\r" not in done.stderr
