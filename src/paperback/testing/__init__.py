"""Behaviour checks, one kit per task: what every method of a task has to keep to, whoever wrote it.

`check_density_model(build, X)`, `check_compressor(build, model, data)`, `check_encoder(build, images, y)`,
`check_explainer(build, X, y)`, `check_layer(build)` and `check_measurement(measure)` run all checks of their
task and raise on the first that fails. `DENSITY_CHECKS`, `COMPRESS_CHECKS`, `ENCODER_CHECKS`,
`EXPLAIN_CHECKS` and `LAYER_CHECKS` list them one by one, for parametrised tests.
"""

from paperback.testing.compress import COMPRESS_CHECKS, CompressCase, check_compressor
from paperback.testing.density import DENSITY_CHECKS, DensityCase, check_density_model
from paperback.testing.explain import EXPLAIN_CHECKS, ExplainCase, check_explainer
from paperback.testing.layers import LAYER_CHECKS, LayerCase, check_layer
from paperback.testing.represent import ENCODER_CHECKS, EncoderCase, check_encoder
from paperback.testing.theory import check_measurement

__all__ = [
    "COMPRESS_CHECKS",
    "DENSITY_CHECKS",
    "ENCODER_CHECKS",
    "EXPLAIN_CHECKS",
    "LAYER_CHECKS",
    "CompressCase",
    "DensityCase",
    "EncoderCase",
    "ExplainCase",
    "LayerCase",
    "check_compressor",
    "check_density_model",
    "check_encoder",
    "check_explainer",
    "check_layer",
    "check_measurement",
]
