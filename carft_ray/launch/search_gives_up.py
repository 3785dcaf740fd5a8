"""When a search ends before its time, since what fails is neither the values nor one machine."""

from collections.abc import Iterable
from statistics import median

from carft_ray.errors import MachineError, NoSuccessfulTrialError, Problem
from carft_ray.study.training import TrialRow

FAILURES_TO_GIVE_UP, WAVES_TO_GIVE_UP = 5, 2  # at least, and times as many as run at a time
HEALTHY_AFTER = 2  # times what trials ran until they failed
# so many attempts in a row lost without advancing or ended by an exception: it is neither the values nor one machine
ATTEMPTS_TO_GIVE_UP, ATTEMPTS_PER_SLOT = 12, 6  # at least, and for each training at a time


class GivingUp:
    """Counts what fails in one search.

    Attributes:
        trials: That have failed.
    """

    def __init__(self) -> None:
        self.trials: list[TrialRow] = []
        self._took_s: list[float] = []  # the last attempt of each
        self._in_a_row = 0  # attempts

    def note(self, row: TrialRow, seconds: float) -> None:
        """Notes a trial that has failed, and how long its last attempt took."""
        self.trials.append(row)
        self._took_s.append(seconds)

    def is_in_vain(self, most: int, running_s: Iterable[float]) -> bool:
        """Tells whether a search without a complete trial gives up: two waves have failed, and nothing healthy runs.

        That is, as many trials have failed as run at a time in two waves, five at least; and no trial runs that has
        done so for more than twice the median time in which these failed.

        Args:
            most: Trainings at a time.
            running_s: For how long each trial runs.
        """
        if len(self.trials) < max(FAILURES_TO_GIVE_UP, WAVES_TO_GIVE_UP * most):
            return False
        usual_s = median(self._took_s)
        return all(seconds <= HEALTHY_AFTER * usual_s for seconds in running_s)

    def count(self, failed: bool, reason: str, most: int, lost: bool = False) -> None:
        """Raises when one attempt after the other is lost or ends with an exception, whatever was found before.

        The limit grows with the number of trainings at a time, so that losing half of a cluster ends no search.

        Args:
            failed: Whether an attempt has; else the count begins again.
            reason: Of the failure.
            most: Trainings at a time.
            lost: Whether a machine has failed.

        Raises:
            MachineError: So many were lost.
            NoSuccessfulTrialError: So many have failed.
        """
        self._in_a_row = self._in_a_row + 1 if failed else 0
        if self._in_a_row >= max(ATTEMPTS_TO_GIVE_UP, ATTEMPTS_PER_SLOT * most):
            rule = f"{self._in_a_row} attempts in a row failed; the last one: {reason}"
            step = "Finished trainings are kept. Correct the cause, then run the same command again."
            kind = MachineError if lost else NoSuccessfulTrialError
            raise kind(Problem("search", rule, next_step=step))
