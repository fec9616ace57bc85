"""The executor in a pipeline's place for the denoiser, with the library's rules of runs written down a second time."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from tests.executor import Executor


def timestep_of(args, kwargs, forward) -> float:
    bound = inspect.signature(forward).bind(*args, **kwargs).arguments
    return float(torch.as_tensor(bound["timestep"]).reshape(-1)[0])


class StandIn(nn.Module):
    """Looks like a denoiser to a pipeline."""

    def __init__(self, inner):
        super().__init__()
        self.__dict__["inner"] = inner

    def parameters(self, recurse=True):
        return self.inner.parameters(recurse)

    def __getattr__(self, name):
        return getattr(self.__dict__["inner"], name)


class Recorder(StandIn):
    """Notes the timesteps with which the denoiser is called, each once, and how often."""

    def __init__(self, inner):
        super().__init__(inner)
        self.__dict__.update(timesteps=[], calls=[])

    def forward(self, *args, **kwargs):
        value = timestep_of(args, kwargs, self.inner.forward)
        if not self.timesteps or self.timesteps[-1] != value:
            self.timesteps.append(value)
            self.calls.append(0)
        self.calls[-1] += 1
        return self.inner(*args, **kwargs)


class HookedDenoiser(StandIn):
    """One executor for each call at a timestep.

    They go on where the step before had as many calls as the one before it (the first step of a run: one), and start over
    otherwise, after which a step of one call goes on too. An executor starts over when its batch changes. A run starts at the
    first call, and at a timestep earlier than the last.
    """

    def __init__(self, model, mask):
        super().__init__(model)
        order = [("hold", "linear").index(rule) for rule in mask.reuse]
        self.__dict__.update(
            mask=mask, make=lambda: Executor(model, mask.blocks, mask.compute, order, mask.log_snr, mask.reach), executors=[], shapes=[],
            last=None, calls=0, expected=(1,),
        )  # fmt: skip

    def forward(self, *args, **kwargs):
        value = timestep_of(args, kwargs, self.inner.forward)
        step = min(range(self.mask.steps), key=lambda i: abs(self.mask.timesteps[i] - value))
        state = self.__dict__
        if state["last"] is None or step < state["last"]:
            state.update(executors=[], shapes=[], expected=(1,), calls=0)
        elif step > state["last"]:
            calls = state["calls"]
            go_on = calls in state["expected"]
            kept = calls if go_on and step == state["last"] + 1 else 0
            state.update(executors=state["executors"][:kept], shapes=state["shapes"][:kept], calls=0)
            state["expected"] = (calls,) if go_on else (calls, 1)
        at = state["calls"]
        sample = next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.dim() > 1)
        if at == len(state["executors"]) or state["shapes"][at] != sample.shape:
            state["executors"][at : at + 1] = [self.make()]
            state["shapes"][at : at + 1] = [sample.shape]
        state.update(last=step, calls=at + 1)
        return state["executors"][at].step(step, *args, **kwargs)
