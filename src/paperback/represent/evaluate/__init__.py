"""What features are worth: functions from features to numbers, and `evaluate`, which asks them all.

    report = evaluate(encoder, train=(images, labels), test=(test_images, test_labels))
    print(report)

in place of `encoder` may stand an `Encoder`, a vision model of `transformers`, a module such as those of
`timm` (with ``num_classes=0``), or any function from images ``(n, c, h, w)`` in 0..1 to features. The single
functions take features, whoever made them.
"""

from paperback.represent.evaluate.episodes import few_shot
from paperback.represent.evaluate.features import features, vision_model
from paperback.represent.evaluate.novel import class_means, novel_classes
from paperback.represent.evaluate.open_set import OpenSet, auroc, open_set, oscr
from paperback.represent.evaluate.probes import Probed, knn, linear_probe, naive_bayes_probe
from paperback.represent.evaluate.report import Report, evaluate
from paperback.represent.evaluate.tuning import FineTuned, fine_tune

__all__ = [
    "FineTuned",
    "OpenSet",
    "Probed",
    "Report",
    "auroc",
    "class_means",
    "evaluate",
    "features",
    "few_shot",
    "fine_tune",
    "knn",
    "linear_probe",
    "naive_bayes_probe",
    "novel_classes",
    "open_set",
    "oscr",
    "vision_model",
]
