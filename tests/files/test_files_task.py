"""PEFT's task type is written where PEFT could call the model by it."""

from types import SimpleNamespace

import pytest
from torch import nn

import finespun as fs
from finespun.storage.safe_io import read_json

CASES = {
    "T5ForConditionalGeneration": ("input_ids", True, "SEQ_2_SEQ_LM"),
    "WhisperForConditionalGeneration": ("input_features", True, None),
    "LlavaForConditionalGeneration": ("input_ids", False, None),
    "Blip2ForConditionalGeneration": ("pixel_values", False, None),
    "GPT2LMHeadModel": ("input_ids", False, "CAUSAL_LM"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_task_type_is_written_where_peft_can_use_it(name, tmp_path):
    reads, pairs, task = CASES[name]
    model = type(name, (nn.Sequential,), {"main_input_name": reads})(nn.Linear(6, 4))
    model.config = SimpleNamespace(is_encoder_decoder=pairs)
    fs.adapt(model, "lora", rank=2).export(tmp_path)
    assert read_json(tmp_path / "adapter_config.json")["task_type"] == task
