"""What a screen or a PLC asks of a line: the last judgement, how many there were, whether the cameras run.

progress = Progress(); progress.add(judgement); print(progress.counts, progress.state)
"""

from __future__ import annotations

from recontrast_edge.frame import Judgement, SourceState, StateChange, VerdictName

_WORST_FIRST = (
    SourceState.FAULT,
    SourceState.STALE,
    SourceState.CONNECTING,
    SourceState.ENDED,
    SourceState.RUNNING,
)


class Progress:
    """Of one thread.

    Attributes:
        last: the last judgement; None before the first.
        counts: judgements by verdict.
    """

    def __init__(self) -> None:
        self.last: Judgement | None = None
        self.counts: dict[VerdictName, int] = {"PASS": 0, "REJECT": 0, "FAULT": 0}
        self._states: dict[str | None, SourceState] = {}

    def add(self, judgement: Judgement) -> None:
        """Take a judgement. A stream that nobody watches over is running while it delivers."""
        self.last = judgement
        self.counts[judgement.verdict] += 1
        self._states.setdefault(judgement.frame.camera, SourceState.RUNNING)

    def change(self, change: StateChange) -> None:
        """Take a camera's new state."""
        self._states[change.camera] = change.state

    def end(self) -> None:
        """No more judgements come."""
        self._states = {None: SourceState.ENDED}

    @property
    def judged(self) -> int:
        """Judgements."""
        return sum(self.counts.values())

    @property
    def state(self) -> SourceState:
        """The worst of all cameras'."""
        return min(self._states.values(), key=_WORST_FIRST.index, default=SourceState.CONNECTING)
