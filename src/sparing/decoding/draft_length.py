"""How many tokens to draft: as many as pay, judged by how often drafts are accepted and what they cost."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Acceptance", "DraftCost", "best_length", "expected_tokens"]

MEMORY = 0.95  # weight of a round relative to the one after it
VERIFYING = 0.1  # one more token in a pass of the target, in passes of one token, until measured


def expected_tokens(acceptance: float, drafted: int) -> float:
    """Tokens a round yields on average: `(1 - a^(m + 1)) / (1 - a)`, the m drafts and one of the target's own.

    acceptance: probability a of a draft whose predecessors were accepted, 0 to 1; drafted: m.
    Source: Leviathan et al., "Fast inference from transformers via speculative decoding", equation 1.

    >>> round(expected_tokens(0.7, 3), 3)
    2.533
    """
    return sum(acceptance**j for j in range(drafted + 1))


def best_length(acceptance: float, cost: float, most: int) -> int:
    """The number of drafts, 0 to `most`, with the most tokens for the time.

    cost: of drafting and verifying one more token, in passes of the target over one.
    """
    return max(range(most + 1), key=lambda m: expected_tokens(acceptance, m) / (1 + cost * m))


@dataclass
class Acceptance:
    """One row's share of accepted drafts among those that were judged, older rounds fading.

    It fades towards its first guess also while nothing is drafted, so that a row which gave up tries again.
    """

    accepted: float = 0.0
    judged: float = 0.0

    @property
    def rate(self) -> float:
        return (self.accepted + 1.6) / (self.judged + 2.0)

    def observe(self, drafted: int, accepted: int) -> None:
        """One round. Drafts after the first rejected one were not judged."""
        self.accepted = MEMORY * self.accepted + accepted
        self.judged = MEMORY * self.judged + min(drafted, accepted + 1)


class DraftCost:
    """What one draft costs, in rounds without any: a line through the times of the rounds, older ones fading.

    drafting: first guess of the drafter's share. by_clock: whether times count at all. They must not where the draft
    length changes what comes out, or the same seed would give another text on a busy machine.
    """

    def __init__(self, drafting: float, *, by_clock: bool):
        self.guess, self.by_clock = drafting + VERIFYING, by_clock
        self._weight = self._mean_drafts = self._mean_seconds = self._spread = self._together = 0.0

    @property
    def per_draft(self) -> float:
        if self._weight == 0:
            return self.guess
        # The guess counts like one round that drafted one token more than the mean.
        expected = self.guess * self._mean_seconds / (1 + self.guess * self._mean_drafts)
        slope = (self._together + expected) / (self._spread + 1.0)
        base = self._mean_seconds - slope * self._mean_drafts
        return max(0.0, slope / base) if base > 0 else self.guess

    def observe(self, drafts: float, seconds: float) -> None:
        """One round. drafts: the mean over its rows."""
        if not self.by_clock:
            return
        self._weight = MEMORY * self._weight + 1
        step = 1 / self._weight
        off_drafts, off_seconds = drafts - self._mean_drafts, seconds - self._mean_seconds
        self._mean_drafts += step * off_drafts
        self._mean_seconds += step * off_seconds
        self._spread = MEMORY * self._spread + off_drafts * (drafts - self._mean_drafts)
        self._together = MEMORY * self._together + off_drafts * (seconds - self._mean_seconds)
