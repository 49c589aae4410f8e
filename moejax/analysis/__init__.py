"""Tables and figures: from run directories and their corpus, and of bills without a run.

    curves          loss over dollars
    balance_rules   how fast each bias rule balances fixed scores
    inspect         `moejax inspect`: flags, checkpoints, files
    measure         checkpoints run over held-out text, and everything measured of it
    routing         the measures themselves, pure NumPy
    probe           what routers decide, captured and masked from outside
    held_out        held-out text with the document of every token
    inspect_text    its tables on a terminal
    inspect_figures its figures
    bills           published bills, lenses and sensitivities, for the notebooks
    links           one run on chips with other links
    report          `moejax report`: one HTML file on a run, several or an ablation
    budgets         what scaling laws advise over budgets
    layer_walk      an MoE layer with every intermediate result; layer_figures draws it
    router_gallery  the same tokens through several routers
    live_runs       small runs that notebooks train
    balance_runs    bias rules, and the pull of balance losses on routers
    recorded        recorded ablations and measurements, for the notebooks
    statistics      paired differences and verdicts; pooling: their variance; power: seeds needed
    multipliers     how many times fewer FLOPs or dollars for the same loss
    scaling_fits    loss over size, granularity and number of experts
    ablation        what an ablation found; ablation_record reads it, ablation_text shows it,
                    ablation_health and ablation_scaling are parts of it

Nothing here is imported by training, but for the curve that every run ends with.
"""
