"""Ask a child process: a broken driver or library can crash or hang whoever touches it.

answer_of("recontrast_edge.cameras", "pylon", timeout_s=30.0)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


class NoAnswerError(Exception):
    """The child hung, crashed, or could not be started; the message says which."""


def answer_of(module: str, *arguments: str, timeout_s: float) -> Any:
    """What ``python -m module arguments`` prints as its last line, from JSON; it sees the same modules as this process.

    Raises:
        NoAnswerError: there is none within ``timeout_s``.
    """
    paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    try:
        child = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            env={**os.environ, "PYTHONPATH": paths, "PYTHONSAFEPATH": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise NoAnswerError(f"does not answer within {timeout_s:g} s") from None
    except OSError as error:
        raise NoAnswerError(f"cannot be probed ({error.strerror or error})") from None
    try:
        # Libraries print what they like; the answer is the last line.
        return json.loads(child.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        raise NoAnswerError(f"the probe ended with status {child.returncode} and no answer") from None
