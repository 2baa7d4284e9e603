"""The book: what one reads to learn how RLHF works.

Read `ppo`, then `losses` (every equation), `rollout` and `logprobs`; `sft`, `reward_model` and `dpo` are the other
loops. `rewards` is what scores, `critic` what PPO's critic starts as, `experience` what a step knows and logs,
`training` what the loops share.

May be imported by: commands, scripts. Imports: run, model, data, and what is below. `losses` imports nothing but torch.
"""
