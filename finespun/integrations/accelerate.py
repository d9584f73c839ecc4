"""Accelerate: `save_state` and `load_state` of an adapted model hold the adapter, not the base."""

from typing import Any

from torch import nn

from finespun.adapter import Adapter
from finespun.driver import Driver
from finespun.integrations import checkpoints
from finespun.integrations.finding import adapted


def keep_adapter(accelerator: Any, adapter: Adapter, driver: Driver | None = None) -> None:
    """From now on the accelerator's `save_state` writes this adapter (readable by `fs.load`) and
    the driver's state where it would write the whole model, and `load_state` puts them back, bit
    for bit; other models are left to Accelerate. Call it before or after `prepare`."""

    def mine(model: nn.Module) -> bool:
        return adapted(model) is adapter.model

    def save(models: list[nn.Module], weights: list[Any], folder: str) -> None:
        for place in reversed(range(len(models))):
            if mine(models[place]):
                if len(weights) > place:
                    del weights[place]
                if accelerator.is_main_process:
                    checkpoints.write(folder, adapter, driver)

    def load(models: list[nn.Module], folder: str) -> None:
        for place in reversed(range(len(models))):
            if mine(models[place]):
                del models[place]
                checkpoints.read(folder, adapter)
                if driver is not None:
                    checkpoints.read_driver(folder, driver)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
