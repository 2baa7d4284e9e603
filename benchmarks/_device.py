"""A worker's rounds on a GPU: when they are over, what they take there, how often they wait. Only torch is imported."""

import warnings


def settle(device):
    """All that was asked of the device is done."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def measure(turns, device):
    """On a GPU a round ends when the GPU is done, its memory is the GPU's, and one warm-up counts what it waits for."""
    import torch

    if torch.device(device).type != "cuda":
        return
    turns.settle = torch.cuda.synchronize
    turns.forget_peak = torch.cuda.reset_peak_memory_stats
    turns.peak_now, turns.resting_now = torch.cuda.max_memory_allocated, torch.cuda.memory_allocated
    turns.watch, turns.watched = 1, HostSyncs()


class HostSyncs:
    """How often the host waits for the GPU between `start` and `stop`: what torch warns of when it is asked to."""

    def start(self):
        import torch

        self.context = warnings.catch_warnings(record=True)
        self.seen = self.context.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")

    def stop(self):
        import torch

        torch.cuda.set_sync_debug_mode("default")
        self.context.__exit__(None, None, None)
        return {"host_syncs": sum("synchroniz" in str(warning.message) for warning in self.seen)}
