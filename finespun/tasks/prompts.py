"""Prompts and answers as tokens for a causal language model; the loss is taken of answers alone.

Rows are padded on the left, so that all answers end in the last column and the model computes
logits for the last few columns only. A packed batch is one row of examples, each of which sees
itself alone: no padding, the same loss.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from finespun.errors import InputError, nearest
from finespun.tasks.tables import LabelledTexts
from finespun.tasks.task import IGNORED, Batch, Limits
from finespun.tasks.tokens import Tokens

PADDING = -1  # the segment of tokens that nobody sees


@dataclass(frozen=True)
class Asker:
    """Makes prompts of texts, and tokens of prompts and answers.

    `template` holds {text}, and {pair} for pairs; with `chat` the prompt is a user's turn in the
    tokenizer's own chat template. An answer ends with the end-of-sequence token.
    """

    tokenizer: Any
    template: str
    chat: bool = False

    def __post_init__(self) -> None:
        if self.chat and not getattr(self.tokenizer, "chat_template", None):
            raise InputError("this model's tokenizer has no chat template; try chat: false")
        if self.tokenizer.eos_token_id is None:
            raise InputError("this model's tokenizer has no end-of-sequence token: no answer ends")

    def prompt(self, text: str, pair: str | None = None) -> str:
        """The template filled in; braces in texts stay as they are."""
        whole = self.template.replace("{pair}", "\0").replace("{text}", text)
        whole = whole if pair is None else whole.replace("\0", pair)
        if not self.chat:
            return whole
        turn = [{"role": "user", "content": whole}]
        made: str = self.tokenizer.apply_chat_template(
            turn, tokenize=False, add_generation_prompt=True
        )
        return made

    def ids(self, prompt: str) -> list[int]:
        """Tokens of a prompt; a chat template brings its own special tokens."""
        special = not self.chat
        found: list[int] = self.tokenizer(prompt, add_special_tokens=special).input_ids
        if special and len(found) > 1 and found[-1] == self.tokenizer.eos_token_id:
            found = found[:-1]
        return found

    def answer(self, prompt: str, answer: str) -> list[int]:
        """Tokens that follow the prompt's: the answer, after a space unless in a chat, and the end.

        Raises InputError where the tokenizer would not keep the prompt's tokens before the answer.
        """
        begun = self.ids(prompt)
        whole = self.ids(prompt + ("" if self.chat else " ") + answer)
        if whole[: len(begun)] != begun or len(whole) == len(begun):
            raise InputError(
                f"the answer {answer!r} melts into the end of the prompt {prompt[-20:]!r}: end the "
                "prompt with a colon or a line break and no space"
            )
        return [*whole[len(begun) :], self.tokenizer.eos_token_id]

    def shortened(self, text: str, pair: str | None, room: int) -> tuple[list[int], str, bool]:
        """Tokens of the prompt in at most `room`, the prompt, and whether the text was cut for it.

        The text loses its end; what the template says around it stays. Raises InputError where the
        template alone is too long.
        """
        prompt = self.prompt(text, pair)
        ids = self.ids(prompt)
        if len(ids) <= room:
            return ids, prompt, False
        words: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        keep = len(words)
        while len(ids) > room:
            keep -= max(1, len(ids) - room)
            if keep < 1:
                raise InputError(
                    f"max_length leaves {room} tokens for a prompt that has {len(ids)} without "
                    f"any of the text: {prompt[:60]!r}"
                )
            prompt = self.prompt(self.tokenizer.decode(words[:keep]), pair)
            ids = self.ids(prompt)
        return ids, prompt, True


@dataclass(frozen=True)
class AnswerTokens(Tokens):
    """Rows of prompt and answer; `begins[i]` is where the answer of row i begins.

    `candidates[i]` are the tokens of every answer that could follow prompt i, the right one being
    number `right[i]`. `labels` are class numbers, or 0.
    """

    begins: tuple[int, ...] = ()
    candidates: tuple[tuple[list[int], ...], ...] = ()
    right: tuple[int, ...] = ()
    slices: bool = True

    @property
    def packed(self) -> bool:
        return self.limits.pack

    def prompt_ids(self, i: int) -> list[int]:
        """The tokens of prompt i."""
        return self.rows[i]["input_ids"][: self.begins[i]]

    def take(self, indices: Sequence[int]) -> Self:
        """The rows `indices` alone."""
        return dataclasses.replace(
            super().take(indices),
            begins=tuple(self.begins[i] for i in indices),
            candidates=tuple(self.candidates[i] for i in indices),
            right=tuple(self.right[i] for i in indices),
        )


def collate(tokens: AnswerTokens, indices: Sequence[int]) -> Batch:
    """input_ids, attention_mask, position_ids, labels: -100 outside answers.

    Unless packed, labels are cut to the columns whose logits are needed (`logits_to_keep`).
    """
    ids = [tokens.rows[i]["input_ids"] for i in indices]
    begins = [tokens.begins[i] for i in indices]
    if tokens.packed:
        return packed(ids, begins)
    length = max(map(len, ids))
    fill = tokens.tokenizer.pad_token_id
    shape = len(ids), length
    found = {
        "input_ids": torch.full(shape, fill),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "position_ids": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, IGNORED),
    }
    for row, (own, begin) in enumerate(zip(ids, begins)):
        start = length - len(own)
        found["input_ids"][row, start:] = torch.tensor(own)
        found["attention_mask"][row, start:] = 1
        found["position_ids"][row, start:] = torch.arange(len(own))
        found["labels"][row, start + begin :] = torch.tensor(own[begin:])
    if tokens.slices:
        keep = max(len(own) - begin for own, begin in zip(ids, begins)) + 1
        found["labels"] = found["labels"][:, -keep:]
        found["logits_to_keep"] = torch.arange(length - keep, length)
    return found


def packed(ids: Sequence[list[int]], begins: Sequence[int]) -> Batch:
    """Examples one after another in one row; each token sees those before it in its example."""
    segments = torch.tensor([[n for n, tokens in enumerate(ids, start=1) for _ in tokens]])
    labels = [
        token if k >= begin else IGNORED
        for tokens, begin in zip(ids, begins)
        for k, token in enumerate(tokens)
    ]
    return {
        "input_ids": torch.tensor([[token for tokens in ids for token in tokens]]),
        "attention_mask": segment_mask(segments),
        "position_ids": torch.tensor([[k for tokens in ids for k in range(len(tokens))]]),
        "labels": torch.tensor([labels]),
    }


def segment_mask(segments: Tensor) -> Tensor:
    """An additive attention mask (rows, 1, tokens, tokens), 0 where a token may look.

    A token sees those before it of its own segment and of segment 0, the trunk that branches
    share; padding sees itself alone and is seen by nobody else.
    """
    n = segments.shape[1]
    before = torch.ones(n, n, dtype=torch.bool).tril()
    same = segments[:, :, None] == segments[:, None, :]
    trunk = (segments[:, None, :] == 0) & (segments[:, :, None] != PADDING)
    own = same & (segments[:, None, :] != PADDING) | torch.eye(n, dtype=torch.bool)
    seen = before & (own | trunk)
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return mask[:, None]


def answer_words(classes: Sequence[str], answers: Mapping[str, str] | None) -> list[str]:
    """What the model should say for every class. Raises InputError where `answers` does not name
    each class once, or two classes share their words."""
    if answers is None:
        return list(classes)
    for name in (*answers, *classes):
        if name not in classes:
            raise InputError(f"answers names {name!r}, no label; {nearest(name, classes)}")
        if name not in answers:
            raise InputError(f"answers has no words for {name!r}; {nearest(name, answers)}")
    words = [answers[name] for name in classes]
    if len(set(words)) != len(words):
        raise InputError(f"answers must differ from each other: {', '.join(words)}")
    return words


def tokenize_answers(
    asker: Asker,
    examples: LabelledTexts,
    words: Sequence[str],
    limits: Limits,
    slices: bool = True,
    few: int = 32,
) -> AnswerTokens:
    """Rows of prompt and right answer, and the other answers as candidates where there are at most
    `few`. Texts that make a row longer than `limits` allow are cut, never answers."""
    rows, begins, right, candidates, cut = [], [], [], [], 0
    for i, text in enumerate(examples.texts):
        pair = None if examples.pairs is None else examples.pairs[i]
        label = int(examples.labels[i])
        possible = list(words) if len(words) <= few else [words[label]]
        probe = asker.prompt(text, pair)
        longest = max(len(asker.answer(probe, word)) for word in possible)
        ids, prompt, shorter = asker.shortened(text, pair, limits.max_length - longest)
        choices = tuple(asker.answer(prompt, word) for word in possible)
        right.append(label if len(possible) == len(words) else 0)
        rows.append({"input_ids": ids + choices[right[-1]]})
        begins.append(len(ids))
        candidates.append(choices)
        cut += shorter
    return AnswerTokens(
        limits,
        cut,
        tuple(rows),
        examples.label_tensor(),
        asker.tokenizer,
        tuple(begins),
        tuple(candidates),
        tuple(right),
        slices,
    )
