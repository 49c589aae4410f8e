"""Published scaling laws: which model, on how many tokens, a budget of FLOPs is best spent on.

Each law keeps its paper's own meaning of parameters, FLOPs and loss; they disagree, and their
losses are of different texts. Compare losses only where ``facts.corpus`` is the same.

Left out: Clark et al. 2022 (arXiv 2202.01169), whose law holds for 130 billion tokens only and so
cannot divide a budget; Abnar et al. 2025 (arXiv 2501.12370), of whose coefficients no readable copy
was found; OLMoE (arXiv 2409.02060), which has ablations but no law.
"""

from moejax.cost.scaling_laws.allocation import DEEPSEEK, LING, LING_DENSE
from moejax.cost.scaling_laws.chinchilla import BESIROGLU, HOFFMANN
from moejax.cost.scaling_laws.joint import LUDZIEJEWSKI
from moejax.cost.scaling_laws.krajewski import KRAJEWSKI, KRAJEWSKI_DENSE, KRAJEWSKI_E16
from moejax.cost.scaling_laws.law import Law

LAWS: dict[str, Law] = {
    "krajewski_2024": KRAJEWSKI,
    "krajewski_2024_e16": KRAJEWSKI_E16,
    "krajewski_2024_dense": KRAJEWSKI_DENSE,
    "ludziejewski_2025": LUDZIEJEWSKI,
    "ling_2025": LING,
    "ling_2025_dense": LING_DENSE,
    "deepseek_llm_2024": DEEPSEEK,
    "chinchilla_2022": HOFFMANN,
    "chinchilla_refit_2024": BESIROGLU,
}
