"""The recipe: the whole description of a distillation, which is checked before anything runs."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from selkd.plugins import Metric
from selkd.recipe.choices import ClassOptions, CriterionOptions, OnPolicyOptions, PositionOptions, SampleOptions
from selkd.recipe.combinations import (
    check_batch,
    check_cached,
    check_cached_metric,
    check_combination,
    check_sharded,
    on_policy_criterion,
)
from selkd.recipe.data import DataOptions
from selkd.recipe.evaluation import EvaluationOptions
from selkd.recipe.foreign import check_foreign, evaluation_of, without_address
from selkd.recipe.models import StudentOptions, TeacherOptions
from selkd.recipe.part import Part, PathText
from selkd.recipe.training import check_training


class CacheOptions(Part):
    """The teacher's drawn classes on disk."""

    path: PathText | None = Field(
        None,
        description="A folder, or an address of fsspec (s3://…), which recipes may share; null: inside the run.",
    )
    scalars: bool = Field(
        True,
        description="Store the teacher's entropy and log p(y) of each position, too: metrics of the teacher and the "
        "true KL(p ‖ q) then need no teacher.",
    )


class HubOptions(Part):
    """Where the finished student is pushed."""

    repo: str = Field(
        pattern=r"^[\w][\w.-]*/[\w][\w.-]*$", description="The repository, owner/name; it is made if it does not exist."
    )
    private: bool = Field(True, description="Whether a new repository is private.")


class RunOptions(Part):
    """How a run ends early and how often it saves. A run that is continued may have other values."""

    grace_seconds: float = Field(
        25.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds from SIGTERM, SIGUSR1 or the end of max_hours until the run has saved and ended.",
    )
    max_hours: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="The run saves and ends after so many hours; null: no limit."
    )
    save_minutes: float | None = Field(
        10.0,
        gt=0,
        allow_inf_nan=False,
        description="A checkpoint is also written after so many minutes of training without one; null, or "
        "training.save_strategy: no, and it is not.",
    )


class Recipe(Part):
    """One distillation. It factorises into choices that combine freely: criterion x positions x classes x samples.

    A key that a choice makes meaningless (a fraction beside ``policy: all``) is null in the resolved recipe.
    """

    name: PathText | None = Field(
        None,
        pattern=r"^[\w][\w.-]*$",
        description="What the run is called; null: as its folder. Also the folder below runs/, if none is given.",
    )
    teacher: TeacherOptions = Field(description="The large model.")
    student: StudentOptions = Field(description="The small model.")
    data: DataOptions = Field(description="The text.")
    # Default factories, as checking these parts looks into the registry of choices.
    criterion: CriterionOptions = Field(
        default_factory=CriterionOptions, description="How teacher and student are compared."
    )
    positions: PositionOptions = Field(
        default_factory=PositionOptions, description="Which positions of a sample count."
    )
    classes: ClassOptions = Field(default_factory=ClassOptions, description="Which vocabulary classes are compared.")
    samples: SampleOptions | None = Field(None, description="Which samples are trained on; null: all.")
    on_policy: OnPolicyOptions | None = Field(
        None,
        description="How the student answers prompts itself, to learn at its answers; null: it does not.",
    )
    cache: CacheOptions | None = Field(
        None, description="Where the teacher's drawn classes are kept; null: a live teacher."
    )
    training: Annotated[dict[str, Any], BeforeValidator(check_training)] = Field(
        {}, description="How the student is trained, with keys of transformers.TrainingArguments."
    )
    evaluation: EvaluationOptions = Field(EvaluationOptions(), description="What is measured, and when.")
    hub: HubOptions | None = Field(None, description="Where the finished student is pushed; null: nowhere.")
    run: RunOptions = Field(RunOptions(), description="How the run ends early, and how often it saves.")
    seed: int = Field(1337, ge=0, lt=2**32, description="The seed of everything that is random.")

    @model_validator(mode="after")
    def _possible(self) -> "Recipe":
        if self.samples is not None and self.samples.metric == "all":  # keeps every sample
            self._settle(samples=None)
        if self.teacher.quantization is not None and self.student.prune_from_teacher is not None:
            raise ValueError(
                "teacher.quantization: a student is not cut from quantised layers; give student.model, or leave it out"
            )
        if self.on_policy is not None:
            self._settle(criterion=on_policy_criterion(self.criterion))
        check_combination(self.criterion, self.positions, self.classes, self.on_policy, self.data)
        try:
            check_batch(self.training.get("per_device_train_batch_size", 1), self.data)
        except ValueError as error:
            raise ValueError(f"training.{error}") from None
        if self.teacher.is_foreign:  # first, as what a cache of another teacher could do is no way out
            check_foreign(self)
            self._settle(evaluation=evaluation_of(self.evaluation))
        if self.cache is not None:
            self._check_cache(self.cache)
        elif self.positions.scoring_draws is not None:
            raise ValueError("positions.scoring_draws: a live teacher scores by its whole distribution; leave it out")
        elif self.samples is not None and self.samples.from_cache and self.samples.path is None:
            raise ValueError("samples.from_cache: there is no cache; set cache: {}, give samples.path, or leave it out")
        if self.data.is_prompt_only and self.samples is not None:
            raise ValueError(
                "samples: a sample is scored on its completion, and prompts alone have none; give "
                "data.completion_field, or samples: null"
            )
        if "fidelity" in self.evaluation.suite:
            self._check_fidelity()
        if self.training.get("fsdp"):
            self.check_sharded()
        return self

    def _check_cache(self, cache: CacheOptions) -> None:
        if self.on_policy is not None:
            raise ValueError(
                "cache: it holds the teacher's classes for the data's own tokens, and what the student will answer is "
                "not known before; on_policy needs a live teacher, cache: null"
            )
        if self.classes.sampler == "all":
            raise ValueError(
                "cache: the full distribution (classes.sampler: all) is too large to store; "
                "draw classes with classes.sampler: systematic or rs_kd, or set cache: null for a live teacher"
            )
        temperature, has_scalars = self.criterion.temperature, cache.scalars and not self.teacher.is_foreign
        check_cached(self.positions, self.classes, temperature, has_scalars=has_scalars)
        if self.samples is not None and self.samples.from_cache:
            metric = Metric.find(self.samples.metric)
            check_cached_metric("samples.metric", metric, self.classes, temperature, has_scalars=has_scalars)

    def _check_fidelity(self) -> None:
        if self.data.is_prompt_only:
            raise ValueError(
                "evaluation.suite: fidelity is measured on completions, and prompts alone have none; give "
                "data.completion_field, or leave fidelity out of evaluation.suite"
            )
        if self.data.held_out_fraction == 0:
            raise ValueError(
                "evaluation.suite: [fidelity] measures held-out text, and data.held_out_fraction is 0; "
                "raise it, or leave fidelity out of evaluation.suite"
            )

    def check_sharded(self) -> None:
        """Raises ValueError for what can't be done with a sharded student; a launcher may ask for sharding, too."""
        check_sharded(self.on_policy, has_adapters=self.student.lora is not None)
        if self.evaluation.every_steps is not None and self.evaluation.has_benchmarks:
            raise ValueError(
                "evaluation.every_steps: benchmarks are measured by one process, which has a part only of a student "
                "sharded by training.fsdp; leave [fidelity] alone in evaluation.suite, or every_steps out to measure "
                "benchmarks before and after training"
            )

    def resolved(self) -> dict[str, Any]:
        """The whole recipe as plain data, with every default; reading it back gives an equal recipe."""
        return self.model_dump(mode="json")

    def identity(self) -> dict[str, Any]:
        """What makes two runs the same: ``resolved`` without how a run ends early, and without where a server is asked
        and how, which may change on the way."""
        content = {key: value for key, value in self.resolved().items() if key != "run"}
        return content | {"teacher": without_address(content["teacher"])}
