"""Every user attribute that carft-ray writes to Optuna, once, with its writer. ``typed.Attributes`` has their types."""

# of a training, when it begins
NAME = "name"  # of its folder; ``Journal.ask`` and ``add``
VALUES = "values"  # over the recipe's ``train``, if the sampler did not draw them; ``Journal.add``, ``space_revisions``
REPEAT_OF = "repeat_of"  # of a repeat, name of the first training of its values; ``Journal.repeat``
SEED = "seed"  # of a repeat
SOUP = "soup"  # what a soup is made of; ``Journal.add``
POINT = "point"  # of the recipe (``enqueue``), if the trial tries one; ``proposals.space.ask``
ATTEMPT = "attempt"  # number of its last attempt; ``Study.next``

# of a training, while it runs
LOOK = "look/"  # with the percent: an intermediate value of a trial with two objectives; ``Journal.report``
CUT = "cut"  # the ``Cut``, once the pruner has decided; ``Study.report``
STUCK = "without_progress"  # its attempts in a row that failed without advancing; ``retries.count``, ``take_over``
SET_ASIDE = "set_aside"  # why it is left to the next search, which makes it None; ``Study.lost``, ``take_over``
SPENT = "attempts_s"  # attempt -> [seconds, GPUs], when an attempt ends, however it ends; ``Study.spent``

# of a training, when it has ended: ``Study.settle`` and ``add_zero_shot``, through ``Journal.tell``
OUTCOME = "outcome"
REASON = "reason"  # if it is not complete
DIGEST = "digest"  # SHA-256 of its ``result.json``
ALPHA, AT_CHANCE, MEASURED, ELAPSED_S = "alpha", "at_chance", "metrics", "elapsed_s"  # of its ``result.json``
OBJECTIVE = "objective"  # of it, too, in a Pareto search: Optuna has two objectives there
POINTS = "points"  # its alpha curve from the lowest alpha on that may be chosen; of trials and baselines
ROUNDING = 1e-9  # alphas are sums of steps: one that is the lowest but for rounding is within

# of a trial that the search space or another study has given its values
OUTSIDE = "outside"  # state and values before, of a trial that is outside the space now; ``space_revisions``
# of what the sampler gets and is no training of this study
TRAINING_OF = "training_of"  # number of the training whose alpha curve has this further point; ``Journal.tell``
WARM_FROM = "warm_from"  # the trial of another study; ``warm_start``

# of the Optuna study of a Pareto search
FRONT = "front"  # its ``FrontRule``; ``Journal.open``
