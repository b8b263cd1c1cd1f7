"""The choices that make up a distillation, each with the options that belong to it.

criterion (how to compare) x positions (metric, policy, fraction) x classes (sampler, draws) x samples (metric,
fraction). Any goes with any, but for what ``selkd.recipe.recipe`` refuses with a reason. A key that a choice makes
meaningless (a fraction beside ``policy: all``) is null once read.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from selkd.plugins import Criterion, Metric, Policy, Sampler, unknown
from selkd.recipe.part import Fraction, Part


def _of_samples(name: str) -> str:
    allowed = [*Metric.of_samples(), "all"]
    if name not in allowed:
        raise ValueError(unknown(name, allowed))
    return name


CriterionName = Annotated[str, AfterValidator(Criterion.check)]
MetricName = Annotated[str, AfterValidator(Metric.check)]
PolicyName = Annotated[str, AfterValidator(Policy.check)]
SamplerName = Annotated[str, AfterValidator(Sampler.check)]
SampleMetric = Annotated[str, AfterValidator(_of_samples)]


class CriterionOptions(Part):
    """How teacher and student are compared. ``kd_weight`` is lambda: the rest is cross-entropy with the text."""

    name: CriterionName = Field(
        "forward_kl", description="a criterion of the table below, or your own as module:function"
    )
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False, description="divides both models' logits")
    temperature_squared: bool = Field(True, description="multiply the divergence by the temperature's square")
    kd_weight: float = Field(1.0, ge=0, le=1, description="lambda: the divergence's share, the rest is cross-entropy")
    alpha: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="skew_kl, skew_reverse_kl: the mixture's share; dkd: TCKD's weight"
    )
    beta: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="jsd: the teacher's weight in the mixture; dkd: NCKD's weight"
    )

    @model_validator(mode="after")
    def _complete(self) -> "CriterionOptions":
        criterion = Criterion.find(self.name)
        for key in ("alpha", "beta"):
            value = getattr(self, key)
            if key not in criterion.options:
                if value is not None:
                    raise ValueError(f"criterion.{key}: {self.name} has no {key}; leave it out")
            elif value is None:
                self._settle(**{key: criterion.options[key]})
            elif criterion.mixes and not 0 < value < 1:
                raise ValueError(f"criterion.{key}: {self.name} mixes two distributions; give a share between 0 and 1")
        if criterion.options and not any(getattr(self, key) for key in criterion.options):
            zeros = " and ".join(criterion.options)
            raise ValueError(f"criterion: {self.name} with {zeros} 0 compares nothing; give one of them weight")
        return self


class FractionSchedule(Part):
    """A fraction that moves: from ``from`` to ``to`` over the first share ``over`` of the optimiser steps."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    start: Fraction = Field(alias="from", description="the fraction at the first step")
    to: Fraction = Field(description="the fraction from the end of the schedule on")
    over: Fraction = Field(1.0, description="the share of the run's optimiser steps that the schedule takes")
    shape: Literal["linear", "cosine"] = Field("linear", description="how it moves in between")


MaybeScheduled = Annotated[
    Annotated[Fraction, Tag("<number>")] | Annotated[FractionSchedule, Tag("<schedule>")],
    Discriminator(lambda value: "<schedule>" if isinstance(value, dict | FractionSchedule) else "<number>"),
]


def _steps_or_share(value: Any) -> Any:
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and value > 1 and value == int(value):
        return int(value)
    if is_number and (0 < value <= 1):
        return value
    raise ValueError("expected a whole number of optimiser steps, or a share of the run's in (0, 1] such as 0.5 or 1.0")


class PositionOptions(Part):
    """Which positions of a sample are supervised, and how strongly."""

    renamed: ClassVar[Mapping[str, str]] = {"probed_share": "calibration_fraction"}

    metric: MetricName | None = Field(
        "student_entropy", description="a metric of the table below, or your own as module:function"
    )
    policy: PolicyName = Field("top_k", description="a policy of the table below, or your own as module:function")
    fraction: MaybeScheduled | None = Field(
        0.20, description="k: a share of the valid positions, or a schedule {from, to, over, shape: linear or cosine}"
    )
    reduction: Literal["per_sample", "per_position"] | None = Field(
        None,
        description="per_sample (default): the mean over samples of each one's mean; per_position: the mean over all "
        "picked positions of the step (hard policies; gls always)",
    )
    queue_size: int | None = Field(None, ge=10, description="gls: how many recent scores set the threshold; 30000")
    curriculum_steps: Annotated[int | float | None, BeforeValidator(_steps_or_share)] = Field(
        None, description="curriculum: optimiser steps from easy to hard, or a share of the run's (1.0, the default)"
    )
    smoothing: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="pos_rs: probability in proportion to u^(1/smoothing); 1"
    )
    clip: Fraction | None = Field(None, description="pos_rs: u is cut at this quantile; null: not cut")
    skip_first: int | None = Field(
        None, ge=0, description="pos_rs: the first positions of each document that are not eligible; 0"
    )
    coverage: float | None = Field(
        None, ge=0, le=1, description="pos_rs: the share of the draws that goes to the highest for sure; 0"
    )
    scoring: Literal["exact", "two_stage"] | None = Field(
        None,
        description="exact (default), or two_stage for top_k of student_entropy: estimated at every position, exact at "
        "the best of them",
    )
    frequent_classes: int | None = Field(
        None, ge=1, description="two_stage: how many of the most frequent classes are counted; 4096"
    )
    tail_classes: int | None = Field(
        None, ge=1, description="two_stage: about how many of the other classes stand for all of them; 1024"
    )
    rescored_share: Fraction | None = Field(
        None, description="two_stage: the share of the valid positions, beyond `fraction`, that are rescored; 0.15"
    )
    calibration_fraction: float | None = Field(
        None,
        ge=0,
        le=1,
        description="two_stage: the share of each sample's positions whose exact distributions tell its frequent "
        "classes; 1/32; 0: the training text tells them",
    )

    @model_validator(mode="after")
    def _complete(self) -> "PositionOptions":
        policy = Policy.find(self.policy)
        self._settle_scoring(policy)
        self._settle_options(policy)
        if not policy.ranks:
            self._settle(metric=policy.metric)
        elif self.metric is None:
            raise ValueError(f"positions.policy: {policy.name} goes by a metric; give positions.metric")
        if policy.fraction == "none":
            self._settle(fraction=None)
        elif policy.fraction == "needed" and self.fraction is None:
            raise ValueError(f"positions.policy: {policy.name} picks a share; give positions.fraction")
        if self.reduction is None:
            self._settle(reduction=policy.reductions[0])
        elif self.reduction not in policy.reductions and self.reduction == "per_sample":
            raise ValueError(
                f"positions.reduction: {policy.name} counts over the whole step, per_position; leave it out"
            )
        elif self.reduction not in policy.reductions:
            hard = [name for name, entry in Policy.builtin().items() if len(entry.reductions) > 1]
            raise ValueError(
                f"positions.reduction: {policy.name} gives its positions weights of their own; only policies that pick "
                f"({', '.join(hard)}) are counted per_position"
            )
        return self

    def _settle_scoring(self, policy: Policy) -> None:
        """``scoring`` and the options of ``two_stage``, where a metric is computed."""
        if self.scoring == "two_stage":
            if self.policy != "top_k" or self.metric != "student_entropy":
                raise ValueError(
                    "positions.scoring: two_stage finds the highest of the student's entropy and estimates the rest, "
                    f"so it goes with policy top_k and metric student_entropy; {self.policy} of {self.metric} needs "
                    "exact scores (scoring: exact)"
                )
        else:
            self._settle(scoring="exact" if policy.ranks else None)
        _settle_estimate(self, "positions", "two_stage", rescored_share=0.15, calibration_fraction=1 / 32)

    def _settle_options(self, policy: Policy) -> None:
        """The options that only some policies have: their defaults there, refused elsewhere."""
        for key in {key: None for entry in Policy.builtin().values() for key in entry.options}:
            if key in policy.options:
                if getattr(self, key) is None:
                    self._settle(**{key: policy.options[key]})
            elif getattr(self, key) is not None:
                having = " and ".join(name for name, entry in Policy.builtin().items() if key in entry.options)
                raise ValueError(
                    f"positions.{key}: an option of {having}, without effect on {policy.name}; leave it out"
                )

    @property
    def needs_teacher(self) -> bool:
        """Whether the metric is computed from the teacher's full distribution."""
        return self.metric is not None and Metric.find(self.metric).needs_teacher


class ClassOptions(Part):
    """Which vocabulary classes of the teacher's distribution are compared: all, or ``draws`` from it a position."""

    sampler: SamplerName = Field("all", description="a sampler of the table below, or your own as module:function")
    draws: int | None = Field(64, ge=1, le=65535, description="draws a position (top_k: classes); null with all")

    @model_validator(mode="after")
    def _complete(self) -> "ClassOptions":
        if self.sampler == "all":
            self._settle(draws=None)
        elif self.draws is None:
            raise ValueError(f"classes.sampler: {self.sampler} draws classes; give classes.draws")
        return self


class SampleOptions(Part):
    """Which samples are trained on: the highest share by the frozen initial student's score."""

    renamed: ClassVar[Mapping[str, str]] = {"probed_share": "calibration_fraction"}

    metric: SampleMetric = Field(
        "student_entropy", description="a metric of the table below, what a sample is scored by; all: no filter"
    )
    fraction: Fraction = Field(0.20, description="l: the share of the samples that is kept")
    path: str | None = Field(None, description="the scores' file, written or reused; null: inside the run")
    scoring: Literal["exact", "approximate"] = Field(
        "exact", description="exact, or approximate for student_entropy: estimated from a part of the classes"
    )
    frequent_classes: int | None = Field(
        None, ge=1, description="approximate: how many of the most frequent classes are counted; 4096"
    )
    tail_classes: int | None = Field(
        None, ge=1, description="approximate: about how many of the other classes stand for all of them; 1024"
    )
    calibration_fraction: float | None = Field(
        None,
        ge=0,
        le=1,
        description="approximate: the share of each sample's positions whose exact distributions tell its frequent "
        "classes; 1/16; 0: the training text tells them",
    )

    @model_validator(mode="after")
    def _complete(self) -> "SampleOptions":
        if self.scoring == "approximate" and self.metric != "student_entropy":
            raise ValueError(
                f"samples.scoring: approximate estimates the student's entropy; {self.metric} needs scoring: exact"
            )
        _settle_estimate(self, "samples", "approximate", calibration_fraction=1 / 16)
        return self

    @property
    def needs_teacher(self) -> bool:
        """Whether the scores are computed from the teacher's full distribution."""
        return Metric.find(self.metric).needs_teacher


class OnPolicyOptions(Part):
    """How the student's own answers (rollouts) are drawn, and how many samples of a step they replace."""

    fraction: Fraction = Field(
        1.0, description="share of the samples that the student answers; the others keep the data's completion"
    )
    max_new_tokens: int = Field(256, ge=1, description="tokens of an answer at most")
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False, description="of the draw; 0: the most likely token")
    top_p: Fraction = Field(1.0, description="draw from the most likely classes that make up this probability")
    at_once: int | None = Field(
        None, ge=1, description="prompts that are answered together on a device; null: all of an optimiser step"
    )
    log_rollouts: int = Field(2, ge=0, description="answers that are written to rollouts.jsonl at each logged step")


def _settle_estimate(part: PositionOptions | SampleOptions, name: str, scoring: str, **defaults: float) -> None:
    """The options of an estimate: their defaults with ``scoring``, refused without it."""
    for key, default in {"frequent_classes": 4096, "tail_classes": 1024, **defaults}.items():
        value = getattr(part, key)
        if part.scoring == scoring and value is None:
            part._settle(**{key: default})
        elif part.scoring != scoring and value is not None:
            raise ValueError(f"{name}.{key}: an option of scoring: {scoring}, without effect on exact; leave it out")
