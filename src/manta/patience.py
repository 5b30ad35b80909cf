"""Early stopping by a figure that comes when it comes: that of answers generated beside training."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Patience:
    """Ends a run after so many `evaluations` without a rise of more than `threshold` over the best; 0: never."""

    evaluations: int
    threshold: float
    best: float | None = None
    waited: int = 0

    def heard(self, value: float) -> bool:
        """Whether to stop, now that this figure is known."""
        if self.best is None or value > self.best + self.threshold:
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        return 0 < self.evaluations <= self.waited
