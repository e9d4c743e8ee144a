"""Naive Bayes beside logistic regression on frozen features, and which of the two to use.

Gaussian naive Bayes whose variances are shared by the classes is linear in the features, as logistic
regression is, but it is fitted in one pass and nears the best it can do after O(log n) labelled rows, n being
the number of features, where logistic regression needs O(n). So it is ahead while labels are few, as long as
each feature carries some information of its own; later logistic regression, whose best is better, overtakes
it:

    score_k(x) = log pi_k - 1/2 sum_j (x_j - mu_kj)^2 / sigma_j^2,   sigma_j^2 = sum_k pi_k v_kj.

Source: Zheng, Wu, Bao, Cao, Li and Zhu, Revisiting discriminative vs. generative classifiers: theory and
implications, ICML 2023, arXiv 2302.02334; equations 1 to 4, theorems 4.1 and 4.4. What is ours: the floor of
the variances, and the tests of the assumptions on classes that were never drawn together.
"""

from paperback.represent.generative_classifier.choice import ProbeChoice, choose_probe
from paperback.represent.generative_classifier.curves import Curve, sample_curve, samples_to_converge
from paperback.represent.generative_classifier.logistic import LogisticProbe
from paperback.represent.generative_classifier.naive_bayes import Diagnosis, NaiveBayesProbe

__all__ = [
    "Curve",
    "Diagnosis",
    "LogisticProbe",
    "NaiveBayesProbe",
    "ProbeChoice",
    "choose_probe",
    "sample_curve",
    "samples_to_converge",
]
