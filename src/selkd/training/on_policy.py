"""On-policy distillation: of a step's prompts some are answered by the student as it is, and it learns there.

Which samples are answered, and the uniforms that an answer is drawn by, are a function of (seed, sample, optimiser
step), not of how the step is cut into micro-batches or ranks. So are the answers but for rounding: prompts that are
padded otherwise have other last digits in their logits, and a uniform between the places that the border of two classes
then has draws another class. In float32 that is next to never. In bfloat16 it is common, and the answer goes on
otherwise from there: attention on the CPU rounds the keys that fill whole vector registers otherwise than the rest of
a row, and padding moves keys from one to the other. Of 256 answers of 10 tokens from the tests' toy, 6 differed with
AVX-512 and 57 with AVX2; of 40 answers of up to 64 tokens from the demo's teacher 28, one draw in 16.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selkd.data.collate import collate
from selkd.data.samples import EMPTY_SAMPLE, Sample, SampleDataset
from selkd.errors import InputError
from selkd.models.generation import Decoding, generate, stop_ids
from selkd.recipe.choices import OnPolicyOptions
from selkd.selection.randomness import sample_generator
from selkd.teacher.targets import Batch, Teacher
from selkd.training.arguments import DistillArguments

LENGTHS = "lengths"


@dataclass(frozen=True)
class Rollout:
    """One answer of the student.

    Attributes:
        prompt: its token ids.
        answer: those that the student gave, the stop token included.
        is_ended: whether it came to a stop token; else it was cut at ``max_new_tokens``.
    """

    prompt: np.ndarray
    answer: list[int]
    is_ended: bool

    @property
    def sample(self) -> Sample:
        """What is learned from: the answer's tokens alone are targets."""
        tokens = np.concatenate([self.prompt, np.array(self.answer, dtype=np.int64)])
        return Sample(tokens, np.zeros(1, np.int32), np.arange(len(tokens)) >= len(self.prompt))


@dataclass(frozen=True)
class PromptCollator:
    """A collator whose batches also say how long each sample is: a prompt alone has no valid position to tell."""

    pad_token_id: int

    def __call__(self, samples: list[Sample]) -> Batch:
        lengths = torch.tensor([len(sample.token_ids) for sample in samples])
        return collate(samples, self.pad_token_id) | {LENGTHS: lengths}


@dataclass(frozen=True)
class Answering:
    """Puts the student's answers in the place of the data's.

    Attributes:
        options: how answers are drawn, and how many.
        seed: the run's.
        stop: tokens that end an answer.
        pad_token_id: pads.
        vocab_size: of the vocabulary, those that the models share.
    """

    options: OnPolicyOptions
    seed: int
    stop: Sequence[int]
    pad_token_id: int
    vocab_size: int

    def __call__(
        self, model: PreTrainedModel, batches: Sequence[Batch], step: int, dtype: torch.dtype
    ) -> tuple[list[Batch], list[Rollout], float]:
        """The micro-batches of an optimiser step with answers in place, the rollouts, the seconds that they took.

        Args:
            batches: of ``PromptCollator``.
            dtype: of the products (autocast).
        """
        device = batches[0]["input_ids"].device if batches else torch.device("cpu")
        samples = [list(_samples_of(batch)) for batch in batches]
        flat = [sample for of_batch in samples for sample in of_batch]
        chosen = [index for index, sample in enumerate(flat) if self.is_answered(sample, step)]
        started = time.perf_counter()
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            rollouts = dict(zip(chosen, self._answers(model, [flat[index] for index in chosen], step), strict=True))
        seconds = time.perf_counter() - started
        done, index = [], 0
        for of_batch in samples:
            places = range(index, index + len(of_batch))
            index += len(of_batch)
            group = [rollouts[place].sample if place in rollouts else flat[place] for place in places]
            done.append({name: tensor.to(device) for name, tensor in collate(group, self.pad_token_id).items()})
        return done, [rollouts[index] for index in chosen], seconds

    def is_answered(self, sample: Sample, step: int) -> bool:
        """Whether the student answers this sample at this step; fillers are never answered."""
        if sample.id == EMPTY_SAMPLE.id:
            return False
        return bool(sample_generator(self.seed, sample.id, "on_policy", step).random() < self.options.fraction)

    def _answers(self, model: PreTrainedModel, samples: Sequence[Sample], step: int) -> Iterator[Rollout]:
        options, at_once = self.options, self.options.at_once or max(1, len(samples))
        prompts = [sample.token_ids[: prompt_length(sample)] for sample in samples]
        order = np.argsort([len(prompt) for prompt in prompts], kind="stable")  # little padding where there are several
        answers: dict[int, list[int]] = {}
        for begin in range(0, len(order), at_once):
            rows = order[begin : begin + at_once].tolist()
            uniforms = [
                sample_generator(self.seed, samples[row].id, "rollout", step).random(options.max_new_tokens)
                for row in rows
            ]
            decoding = Decoding(options.temperature, options.top_p, self.stop, self.pad_token_id, self.vocab_size)
            found = generate(model, [prompts[row] for row in rows], np.stack(uniforms), decoding)
            answers.update(zip(rows, found, strict=True))
        for row, prompt in enumerate(prompts):
            yield Rollout(prompt, answers[row], answers[row][-1] in self.stop)


def prompt_length(sample: Sample) -> int:
    """The tokens before the last answer: all of them where there is none."""
    if sample.is_target is None:
        return 1
    targets = np.flatnonzero(sample.is_target)
    if not len(targets):
        return len(sample.token_ids)
    gaps = np.flatnonzero(np.diff(targets) > 1)
    return int(targets[gaps[-1] + 1] if len(gaps) else targets[0])


def require_answers_fit(samples: SampleDataset, options: OnPolicyOptions, windows: Mapping[str, int | None]) -> None:
    """Raises InputError if a prompt with its answer may be longer than a model has positions for.

    Args:
        windows: a model's name -> how many positions it has; None: no limit.
    """
    answer = options.max_new_tokens
    for name, window in windows.items():
        if window is None:
            continue
        # The answer takes the completion's place, so only long samples are read for where their prompt ends.
        long = np.flatnonzero(samples.lengths > window - answer).tolist()
        longest = max((prompt_length(samples[index]) for index in long), default=0)
        if longest + answer > window:
            raise InputError(
                f"on_policy.max_new_tokens: {answer} after a prompt of up to {longest} tokens, but {name} has "
                f"positions for {window}. Lower max_new_tokens, or data.max_length."
            )


def _samples_of(batch: Batch) -> Iterator[Sample]:
    """The samples of one document that a batch, padded on the right, is made of."""
    tokens, valid = batch["input_ids"].cpu().numpy(), batch["valid_mask"].cpu().numpy()
    for row, length in enumerate(batch[LENGTHS].tolist()):
        is_target = np.append(False, valid[row, : length - 1])
        yield Sample(tokens[row, :length], np.zeros(1, np.int32), is_target)


@dataclass
class RolloutSums:
    """What can be said of answers without judging them. Sums, so that ranks and steps add up."""

    rollouts: int = 0
    tokens: int = 0
    ended: int = 0
    longest: int = 0
    grams: int = 0
    repeated_grams: int = 0
    seconds: float = 0.0

    def add(self, other: "RolloutSums") -> None:
        for name, value in vars(other).items():
            mine = getattr(self, name)
            setattr(self, name, max(mine, value) if name == "longest" else mine + value)

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], seconds: float) -> "RolloutSums":
        sums = cls(seconds=seconds)
        for rollout in rollouts:
            answer = rollout.answer
            grams = [tuple(answer[begin : begin + 4]) for begin in range(len(answer) - 3)]
            sums.add(
                cls(1, len(answer), rollout.is_ended, len(answer), len(grams), len(grams) - len(set(grams)))
            )  # fmt: skip
        return sums

    def figures(self) -> dict[str, float | int | None]:
        """Means and shares; None where there is nothing to divide by."""
        each, grams = self.rollouts or None, self.grams or None
        return {
            "rollouts": self.rollouts,
            "tokens": self.tokens,
            "mean_tokens": self.tokens / each if each else None,
            "longest_tokens": self.longest,
            "ended_share": self.ended / each if each else None,
            "repeated_share": self.repeated_grams / grams if grams else None,
            "seconds": round(self.seconds, 3),
        }


class Answers:
    """The student's answers in a training.

    Args:
        args: with ``on_policy``.
        model: the student.
        tokenizer: the one that both models share.
        vocab_size: classes that they share.
    """

    def __init__(
        self, args: DistillArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, vocab_size: int
    ) -> None:
        options = args.on_policy
        assert options is not None, "made for on-policy runs alone"
        pad_token_id = 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        self.answering = Answering(options, args.seed, stop_ids(model, tokenizer), pad_token_id, vocab_size)
        self.tokenizer = tokenizer
        self.dtype = args.compute_dtype
        self._window = RolloutSums()  # since the last logged step
        self._last: list[Rollout] = []

    def require_prompts(self, dataset: SampleDataset | None, teacher: Teacher) -> None:
        """Raises InputError unless the student can answer: a live teacher, prompts one a sample."""
        if not teacher.is_live:
            raise InputError(
                "on_policy: a TeacherCache holds the classes of the data's own tokens, and what the student will "
                "answer is not known before. Give a live teacher."
            )
        if dataset is None:
            return
        if (dataset.n_documents > 1).any():
            raise InputError(
                "on_policy: samples of several documents. The student answers one prompt a sample: no packing."
            )
        if len(dataset) and (dataset.n_valid == dataset.lengths - dataset.n_documents).all():
            raise InputError("on_policy: samples of plain text, without a prompt to answer. Give prompts.")
        if self.answering.options.fraction < 1 and not dataset.n_valid.all():
            raise InputError(
                "on_policy.fraction: below 1 the other samples keep their completion, and some samples have none. Give "
                "completions, or 1.0."
            )

    def __call__(self, model: PreTrainedModel, batches: Sequence[Batch], step: int) -> tuple[list[Batch], RolloutSums]:
        """The micro-batches of a step with the student's answers, and what was answered, over all ranks."""
        answered, rollouts, seconds = self.answering(model, batches, step, self.dtype)
        sums = RolloutSums.of(rollouts, seconds)
        if PartialState().num_processes > 1:
            of_ranks, sums = gather_object([sums]), RolloutSums()
            for each in of_ranks:
                sums.add(each)
        self._window.add(sums)
        self._last = rollouts
        return answered, sums

    def logs(self) -> dict[str, float]:
        """Figures of the answers since the last logged step."""
        figures, self._window = self._window.figures(), RolloutSums()
        names = ("mean_tokens", "ended_share", "repeated_share", "seconds")
        return {f"rollout_{name}": value for name in names if (value := figures[name]) is not None}

    def shown(self, step: int) -> list[dict[str, Any]]:
        """Some answers of the last step, to read."""
        return [
            {
                "step": step,
                "prompt": self.tokenizer.decode(rollout.prompt),
                "answer": self.tokenizer.decode(rollout.answer),
                "prompt_tokens": len(rollout.prompt),
                "answer_tokens": len(rollout.answer),
                "ended": rollout.is_ended,
            }
            for rollout in self._last[: self.answering.options.log_rollouts]
        ]
