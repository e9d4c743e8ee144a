"""The study of codebook features: a machine whose states are known, and a small language model."""

from paperback.explain.studies.codebook_features.language import steer_language
from paperback.explain.studies.codebook_features.machine import learn_machines
from paperback.explain.studies.codebook_features.panels import report_language, report_machines
from paperback.study import Run

SEEDS = (0, 1, 2)


def study(run: Run) -> None:
    """Do codes stand for the states of what a network has learned, and does setting them set the state?

    A transformer learns to write what a random finite-state machine writes, without codes and with one code
    for each head and MLP. Its codes are compared with the machine's states, with single neurons, and with
    k-means without fine-tuning; states are exchanged by exchanging codes. Then the language model that ships
    gets eight codes for each head and MLP: codes that are active on a topic are forced while it writes. The
    claims are false if neurons classify as well as codes, or if exchanging codes does not exchange states.
    """
    machines = learn_machines(run)
    report_machines(run, machines)
    report_language(run, steer_language(run))
    machines[0].codebooks.save_pretrained(run.out / "machine")
    run.note(
        "The transformer with codebooks of the first seed is in the folder machine; "
        "CodebookModel.from_pretrained reads it."
    )
    run.note("The fine-tuning of SmolLM2 (135 million parameters), optional in the sheet, was left out.")
