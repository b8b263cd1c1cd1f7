"""What the trainer asks of on-policy distillation: a step's answers, their figures for the log, some to read."""

from collections.abc import Sequence
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selkd.data.samples import SampleDataset
from selkd.errors import InputError
from selkd.models.generation import stop_ids
from selkd.models.loading import window_of
from selkd.teacher import Batch, Teacher
from selkd.training.arguments import DistillArguments
from selkd.training.rollout import Answering, Rollout, RolloutSums, longest_prompt


class Answers:
    """The student's answers in a training.

    Args:
        args: with ``on_policy``.
        model: the student.
        tokenizer: the one that both models share.
        n_classes: classes that they share.
    """

    def __init__(
        self, args: DistillArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, n_classes: int
    ) -> None:
        options = args.on_policy_options
        assert options is not None, "made for on-policy runs alone"
        pad_token_id = 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        self.answering = Answering(options, args.seed, stop_ids(model, tokenizer), pad_token_id, n_classes)
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

    def require_positions(self, dataset: SampleDataset | None, models: Sequence[Any]) -> None:
        """Raises InputError if a prompt with its answer may be longer than a model has positions for."""
        answer = self.answering.options.max_new_tokens
        for model in models:
            limit = window_of(model)
            if dataset is None or limit is None:
                continue
            # The answer takes the completion's place, so only long samples are read for where their prompt ends.
            longest = longest_prompt(dataset, limit - answer)
            if longest + answer > limit:
                raise InputError(
                    f"on_policy.max_new_tokens: {answer} after a prompt of up to {longest} tokens, but "
                    f"{type(model).__name__} has positions for {limit}. Lower max_new_tokens, or max_length."
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
