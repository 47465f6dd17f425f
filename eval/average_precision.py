"""Average precision of a ranking, as PASCAL VOC defines it.

Shape legend: N ranked images.
"""

import numpy as np


def interpolated_average_precision(positive_N: np.ndarray, scores_N: np.ndarray) -> float:
    """Area under the curve of precision over recall, where the precision at a recall is the best at that
    recall or a higher one.

    What VISSL's svm_utils/evaluate.py computes, and VOC itself since 2010. `positive_N` is bool.
    """
    found_N, precision_N = _found_and_precision(positive_N, scores_N)
    best_N = np.maximum.accumulate(precision_N[::-1])[::-1]
    return float(np.diff(found_N, prepend=0) @ best_N / found_N[-1])


def eleven_point_average_precision(positive_N: np.ndarray, scores_N: np.ndarray) -> float:
    """Mean of the best precision at a recall of at least 0, 0.1, ... 1: VOC's measure up to 2009.

    Everingham et al. 2010, section 4.2. `positive_N` is bool.
    """
    found_N, precision_N = _found_and_precision(positive_N, scores_N)
    # In whole numbers: as a fraction, a recall of 3 in 10 may be a little less than 0.3.
    best = [precision_N[10 * found_N >= tenth * found_N[-1]].max() for tenth in range(11)]
    return float(np.mean(best))


def _found_and_precision(positive_N: np.ndarray, scores_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many positives are among the first 1, 2, ... N images by descending score, and which share of them
    that is; of equal scores the first image is the first.
    """
    found_N = np.cumsum(positive_N[np.argsort(-scores_N, kind="stable")])
    return found_N, found_N / np.arange(1, len(found_N) + 1)
