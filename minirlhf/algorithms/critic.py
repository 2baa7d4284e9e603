"""The initial critic. V(s_t) estimates the reward still to come before token t is chosen; PPO trains all of it."""

from pathlib import Path

from minirlhf import InputError
from minirlhf.algorithms.rewards import Reward, reward_models
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.model.gpt import GPT, ScalarModel, clone
from minirlhf.run.folder import load_run, require_same_tokenizer


def make_critic(
    policy: GPT, tokenizer: Tokenizer, reward: Reward, init: str, shared: bool, policy_folder: str | Path = "the policy"
) -> ScalarModel:
    """A critic that learns, on the policy's device.

    Separate: it starts as the reward model (the first, of several), which already knows what is coming (Stiennon et al.
    2020, section 3.4), or as the policy's trunk under a head of zeros. Shared: a head of zeros on the policy itself.

    Args:
        policy: whose responses it is asked about.
        tokenizer: the policy's.
        reward: what is optimised.
        init: auto (the reward model, if that is the reward, else policy), policy, or the folder of a reward model.
        shared: whether the trunk is the policy's own.
        policy_folder: for the error message.

    Raises:
        InputError: the reward model that `init` names cannot read what the policy writes.
    """
    scorers = reward_models(reward)
    if init not in ("auto", "policy"):
        critic, own = load_run(init, scalar=True)
        require_same_tokenizer(tokenizer, policy_folder, own, init)
        if critic.config.n_positions < policy.config.n_positions:
            raise InputError(
                f"{init}: this critic reads {critic.config.n_positions} tokens, the policy "
                f"{policy.config.n_positions}; name one with as long a context"
            )
    elif scorers and init == "auto" and not shared:
        critic = clone(scorers[0].model)
    else:
        critic = ScalarModel(policy.config, trunk=policy if shared else clone(policy))
        critic.score.weight.data.zero_()
    critic.requires_grad_(True)
    return critic.to(policy.wte.weight.device)
