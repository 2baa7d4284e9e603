"""PPO's equations and its loop, for whoever imports them; the code is in minirlhf/algorithms."""

from minirlhf.algorithms.logprobs import ask, ask_all  # noqa: F401
from minirlhf.algorithms.losses import *  # noqa: F403
from minirlhf.algorithms.ppo import Networks, PPOConfig, estimate_advantages, token_losses, train  # noqa: F401
