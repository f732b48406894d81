"""The training loop of all stages: device, learning-rate schedule, saving and resuming."""

import json
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch

SAVE_EVERY_SECONDS = 120.0
WARMUP = 100


def device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def learning_rate(step: int, total: int, peak: float) -> float:
    """Linear warm-up, then cosine decay to a twentieth of the peak."""
    if step < WARMUP:
        return peak * (step + 1) / WARMUP
    done = min(1.0, (step - WARMUP) / max(1, total - WARMUP))
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass
class Run:
    """A training stage: counts steps and seconds, saves every two minutes and on SIGTERM."""

    path: Path
    model: torch.nn.Module
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    notes: dict[str, float] = field(default_factory=dict)
    stopping: bool = False

    def __post_init__(self) -> None:
        signal.signal(signal.SIGTERM, self.stop)
        if self.path.exists():
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
            self.model.load_state_dict(saved["model"])
            for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            self.step, self.notes = saved["step"], saved["notes"]
            self.seconds, self.cpu_seconds = saved["seconds"], saved.get("cpu_seconds", 0.0)

    def stop(self, _signal: int, _frame: FrameType | None) -> None:
        """Finish the current step, save and exit."""
        self.stopping = True

    def save(self) -> None:
        """Write the model, optimisers and counters to one file, atomically."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".new")
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "notes": self.notes,
        }
        torch.save(state, fresh)
        fresh.replace(self.path)

    def steps(self, total: int, peak: float) -> Iterator[int]:
        """Yield step numbers up to `total`, with the learning rate set; saves regularly and at the end."""
        saved = time.monotonic()
        while self.step < total and not self.stopping:
            began, began_cpu = time.monotonic(), time.process_time()
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(self.step, total, peak)
            yield self.step
            self.step += 1
            self.seconds += time.monotonic() - began
            self.cpu_seconds += time.process_time() - began_cpu
            if time.monotonic() - saved > SAVE_EVERY_SECONDS:
                self.save()
                saved = time.monotonic()
        self.save()
        if self.stopping:
            raise SystemExit(f"stopped at step {self.step}; run again to resume")


def optimizers(module: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al., 2024) for the layers' matrices, AdamW for all other parameters."""
    matrices = {name: p for name, p in module.named_parameters() if p.ndim == 2 and "embed" not in name}
    others = [p for name, p in module.named_parameters() if name not in matrices]
    return [
        torch.optim.Muon(list(matrices.values()), weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    ]


def update(optimizers: list[torch.optim.Optimizer], loss: torch.Tensor, clip: float = 1.0) -> None:
    """One optimiser step with gradient clipping."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], clip)
    for optimizer in optimizers:
        optimizer.step()


def report(stage: str, step: int, **numbers: float) -> None:
    """Print one line of JSON to standard output."""
    print(json.dumps({"stage": stage, "step": step, **{k: round(v, 4) for k, v in numbers.items()}}), flush=True)
