"""Which kernel and config answer a problem: ask every kernel, list candidates, rank them by predicted time."""

from __future__ import annotations

from typing import Any, NamedTuple

from cugemm.arch import Device
from cugemm.catalog import KERNELS, Kernel
from cugemm.errors import NoKernelError


class Ranked(NamedTuple):
    """One candidate with its predicted time."""

    kernel: Kernel
    config: Any
    us: float


class Choice(NamedTuple):
    """The answer: candidates by predicted time, best first, and why the other kernels refused."""

    problem: Any
    ranking: tuple[Ranked, ...]
    refusals: tuple[tuple[str, str], ...]

    @property
    def best(self) -> Ranked:
        return self.ranking[0]

    def __str__(self) -> str:
        lines = [f"{self.problem}", f"  {self.problem!r}"]
        for mark, candidate in zip(["->", *["  "] * len(self.ranking)], self.ranking, strict=False):
            lines.append(f"  {mark} {candidate.kernel.name:10s} {candidate.us:10.1f} us predicted   {candidate.config}")
        lines += [f"     {name:10s} refused: {reason}" for name, reason in self.refusals]
        return "\n".join(lines)


def choose(problem: Any, device: Device) -> Choice:
    """Rank every config of every willing kernel; NoKernelError with all refusals if there is none. Pure."""
    refusals = [(kernel.name, kernel.refuse(problem)) for kernel in KERNELS]
    willing = [kernel for kernel, (_, reason) in zip(KERNELS, refusals, strict=True) if reason is None]
    refused = tuple((name, reason) for name, reason in refusals if reason is not None)
    if not willing:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused)
        raise NoKernelError(f"no kernel for {problem}: {reasons}.")
    if getattr(problem, "batch_invariant", False):  # one kernel for every m
        willing = willing[:1]
    ranking = [
        Ranked(kernel, config, kernel.cost(problem, config, device)) for kernel in willing for config in kernel.candidates(problem, device)
    ]
    return Choice(problem, tuple(sorted(ranking, key=lambda r: r.us)), refused)
