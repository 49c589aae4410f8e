"""Tables and figures from run directories, their corpus, and nothing else.

    curves          loss over dollars
    balance_rules   how fast each bias rule balances fixed scores
    inspect         `moejax inspect`: flags, checkpoints, files
    measure         checkpoints run over held-out text, and everything measured of it
    routing         the measures themselves, pure NumPy
    probe           what routers decide, captured and masked from outside
    held_out        held-out text with the document of every token
    inspect_text    its tables on a terminal
    inspect_figures its figures

Nothing here is imported by training, but for the curve that every run ends with.
"""
