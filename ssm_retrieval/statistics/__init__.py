"""Statistics for few runs, some of them censored: survival curves, intervals and paired tests.

A run that did not reach its goal is an observation ("more than this was needed"), not a missing value. So
`value` often comes with `reached`: where `reached` is true, `value` is what the run needed; elsewhere it is
what the run spent without getting there (right-censored, as a patient who leaves a study alive).

* `survival`: how much is needed until a run gets there.
* `intervals`: means, ratios and proportions with their uncertainty.
* `seeds`: how many seeds got there, their accuracies, and signs that agree "in every seed".
* `paired`: two architectures with the same seed, data order and length.
* `factorial`: main effects and interactions, where every combination of levels was run.
"""

from ssm_retrieval.statistics.factorial import factorial_effects, factorial_shares
from ssm_retrieval.statistics.inputs import require
from ssm_retrieval.statistics.intervals import (
    bootstrap,
    geometric_mean_interval,
    mean_interval,
    ratio_of_means,
    share_interval,
    wilson,
)
from ssm_retrieval.statistics.paired import (
    PairedTest,
    SignTest,
    holm,
    paired_sign_test,
    paired_test,
    sign_flip_p,
)
from ssm_retrieval.statistics.seeds import Agreement, SeedSummary, agreement, one_mode, summarise_seeds
from ssm_retrieval.statistics.survival import (
    bootstrap_median_time,
    censored,
    kaplan_meier,
    median_bounds,
    median_interval,
    median_time,
    turnbull,
)

__all__ = [
    "Agreement",
    "PairedTest",
    "SeedSummary",
    "SignTest",
    "agreement",
    "bootstrap",
    "bootstrap_median_time",
    "censored",
    "factorial_effects",
    "factorial_shares",
    "geometric_mean_interval",
    "holm",
    "kaplan_meier",
    "mean_interval",
    "median_bounds",
    "median_interval",
    "median_time",
    "one_mode",
    "paired_sign_test",
    "paired_test",
    "ratio_of_means",
    "require",
    "share_interval",
    "sign_flip_p",
    "summarise_seeds",
    "turnbull",
    "wilson",
]
