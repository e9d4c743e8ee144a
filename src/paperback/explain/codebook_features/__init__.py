"""Codebook features: hidden states as short lists of codes that can be searched and set by hand.

At chosen places of a network (each attention head, each MLP) the activation is replaced by the mean of the k
codes, out of a learned codebook, that resemble it most, and the network is fine-tuned with its codebooks:

    u = LayerNorm(x),    S = the k codes of greatest <u, c_i> / |c_i|,    out = (1/k) sum_{i in S} c_i

A. Tamkin, M. Taufeeque and N. D. Goodman, Codebook Features: Sparse and Discrete Interpretability for Neural
Networks, ICML 2024, arXiv 2310.17230. The text of the paper has the sum of the codes where the authors' code
has the mean; they differ by a scale that the next layer learns. The commitment terms of two of the losses are
divided by the number of tokens here, as the codes' own term is, which the authors' code does not do. k-means
also sets the LayerNorms to the scale of the activations (see `start`), which spares a trained model most of
the fine-tuning.

    model = add_codebooks(language_model, n_codes=1024, k=8)
    model.init_kmeans(ids).fit(ids, steps=2000)
    found = model.search(ids, mask)                       # which code fires on these tokens?
    with model.intervene({site: force(code)}):            # as if the model were in that state
        model.generate(prompt)

The rooms: `layer` (the codebook and its backward pass), `sites` (where they go), `model` (the wrapped
network), `start` and `tuning` (k-means, training), `edits` (interventions), `search`, `cards`, `saved`, and
`explainer` (a scikit-learn classifier with a codebook).
"""

from paperback.explain.codebook_features.cards import CodeCard, code_card
from paperback.explain.codebook_features.edits import Edit, ban, force, pass_over, zero
from paperback.explain.codebook_features.explainer import CodebookExplainer
from paperback.explain.codebook_features.layer import CodebookLayer
from paperback.explain.codebook_features.model import CodebookModel, add_codebooks
from paperback.explain.codebook_features.search import Neuron, best_neuron, count_codes
from paperback.explain.codebook_features.sites import Site
from paperback.explain.codebook_features.tuning import next_token_loss

__all__ = [
    "CodeCard",
    "CodebookExplainer",
    "CodebookLayer",
    "CodebookModel",
    "Edit",
    "Neuron",
    "Site",
    "add_codebooks",
    "ban",
    "best_neuron",
    "code_card",
    "count_codes",
    "force",
    "next_token_loss",
    "pass_over",
    "zero",
]
