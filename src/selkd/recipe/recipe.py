"""The recipe: one description of a distillation, read from YAML, checked whole before anything runs.

A recipe factorises into choices that combine freely: criterion x positions x classes x samples. Every key has an
effect; a key that a choice makes meaningless (a fraction beside ``policy: all``) is null in the resolved recipe.
"""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from selkd.recipe.choices import ClassOptions, CriterionOptions, OnPolicyOptions, PositionOptions, SampleOptions
from selkd.recipe.data import DataOptions
from selkd.recipe.evaluation import EvaluationOptions
from selkd.recipe.models import StudentOptions, TeacherOptions
from selkd.recipe.part import Part


class CacheOptions(Part):
    """The teacher's drawn classes on disk. ``path`` null: inside the run."""

    path: str | None = Field(
        None, description="a folder, or an address of fsspec (s3://…); recipes may share it; null: inside the run"
    )


class HubOptions(Part):
    """Where the finished student is pushed."""

    repo: str = Field(pattern=r"^[\w][\w.-]*/[\w][\w.-]*$", description="owner/name; made if it is not there")
    private: bool = Field(True, description="whether a new repository is private")


def _checked_training(given: Any) -> Any:
    from selkd.recipe.training import check_training  # late: it needs transformers, `selkd --help` does not

    return check_training(given)


class Recipe(Part):
    """One distillation, read top to bottom."""

    name: str | None = Field(
        None, pattern=r"^[\w][\w.-]*$", description="the run's folder below runs/, if none is given"
    )
    teacher: TeacherOptions = Field(description="the large model")
    student: StudentOptions = Field(description="the small model")
    data: DataOptions = Field(description="the text")
    # Made when a recipe is read: to check them is to look names up, which imports torch.
    criterion: CriterionOptions = Field(
        default_factory=CriterionOptions, description="how teacher and student are compared"
    )
    positions: PositionOptions = Field(default_factory=PositionOptions, description="which positions of a sample count")
    classes: ClassOptions = Field(default_factory=ClassOptions, description="which vocabulary classes are compared")
    samples: SampleOptions | None = Field(None, description="which samples are trained on; null: all")
    on_policy: OnPolicyOptions | None = Field(
        None, description="the student answers prompts itself and learns at its answers; null: the data's completions"
    )
    cache: CacheOptions | None = Field(None, description="the teacher's drawn classes on disk; null: a live teacher")
    training: Annotated[dict[str, Any], BeforeValidator(_checked_training)] = Field(
        {}, description="names of transformers.TrainingArguments"
    )
    evaluation: EvaluationOptions = Field(EvaluationOptions(), description="what is measured, and when")
    hub: HubOptions | None = Field(None, description="push the finished student there; null: it stays here")
    seed: int = Field(1337, ge=0, lt=2**32, description="of everything that is random")

    @model_validator(mode="after")
    def _possible(self) -> "Recipe":
        if self.samples is not None and self.samples.metric == "all":  # no filter
            object.__setattr__(self, "samples", None)
        if self.teacher.quantization is not None and self.student.prune_from_teacher is not None:
            raise ValueError(
                "teacher.quantization: a student is not cut from quantised layers; give student.model, or leave it out"
            )
        if self.on_policy is not None:
            self._settle(criterion=on_policy_criterion(self.criterion))
            self._check_on_policy(self.on_policy)
        check_parts(self.criterion, self.positions, self.classes)
        if (self.positions.skip_first or 0) >= self.data.max_length - 1:
            raise ValueError(
                f"positions.skip_first: {self.positions.skip_first} leaves no position of samples of data.max_length = "
                f"{self.data.max_length} tokens; lower it"
            )
        if self.cache is not None and self.classes.sampler == "all":
            raise ValueError(
                "cache: the full distribution (classes.sampler: all) is too large to store; "
                "draw classes with classes.sampler: systematic or rs_kd, or set cache: null for a live teacher"
            )
        if self.cache is not None and self.positions.needs_teacher:
            raise ValueError(
                f"positions.metric: {self.positions.metric} needs the teacher's full distribution at every position, "
                "and a cache holds drawn classes alone; take a metric of the student (student_entropy, student_ce), or "
                "set cache: null for a live teacher"
            )
        if self.data.is_prompt_only and self.on_policy is None:
            raise ValueError(
                "data.completion_field: without completions there is nothing to learn from; give it, or let the "
                "student answer (on_policy: {})"
            )
        if self.data.is_prompt_only and self.samples is not None:
            raise ValueError(
                "samples: a sample is scored on its completion, and prompts alone have none; give "
                "data.completion_field, or samples: null"
            )
        if self.data.is_prompt_only and "fidelity" in self.evaluation.suite:
            raise ValueError(
                "evaluation.suite: fidelity is measured on completions, and prompts alone have none; give "
                "data.completion_field, or leave fidelity out of evaluation.suite"
            )
        if "fidelity" in self.evaluation.suite and self.data.held_out_fraction == 0:
            raise ValueError(
                "evaluation.suite: [fidelity] measures held-out text, and data.held_out_fraction is 0; "
                "raise it, or leave fidelity out of evaluation.suite"
            )
        if self.training.get("fsdp"):
            self.check_sharded()
        return self

    def check_sharded(self) -> None:
        """What a student that FSDP shards can't do, whether the recipe or a launcher says that it is sharded.

        Raises:
            ValueError: adapters, measurements on the way, or the student's own answers.
        """
        if self.student.lora is not None:
            raise ValueError("training.fsdp: adapters (student.lora) are trained on one GPU or with DDP")
        if self.evaluation.every_steps is not None:
            raise ValueError(
                "evaluation.every_steps: a student sharded by training.fsdp is measured after training only"
            )
        if self.on_policy is not None:
            raise ValueError(
                "training.fsdp: a sharded student does not generate; on_policy runs on one GPU or under DDP"
            )

    def _check_on_policy(self, options: OnPolicyOptions) -> None:
        if self.cache is not None:
            raise ValueError(
                "cache: it holds the teacher's classes for the data's own tokens, and what the student will answer is "
                "not known before; on_policy needs a live teacher, cache: null"
            )
        if not self.data.has_prompts:
            raise ValueError(
                "on_policy: the student answers prompts, and data.text_field has none; give data.prompt_field or "
                "data.messages_field"
            )
        if self.data.loss_on == "all":
            raise ValueError("data.loss_on: all learns prompts, and on_policy what the student answers; leave it out")
        if self.data.packing:
            raise ValueError("data.packing: on_policy answers one prompt a sample; set data.packing: false")
        if self.data.is_prompt_only and options.fraction < 1:
            raise ValueError(
                "on_policy.fraction: below 1 the other samples keep their completion, and there is none; give "
                "data.completion_field, or 1.0"
            )
        if options.temperature == 0 and options.top_p < 1:
            raise ValueError("on_policy.top_p: without effect at temperature 0, which takes the most likely; leave it")

    def resolved(self) -> dict[str, Any]:
        """The whole recipe as plain data, every default written out; reading it back gives an equal recipe."""
        return self.model_dump(mode="json")


def on_policy_criterion(given: CriterionOptions) -> CriterionOptions:
    """The criterion of an on-policy run: reverse KL where none is named.

    Raises:
        ValueError: cross-entropy is mixed in, whose true tokens would be the student's own draws.
    """
    if given.kd_weight < 1:
        raise ValueError(
            f"criterion.kd_weight: expected 1.0 beside on_policy, got {given.kd_weight}. Cross-entropy would teach the "
            "student the very tokens that it drew; set it to 1.0, and keep some of the data's completions with "
            "on_policy.fraction"
        )
    if "name" in given.model_fields_set:
        return given
    return CriterionOptions.model_validate({**given.model_dump(exclude_unset=True), "name": "reverse_kl"})


def check_parts(criterion: CriterionOptions, positions: PositionOptions, classes: ClassOptions) -> None:
    """What the three choices of a loss ask of each other; for a recipe and for ``DistillArguments``.

    Raises:
        ValueError: they don't go together; the key and the reason are told.
    """
    del positions  # goes with every criterion and every sampler
    if classes.sampler != "all" and criterion.name != "forward_kl":
        raise ValueError(
            f"criterion.name: {criterion.name} of drawn classes would be a biased estimate: drawn classes give forward "
            "KL's gradient alone without bias (E[c/U] = p enters it linearly); take criterion.name: forward_kl, or "
            "classes.sampler: all with a live teacher (cache: null)"
        )
