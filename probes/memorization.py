"""Output metrics of the field, from teacher-forced answer tokens: exact memorization, extraction strength, truth ratio.

Every function takes arrays with the tokens last. None of them looks inside the model: a low value says that the
answer is not *said*, never that it is gone.
"""

import numpy as np
from jaxtyping import Bool, Float, Int


def exact_memorization(
    right: Bool[np.ndarray, "*rest token"], length: Int[np.ndarray, "*rest"]
) -> Float[np.ndarray, "*rest"]:
    """Share of the answer's tokens that are the model's first choice, in [0, 1]; lower is more forgotten.

    `EM = mean_t 1[argmax_t = y_t]`, teacher-forced (Tirumala et al. 2022; Dorna et al. 2025, arXiv 2506.12618).

    >>> exact_memorization(np.array([True, False, True, True]), np.array(4)).item()
    0.75
    """
    return right.sum(-1) / length


def extraction_strength(
    right: Bool[np.ndarray, "*rest token"], length: Int[np.ndarray, "*rest"]
) -> Float[np.ndarray, "*rest"]:
    """Share of the answer that the model completes from the shortest sufficient prefix, in [0, 1].

    `ES = 1 - k/T`, k = the least number of answer tokens to give before the rest are all first choices (Carlini et al.
    2021; Dorna et al. 2025). Where not even the last token is right, k = T and ES is truly 0; published code stops at
    T - 1 and so never reports less than 1/T. Lower is more forgotten.

    >>> extraction_strength(np.array([True, False, True, True]), np.array(4)).item()
    0.5
    >>> extraction_strength(np.array([True, True, False]), np.array(3)).item()
    0.0
    """
    beyond = np.arange(right.shape[-1]) >= np.asarray(length)[..., None]
    suffix = np.flip(np.logical_and.accumulate(np.flip(right | beyond, -1), -1), -1)
    return (suffix & ~beyond).sum(-1) / length


def truth_ratio(
    true: Float[np.ndarray, "*rest"], wrong: Float[np.ndarray, "*rest alternative"]
) -> Float[np.ndarray, "*rest"]:
    """How likely wrong answers are against the true one: TOFU's truth ratio, in (0, inf); higher is more forgotten.

    `TR = exp(mean_k log p(wrong_k) - log p(true))`, every log p a mean over tokens, so the numerator is a geometric
    mean over the wrong answers (Maini et al. 2024, arXiv 2401.06121). NaN where there are no wrong answers.

    >>> truth_ratio(np.log(0.5), np.log([0.25, 0.25])).round(6).item()
    0.5
    """
    known = ~np.isnan(wrong)
    mean = np.where(known, wrong, 0).sum(-1) / np.where(known.any(-1), known.sum(-1), np.nan)
    return np.exp(mean - true)
