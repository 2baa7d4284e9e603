"""What vs_peers.py runs as a peer: transformers or TRL, one case, in a process of its own and in their environment.

Only the standard library, torch and the peers are imported here. They read the same weights (from Hugging Face's
files) and the same tokens; TRL wants text, so that its tokenizer knows a word for each id: t0, t1, ….
"""

import json
import sys
import time
from pathlib import Path

from _rounds import METERS, Turns

LR = 1e-6


def versions(*names):
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", *names)}


def load(job, name, scalar=False):
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    kind = transformers.AutoModelForSequenceClassification if scalar else transformers.AutoModelForCausalLM
    return kind.from_pretrained(Path(job["folder"]) / name, dtype=torch.float32).to(job["device"])


def make_tokenizer(job, pad="<|endoftext|>"):
    """A word for each id, split at spaces. Nothing is ever padded, but some of TRL looks for the padding."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    eot, vocab_size = "<|endoftext|>", job["shape"]["vocab_size"]
    words = {f"t{i}": i for i in range(vocab_size - 1)} | {eot: vocab_size - 1}
    core = Tokenizer(models.WordLevel(words, unk_token="t0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eot, bos_token=eot, pad_token=pad)


def text(tokens, first=True):
    """The words of some ids; what goes on after others begins with a space. TRL adds the end-of-text itself."""
    return ("" if first else " ") + " ".join(f"t{token}" for token in tokens)


# --- transformers -----------------------------------------------------------------------------------------------------


def sampling(job, data, turns):
    import torch
    from transformers import GenerationConfig

    model = load(job, "policy").eval()
    if job["settings"].get("dtype") == "bf16":
        model = model.to(torch.bfloat16)
    settings = {"max_new_tokens": job["response"], "use_cache": True, "pad_token_id": model.config.eos_token_id}
    settings |= {"eos_token_id": model.config.eos_token_id}
    if job["settings"].get("compile"):  # as the manual says to; by itself, generate compiles on a GPU only
        settings["cache_implementation"] = "static"
        if job["device"] == "cpu":
            model.forward = torch.compile(model.forward)
    prompts = torch.tensor(data["prompts"], device=job["device"])
    mask = torch.ones_like(prompts)

    def draw(**how):
        drawn = model.generate(prompts, attention_mask=mask, generation_config=GenerationConfig(**settings, **how))
        return drawn[:, prompts.shape[1] :]

    greedy = draw(do_sample=False).tolist()
    torch.manual_seed(0)
    turns.ready(versions=versions("transformers"), greedy=greedy)
    while True:
        turns.begin()
        drawn = draw(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
        turns.end(tokens=drawn.numel())


# --- TRL --------------------------------------------------------------------------------------------------------------


def common(job):
    """What all trainers are told: no reports, no files, no evaluation, and the fp32 or bf16 that is asked for."""
    bf16, cpu = job["settings"].get("dtype") == "bf16", job["device"] == "cpu"
    return {
        "output_dir": str(Path(job["folder"]) / "trl"), "report_to": [], "save_strategy": "no", "eval_strategy": "no",
        "logging_strategy": "no", "disable_tqdm": True, "dataloader_num_workers": 0, "dataloader_pin_memory": not cpu,
        "use_cpu": cpu, "seed": 0, "bf16": bf16, "learning_rate": LR, "adam_beta2": 0.95, "weight_decay": 0.0,
        "per_device_train_batch_size": job["batch"], "max_steps": job["steps"],
        "gradient_checkpointing": bool(job["settings"].get("checkpointing")),
        "torch_compile": bool(job["settings"].get("compile")),
    }  # fmt: skip


def waiting(turns, facts, about):
    """A callback that waits for the turn after each step, so that a round goes from the end of one to that of the next.

    Args:
        turns: whose.
        facts: for `ready`.
        about: what is known of the step, a function; what is callable in it is called after the round.
    """
    from transformers import TrainerCallback

    class Waiting(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            turns.ready(**facts)
            turns.begin()

        def on_step_end(self, *args, **kwargs):
            turns.end(**about())
            turns.begin()

    return Waiting()


def keep_loss(trainer, seen):
    """The loss of each step, as the trainer computes it: its own log waits, and rounds."""
    compute = trainer.compute_loss

    def compute_loss(*args, **kwargs):
        returned = compute(*args, **kwargs)
        loss = returned[0] if isinstance(returned, tuple) else returned
        seen["loss"] = loss.detach()
        return returned

    trainer.compute_loss = compute_loss


def run(trainer, turns, **facts):
    seen = {}
    keep_loss(trainer, seen)
    facts |= {"versions": versions("transformers", "trl")}
    trainer.add_callback(waiting(turns, facts, lambda: {"loss": seen["loss"].item}))
    trainer.train()


def rows(job, data, **columns):
    """The same batch for each step, one after another; TRL would otherwise draw the order."""
    from datasets import Dataset

    return Dataset.from_dict({name: column * job["steps"] for name, column in columns.items()})


SAME_ORDER = {"train_sampling_strategy": "sequential"}


def dpo_step(job, data, turns):
    from trl import DPOConfig, DPOTrainer

    known = bool(job["settings"].get("precompute"))
    config = DPOConfig(**common(job), **SAME_ORDER, beta=0.1, max_length=None, precompute_ref_log_probs=known)
    dataset = rows(
        job, data,
        prompt=[text(tokens) for tokens in data["prompts"]],
        chosen=[text(tokens[:-1], first=False) for tokens in data["chosen"]],
        rejected=[text(tokens[:-1], first=False) for tokens in data["rejected"]],
    )  # fmt: skip
    trainer = DPOTrainer(
        load(job, "policy"), load(job, "reference"), args=config, train_dataset=dataset,
        processing_class=make_tokenizer(job),
    )  # fmt: skip
    run(trainer, turns)


def rm_step(job, data, turns):
    from trl import RewardConfig, RewardTrainer

    config = RewardConfig(**common(job), **SAME_ORDER, max_length=None)
    dataset = rows(
        job, data,
        chosen=[text(a) + text(b[:-1], first=False) for a, b in zip(data["prompts"], data["chosen"])],
        rejected=[text(a) + text(b[:-1], first=False) for a, b in zip(data["prompts"], data["rejected"])],
    )  # fmt: skip
    # Were end-of-text the padding, the score would be read at the token before it.
    model, tokenizer = load(job, "reward", scalar=True), make_tokenizer(job, pad="t0")
    run(RewardTrainer(model, args=config, train_dataset=dataset, processing_class=tokenizer), turns)


def sft_step(job, data, turns):
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(**common(job), **SAME_ORDER, max_length=None, packing=False)
    dataset = rows(
        job, data,
        prompt=[text(tokens) for tokens in data["prompts"]],
        completion=[text(tokens[:-1], first=False) for tokens in data["chosen"]],
    )  # fmt: skip
    model, tokenizer = load(job, "policy"), make_tokenizer(job)
    run(SFTTrainer(model, args=config, train_dataset=dataset, processing_class=tokenizer), turns)


def ppo_step(job, data, turns):
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    given = {k: v for k, v in common(job).items() if k not in ("max_steps", "eval_strategy")}
    config = PPOConfig(
        **given, num_ppo_epochs=job["epochs"], num_mini_batches=job["minibatches"], response_length=job["response"],
        total_episodes=job["steps"] * job["batch"], local_rollout_forward_batch_size=job["batch"], temperature=1.0,
        stop_token="eos", missing_eos_penalty=1.0, kl_coef=0.07, vf_coef=0.5, num_sample_generations=0,
    )  # fmt: skip
    times = {}
    trainer = PPOTrainer(
        args=config, processing_class=make_tokenizer(job), model=load(job, "policy"), ref_model=load(job, "policy"),
        reward_model=load(job, "reward", scalar=True), value_model=load(job, "reward", scalar=True),
        train_dataset=Dataset.from_dict({"input_ids": data["prompts"] * job["steps"]}),
    )  # fmt: skip

    def first_update(*args):
        times.setdefault("update", time.perf_counter())

    def count(*args):
        times["updates"] = times.get("updates", 0) + 1

    def about():
        rollout, updates = times.pop("update") - turns.begun, times.pop("updates")
        return {"rollout_seconds": rollout, "update_seconds": lambda: turns.seconds - rollout, "updates": updates}

    # Policy and critic are called together in the updates only: the first such call ends the rollout.
    trainer.model.register_forward_pre_hook(first_update)
    getattr(trainer.optimizer, "optimizer", trainer.optimizer).register_step_post_hook(count)
    trainer.add_callback(waiting(turns, {"versions": versions("transformers", "trl")}, about))
    trainer.train()


CASES = {"sampling": sampling, "ppo": ppo_step, "dpo": dpo_step, "rm": rm_step, "sft": sft_step}


def main():
    turns = Turns()
    job = json.loads(sys.argv[1])
    try:
        import torch

        torch.set_num_threads(job["threads"])
        turns.meter = METERS[job["device"]]()
        data = json.loads((Path(job["folder"]) / "data.json").read_text())
        CASES[job["task"]](job, data, turns)
    except ImportError as error:
        turns.skip(f"{type(error).__name__}: {error}".splitlines()[0][:160])


if __name__ == "__main__":
    main()
