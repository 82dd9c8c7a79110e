"""Numbers and accounts as a person reads them."""

from __future__ import annotations

from fxfuse.kernels.account import Account


def count(number: int, what: str) -> str:
    """The number and its noun, in the plural unless it is one: "2 kernels", "6 launches"."""
    plural = "es" if what.endswith("ch") else "s"
    return f"{number} {what}{'' if number == 1 else plural}"


def size(number: float) -> str:
    """Bytes with three digits: "1.02 GB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(number) >= scale:
            return f"{_digits(number / scale)} {unit}"
    return f"{number:.0f} B"


def duration(seconds: float) -> str:
    """Seconds with two digits, as estimates have no more: "0.49 ms", "12 us"."""
    unit, scale = next((u for u in (("s", 1.0), ("ms", 1e-3)) if seconds >= 0.1 * u[1]), ("us", 1e-6))
    return f"{float(f'{seconds / scale:.2g}'):g} {unit}"


def operations(number: float) -> str:
    """Floating-point operations: "13.4 GFLOP"."""
    for unit, scale in (("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6)):
        if number >= scale:
            return f"{_digits(number / scale)} {unit}"
    return f"{number:.0f} FLOP"


def _digits(number: float) -> str:
    whole = abs(number)
    return f"{number:.0f}" if whole >= 100 else f"{number:.1f}" if whole >= 10 else f"{number:.2f}"


def sentence(account: Account | None) -> str:
    """What runs, how long by estimate, and what is saved: "2 kernels (6 launches), 0.48 ms est., ..."."""
    if account is None:
        return "torch's operators: sizes are not known before the call"
    launches = count(account.launches, "launch")
    if account.kernels:
        same = account.launches == account.kernels
        runs = count(account.kernels, "kernel") + ("" if same else f" ({launches})")
        words = [runs, f"{duration(account.seconds)} est."]
    else:
        words = [f"torch's operators ({launches})", f"{duration(account.seconds)} at best"]
    if account.unwritten:
        words.append(f"{size(account.unwritten)} of intermediates never written")
    return ", ".join(words)


def refusal(account: Account | None) -> str:
    """Why torch's operators run the region, or its convolution; "" where a kernel does."""
    if account is None or account.refusal is None:
        return ""
    return f"{'the convolution is left' if account.kernels else 'left'} to torch: {account.refusal}"
