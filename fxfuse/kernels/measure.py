"""Measure the ways to run a region instead of trusting the plan's estimate, and say what was found."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping

from fxfuse.kernels.compilation.kept import Choice
from fxfuse.region import Region

_log = logging.getLogger(__name__)

#: median seconds of a call of every way
Timer = Callable[[Mapping[str, Callable[[], object]]], Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Way:
    """One candidate: its name, what it runs, seconds of a call, or why there are none."""

    name: str
    plan: str
    seconds: float | None
    failure: str = ""


@dataclasses.dataclass(frozen=True)
class Measured:
    """The candidates of one region for inputs of certain forms.

    ``inputs`` and ``device`` in words. ``estimated``: the way that the plan's estimate prefers. ``chosen``: the one
    that runs from now on, the fastest.
    """

    region: Region
    inputs: str
    device: str
    ways: tuple[Way, ...]
    chosen: str
    estimated: str

    @property
    def differs(self) -> bool:
        """Whether the measurement disagrees with the estimate."""
        return self.chosen != self.estimated

    def __str__(self) -> str:
        chain = " > ".join(i.op for i in self.region.original.body)
        lines = [f"{chain}", f"    {self.inputs} on {self.device}"]
        for way in self.ways:
            time = f"{way.seconds * 1e3:10.3f} ms" if way.seconds is not None else f"         -    {way.failure}"
            marks = [m for m, name in (("chosen", self.chosen), ("by estimate", self.estimated)) if name == way.name]
            lines.append(f"    {way.name:<8}{time}  {', '.join(marks)}".rstrip())
        return "\n".join(lines)

    @property
    def choice(self) -> Choice:
        """What is worth keeping of it."""
        return Choice(self.chosen, self.estimated, {w.name: w.seconds for w in self.ways if w.seconds is not None})


@dataclasses.dataclass
class Session:
    """What was measured while the session lasted, with ``timer``."""

    timer: Timer
    measured: list[Measured] = dataclasses.field(default_factory=list)


#: the session of this thread, if there is one
session: contextvars.ContextVar[Session | None] = contextvars.ContextVar("fxfuse tuning", default=None)


@contextlib.contextmanager
def collecting(timer: Timer) -> Iterator[Session]:
    """Regions that are prepared inside the block, by this thread, are measured, whatever was kept for them."""
    made = Session(timer)
    token = session.set(made)
    try:
        yield made
    finally:
        session.reset(token)


def fastest(
    plans: Mapping[str, str],
    start: Callable[[str], Callable[[], object]],
    timer: Timer,
) -> tuple[tuple[Way, ...], str]:
    """Measure ways that ``plans`` names and describes, the estimate's first; the name of the fastest.

    ``start`` prepares a way, and raises where it cannot run: it is left out then. Of equally fast ones the first is
    chosen. Raises RuntimeError where no way runs at all.
    """
    runs: dict[str, Callable[[], object]] = {}
    failures: dict[str, str] = {}
    for name in plans:
        try:
            runs[name] = start(name)
            runs[name]()  # what fails fails here: memory, say
        except Exception as error:  # noqa: BLE001 - a way that cannot run is not chosen
            runs.pop(name, None)
            failures[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            _log.debug("%s cannot be measured: %s", name, failures[name])
    if not runs:
        raise RuntimeError(f"no way to run it works: {failures}")
    seconds = timer(runs)
    ways = tuple(Way(n, plan, seconds.get(n), failures.get(n, "")) for n, plan in plans.items())
    return ways, min(seconds, key=lambda n: seconds[n])
