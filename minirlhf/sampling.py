"""How the next token is chosen, for whoever imports it; the code is in minirlhf/model/sampling.py."""

from minirlhf.model.sampling import Sampling  # noqa: F401
