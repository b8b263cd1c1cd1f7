"""On-policy distillation: the current student answers some of a step's prompts, and learns at its own answers.

Which samples are answered, and which uniform numbers an answer is drawn with, depends on (seed, sample, optimiser step)
alone, not on how the step is cut into micro-batches or ranks. The answers depend on that cut through rounding only:
other padding gives other last digits in the logits, and then a uniform number that lies at the border of two classes
can draw the other class. In float32 this hardly ever happens. In bfloat16 it is common, and the rest of the answer
then differs, too. Measured on CPUs: of 256 answers of 10 tokens by the tests' toy model, 6 differed with AVX-512 and 57
with AVX2; of 40 answers of up to 64 tokens by the demo's teacher, 28 differed, about one draw in 16.
"""

import operator
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, send_to_device
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from selkd.data.collate import collate
from selkd.data.samples import EMPTY_SAMPLE, Sample, SampleDataset
from selkd.errors import InputError
from selkd.models.generation import Decoding, generate
from selkd.recipe.choices import OnPolicyOptions
from selkd.selection.host import keep_on_host, on_host
from selkd.selection.randomness import sample_generator
from selkd.teacher.targets import Batch
from selkd.training.callbacks import StepLines

LENGTHS = "lengths"


@dataclass(frozen=True)
class Rollout:
    """One answer of the student.

    Attributes:
        prompt: the prompt's token ids.
        answer: the answer's token ids, the stop token included.
        is_ended: whether the answer ended with a stop token; otherwise it was cut at ``max_new_tokens``.
    """

    prompt: np.ndarray
    answer: list[int]
    is_ended: bool

    @property
    def sample(self) -> Sample:
        """The sample to learn from: only the answer's tokens are targets."""
        tokens = np.concatenate([self.prompt, np.array(self.answer, dtype=np.int64)])
        return Sample(tokens, np.zeros(1, np.int32), np.arange(len(tokens)) >= len(self.prompt))


@dataclass(frozen=True)
class PromptCollator:
    """A collator that also stores each sample's length: a prompt alone has no valid position that would show it."""

    pad_token_id: int

    def __call__(self, samples: list[Sample]) -> Batch:
        lengths = torch.tensor([len(sample.token_ids) for sample in samples])
        return collate(samples, self.pad_token_id) | {LENGTHS: lengths}


@dataclass(frozen=True)
class Answering:
    """Replaces completions of the data by the student's answers.

    Attributes:
        options: how answers are drawn, and how many.
        seed: the run's seed.
        stop: the tokens that end an answer.
        pad_token_id: the token that pads batches.
        vocab_size: how many classes the models share; only these are drawn.
        dtype: the dtype of the student's products, which run under autocast.
    """

    options: OnPolicyOptions
    seed: int
    stop: Sequence[int]
    pad_token_id: int
    vocab_size: int
    dtype: torch.dtype

    def __call__(
        self, model: PreTrainedModel, batches: Sequence[Batch], step: int
    ) -> tuple[list[Batch], list[Rollout], float]:
        """Answer the prompts of one optimiser step.

        Args:
            model: the student.
            batches: the step's micro-batches, made by ``PromptCollator``.
            step: the optimiser step.

        Returns:
            The micro-batches with the answers in place, the rollouts, and the seconds that the student took.
        """
        device = batches[0]["input_ids"].device if batches else torch.device("cpu")
        groups = [list(_samples_of(batch)) for batch in batches]
        answered = [sample for group in groups for sample in group if self.is_answered(sample, step)]
        started = time.perf_counter()
        with torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            rollouts = list(self._answers(model, answered, step))
        seconds = time.perf_counter() - started
        next_rollout = iter(rollouts)
        filled = []
        for group in groups:
            samples = [next(next_rollout).sample if self.is_answered(sample, step) else sample for sample in group]
            answers = keep_on_host(collate(samples, self.pad_token_id))
            filled.append(send_to_device(answers, device, non_blocking=True))
        return filled, rollouts, seconds

    def is_answered(self, sample: Sample, step: int) -> bool:
        """Whether the student answers this sample at this step; it never answers fillers."""
        if sample.id == EMPTY_SAMPLE.id:
            return False
        return bool(sample_generator(self.seed, sample.id, "on_policy", step).random() < self.options.fraction)

    def _answers(self, model: PreTrainedModel, samples: Sequence[Sample], step: int) -> Iterator[Rollout]:
        options, at_once = self.options, self.options.at_once or max(1, len(samples))
        prompts = [sample.token_ids[: prompt_length(sample)] for sample in samples]
        order = np.argsort([len(prompt) for prompt in prompts], kind="stable")  # prompts of one length need no padding
        answers: dict[int, list[int]] = {}
        for begin in range(0, len(order), at_once):
            rows = order[begin : begin + at_once].tolist()
            uniforms = [
                sample_generator(self.seed, samples[row].id, "rollout", step).random(options.max_new_tokens)
                for row in rows
            ]
            decoding = Decoding(options.temperature, options.top_p, self.stop, self.pad_token_id, self.vocab_size)
            generated = generate(model, [prompts[row] for row in rows], np.stack(uniforms), decoding)
            answers.update(zip(rows, generated, strict=True))
        for row, prompt in enumerate(prompts):
            yield Rollout(prompt, answers[row], answers[row][-1] in self.stop)


def _samples_of(batch: Batch) -> Iterator[Sample]:
    """The samples, one document each, of a batch that is padded on the right."""
    host = on_host(batch, ("input_ids", "valid_mask", LENGTHS))
    tokens, valid = host["input_ids"].numpy(), host["valid_mask"].numpy()
    for row, length in enumerate(host[LENGTHS].tolist()):
        is_target = np.append(False, valid[row, : length - 1])
        yield Sample(tokens[row, :length], np.zeros(1, np.int32), is_target)


def prompt_length(sample: Sample) -> int:
    """How many tokens stand before the last answer; all of the sample's tokens if it has no answer."""
    if sample.is_target is None:
        return 1
    targets = np.flatnonzero(sample.is_target)
    if not len(targets):
        return len(sample.token_ids)
    gaps = np.flatnonzero(np.diff(targets) > 1)
    return int(targets[gaps[-1] + 1] if len(gaps) else targets[0])


def require_prompts(samples: SampleDataset, options: OnPolicyOptions) -> None:
    """Raises InputError unless every sample is one prompt, with a completion where the student may not answer it."""
    if (samples.n_documents > 1).any():
        raise InputError(
            "on_policy: samples of several documents. The student answers one prompt a sample: no packing."
        )
    if len(samples) and (samples.n_valid == samples.lengths - samples.n_documents).all():
        raise InputError("on_policy: samples of plain text, without a prompt to answer. Give prompts.")
    if options.fraction < 1 and not samples.n_valid.all():
        raise InputError(
            "on_policy.fraction: below 1 the other samples keep their completion, and some samples have none. Give "
            "completions, or 1.0."
        )


def require_answers_fit(
    samples: SampleDataset, options: OnPolicyOptions, windows: Iterable[tuple[str, int | None]]
) -> None:
    """Raises InputError if a prompt with its answer may be longer than a model has positions for.

    Args:
        windows: of each model its name and the number of its positions; None: no limit.
    """
    answer = options.max_new_tokens
    for name, window in windows:
        if window is None:
            continue
        # A prompt is no longer than its sample, so short samples need not be read.
        long = np.flatnonzero(samples.lengths > window - answer).tolist()
        longest = max((prompt_length(samples[index]) for index in long), default=0)
        if longest + answer > window:
            raise InputError(
                f"on_policy.max_new_tokens: {answer} after a prompt of up to {longest} tokens, but {name} has "
                f"positions for {window}. Lower max_new_tokens, or data.max_length."
            )


@dataclass
class RolloutSums:
    """Counts over answers, to be added up over ranks and steps; ``longest`` is a maximum."""

    rollouts: int = 0
    tokens: int = 0
    ended: int = 0
    longest: int = 0
    grams: int = 0
    repeated_grams: int = 0
    seconds: float = 0.0

    def add(self, other: "RolloutSums") -> None:
        for name, value in vars(other).items():
            combine = max if name == "longest" else operator.add
            setattr(self, name, combine(getattr(self, name), value))

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], seconds: float) -> "RolloutSums":
        sums = cls(seconds=seconds)
        for rollout in rollouts:
            answer = rollout.answer
            grams = [tuple(answer[begin : begin + 4]) for begin in range(len(answer) - 3)]
            repeated = len(grams) - len(set(grams))
            sums.add(cls(1, len(answer), rollout.is_ended, len(answer), len(grams), repeated))
        return sums

    def figures(self) -> dict[str, float | int | None]:
        """Means and shares; None where there is nothing to divide by."""
        rollouts, grams = self.rollouts or None, self.grams or None
        return {
            "rollouts": self.rollouts,
            "tokens": self.tokens,
            "mean_tokens": self.tokens / rollouts if rollouts else None,
            "longest_tokens": self.longest,
            "ended_share": self.ended / rollouts if rollouts else None,
            "repeated_share": self.repeated_grams / grams if grams else None,
            "seconds": round(self.seconds, 3),
        }


class RolloutLog(TrainerCallback, ExportableState):
    """Counts the student's answers, in every checkpoint, and writes some of them to a file, one a line."""

    lines: StepLines  # opened when training begins, so that a run that was moved goes on where it is now

    def __init__(self) -> None:
        self.sums: dict[str, float] = dict(vars(RolloutSums()))  # over the whole run
        self.since_logged: dict[str, float] = dict(vars(RolloutSums()))
        self._last: list[Rollout] = []

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"sums": self.sums, "since_logged": self.since_logged}}

    def add(self, rollouts: list[Rollout], seconds: float) -> None:
        """Add the rollouts of a step, which every rank passes its own of."""
        sums = RolloutSums.of(rollouts, seconds)
        total, since = RolloutSums(**self.sums), RolloutSums(**self.since_logged)  # type: ignore[arg-type]
        for rank_sums in gather_object([sums]) if PartialState().num_processes > 1 else [sums]:
            total.add(rank_sums)
            since.add(rank_sums)
        self.sums, self.since_logged, self._last = dict(vars(total)), dict(vars(since)), rollouts

    def figures(self) -> dict[str, float | int | None]:
        """Means and shares over all answers of the run."""
        return RolloutSums(**self.sums).figures()  # type: ignore[arg-type]

    def take(self) -> dict[str, float]:
        """Figures over the answers since the last logged step."""
        figures = RolloutSums(**self.since_logged).figures()  # type: ignore[arg-type]
        self.since_logged = dict(vars(RolloutSums()))
        names = ("mean_tokens", "ended_share", "repeated_share", "seconds")
        return {f"rollout_{name}": value for name in names if (value := figures[name]) is not None}

    def write(self, tokenizer: PreTrainedTokenizerBase, count: int, step: int) -> None:
        """Write the texts of ``count`` answers of the last step."""
        self.lines.append(
            [
                {
                    "step": step,
                    "prompt": tokenizer.decode(rollout.prompt),
                    "answer": tokenizer.decode(rollout.answer),
                    "prompt_tokens": len(rollout.prompt),
                    "answer_tokens": len(rollout.answer),
                    "ended": rollout.is_ended,
                }
                for rollout in self._last[:count]
            ]
        )

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        file = getattr(args, "rollouts_file", None)
        self.lines = StepLines(Path(file or Path(args.output_dir) / "rollouts.jsonl"))
        if state.is_world_process_zero:
            self.lines.cut(state.global_step)
