"""`minirlhf`, or `python -m minirlhf`: what there is to run, one line each."""

COMMANDS = {
    "train_sft.py": "pre-train a small GPT on text, or fine-tune one on demonstrations",
    "train_rm.py": "train a reward model from rankings, pairs or labelled texts",
    "train_ppo.py": "improve a policy on a reward, held to where it started by a KL penalty",
    "train_dpo.py": "learn from preferences directly",
    "-m minirlhf.generate": "sample responses from a run",
    "-m minirlhf.rewards": "score a file with a reward",
    "-m minirlhf.best_of_n": "write the best of n responses to each prompt",
    "-m minirlhf.evaluate": "compare runs on the same held-out prompts",
    "-m minirlhf.reward_report": "report how good a reward model is",
    "-m minirlhf.plot": "plot the training curves of runs",
    "-m minirlhf.exact": "hold the training loops against the closed-form optimum",
    "-m minirlhf.token_stats": "certify the compiled kernels on this machine",
    "-m minirlhf.kernels": "build the compiled kernels ahead",
}


def main() -> None:
    """Print the list; each command explains itself with --help."""
    width = max(map(len, COMMANDS))
    for command, purpose in COMMANDS.items():
        print(f"python {command:{width}}  {purpose}")
    print("Each explains its options with --help.")


if __name__ == "__main__":
    main()
