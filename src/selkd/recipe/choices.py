"""The choices that make up a distillation, each with its options.

criterion (how to compare) x positions (metric, policy, fraction) x classes (sampler, draws) x samples (metric,
fraction). They combine freely, except where ``selkd.recipe.combinations`` and ``selkd.recipe.recipe`` refuse a
combination and say why. A key that another choice makes meaningless (a fraction beside ``policy: all``) becomes null.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from selkd.plugins import Criterion, Metric, Policy, Sampler, unknown
from selkd.recipe.part import LARGEST_COUNT, Count, Fraction, Part, PathText


def _sample_metric(name: str) -> str:
    allowed = [*Metric.of_samples(), "all"]
    if name not in allowed:
        raise ValueError(unknown(name, allowed))
    return name


CriterionName = Annotated[str, AfterValidator(Criterion.check)]
MetricName = Annotated[str, AfterValidator(Metric.check)]
PolicyName = Annotated[str, AfterValidator(Policy.check)]
SamplerName = Annotated[str, AfterValidator(Sampler.check)]
SampleMetric = Annotated[str, AfterValidator(_sample_metric)]


# Beyond these nothing is left of a distribution but its highest class, or nothing but rounding of float32.
COLDEST, HOTTEST = 1e-6, 1e6
HEAVIEST = 1e6  # a weight in a sum of float32


class CriterionOptions(Part):
    """How teacher and student are compared at a position."""

    name: CriterionName = Field(
        "forward_kl", description="The criterion D: one of the table below, or your own as module:function."
    )
    temperature: float = Field(
        1.0, ge=COLDEST, le=HOTTEST, allow_inf_nan=False, description="Divides the logits of both models."
    )
    temperature_squared: bool = Field(True, description="Multiply the divergence by the square of the temperature.")
    kd_weight: float = Field(
        1.0,
        ge=0,
        le=1,
        description="lambda: the weight of the divergence; cross-entropy with the text gets the rest. With 0 the text "
        "alone teaches, and only a metric that needs the teacher asks it.",
    )
    alpha: float | None = Field(
        None,
        ge=0,
        le=HEAVIEST,
        allow_inf_nan=False,
        description="The alpha of skew_kl and skew_reverse_kl; for dkd, TCKD's weight.",
    )
    beta: float | None = Field(
        None,
        ge=0,
        le=HEAVIEST,
        allow_inf_nan=False,
        description="The teacher's weight in jsd's mixture; for dkd, NCKD's weight.",
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
    """A fraction that changes during the run."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    start: Fraction = Field(alias="from", description="The fraction at the first optimiser step.")
    to: Fraction = Field(description="The fraction when the schedule has ended.")
    over: Fraction = Field(1.0, description="The share of the run's optimiser steps after which the schedule ends.")
    shape: Literal["linear", "cosine"] = Field("linear", description="The curve between the two fractions.")


MaybeScheduled = Annotated[
    Annotated[Fraction, Tag("<number>")] | Annotated[FractionSchedule, Tag("<schedule>")],
    Discriminator(lambda value: "<schedule>" if isinstance(value, dict | FractionSchedule) else "<number>"),
]


def _steps_or_share(value: Any) -> Any:
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and 1 < value <= LARGEST_COUNT and value == int(value):
        return int(value)
    if is_number and (0 < value <= 1):
        return value
    raise ValueError("expected a whole number of optimiser steps, or a share of the run's in (0, 1] such as 0.5 or 1.0")


class PositionOptions(Part):
    """Which positions of a sample count in its loss, and how much."""

    renamed: ClassVar[Mapping[str, str]] = {"probed_share": "calibration_fraction"}

    metric: MetricName | None = Field(
        "student_entropy",
        description="The metric u, where the policy goes by one: one of the table below, or your own as "
        "module:function.",
    )
    policy: PolicyName = Field(
        "all",
        description="The policy: one of the table below, or your own as module:function. Not given: top_k where a "
        "metric or scoring is, random where a fraction is, and else all.",
    )
    fraction: MaybeScheduled | None = Field(
        0.20,
        description="k, where the policy picks a share of the valid positions, or a schedule {from, to, over, shape}.",
    )
    reduction: Literal["per_sample", "per_position"] | None = Field(
        None,
        description="per_sample averages over samples, per_position over all selected positions of the step. The "
        "default is per_sample; gls is always per_position.",
    )
    queue_size: int | None = Field(
        None, ge=10, le=LARGEST_COUNT, description="For gls, how many recent scores set the threshold; default 30000."
    )
    curriculum_steps: Annotated[int | float | None, BeforeValidator(_steps_or_share)] = Field(
        None,
        description="For curriculum, the optimiser steps from easy to hard, or their share of the run's; default 1.0.",
    )
    smoothing: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="For pos_rs and pos_rs_corrected, draw in proportion to u^(1/smoothing); default 1.",
    )
    clip: Fraction | None = Field(None, description="For the same, the quantile at which u is cut; null: not cut.")
    skip_first: int | None = Field(
        None,
        ge=0,
        le=LARGEST_COUNT,
        description="For the same, how many first positions of each document are not eligible; default 0.",
    )
    coverage: float | None = Field(
        None,
        ge=0,
        le=1,
        description="For the same, the share of the draws that the highest scores get for sure; default 0.",
    )
    scoring: Literal["exact", "two_stage"] | None = Field(
        None,
        description="exact, the default, or two_stage, which for top_k of student_entropy estimates every score and "
        "computes the highest exactly.",
    )
    frequent_classes: Count | None = Field(
        None, description="For two_stage, how many of the most frequent classes are counted; default 4096."
    )
    tail_classes: Count | None = Field(
        None, description="For two_stage, about how many other classes stand for all of them; default 1024."
    )
    rescored_share: Fraction | None = Field(
        None,
        description="For two_stage, the share of the positions that are rescored beyond `fraction`; default 0.15.",
    )
    calibration_fraction: float | None = Field(
        None,
        ge=0,
        le=1,
        description="For two_stage, the share of each sample's positions whose exact distributions decide which "
        "classes are frequent; default 1/32. With 0 the training text decides.",
    )

    scoring_draws: Count | None = Field(
        None,
        description="With a teacher cache and a metric that has KL(p ‖ q): how many of a position's draws score it; "
        "the loss uses the others. Default: a quarter. With rs_kd draws the two are independent, and the loss stays "
        "unbiased; with systematic it comes out some hundredths of a nat too low at the selected positions.",
    )

    @model_validator(mode="before")
    @classmethod
    def _policy_of_what_is_given(cls, given: Any) -> Any:
        """Nobody means all positions who gives a metric to rank them by, or the share to learn at."""
        if not isinstance(given, Mapping) or given.get("policy") is not None:
            return given
        by_score, by_share = (
            any(given.get(key) is not None for key in keys) for keys in (("metric", "scoring"), ("fraction",))
        )
        return {**given, "policy": "top_k" if by_score else "random" if by_share else "all"}

    @model_validator(mode="after")
    def _complete(self) -> "PositionOptions":
        policy = Policy.find(self.policy)
        if policy.is_unread:  # the recipe of a run that is only read: it was completed when the run began
            return self
        self._settle_scoring(policy.ranks)
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
        elif self.reduction not in policy.reductions:
            if self.reduction == "per_sample":
                raise ValueError(
                    f"positions.reduction: {policy.name} counts over the whole step, per_position; leave it out"
                )
            hard = [name for name, entry in Policy.builtin().items() if len(entry.reductions) > 1]
            raise ValueError(
                f"positions.reduction: {policy.name} gives its positions weights of their own; only policies that pick "
                f"({', '.join(hard)}) are counted per_position"
            )
        return self

    def _settle_scoring(self, ranks: bool) -> None:
        """Check and complete ``scoring`` and the options of ``two_stage``; ``ranks``: the policy uses scores."""
        if self.scoring == "two_stage":
            if self.policy != "top_k" or self.metric != "student_entropy":
                raise ValueError(
                    "positions.scoring: two_stage finds the highest of the student's entropy and estimates the rest, "
                    f"so it goes with policy top_k and metric student_entropy; {self.policy} of {self.metric} needs "
                    "exact scores (scoring: exact)"
                )
        else:
            self._settle(scoring="exact" if ranks else None)
        _settle_estimate(self, "positions", "two_stage", rescored_share=0.15, calibration_fraction=1 / 32)

    def _settle_options(self, policy: Policy) -> None:
        """Check the options that only some policies have, and complete those of this one."""
        for key in {key: None for entry in Policy.builtin().values() for key in entry.options}:
            if key in policy.options:
                if getattr(self, key) is None:
                    self._settle(**{key: policy.options[key]})
            elif getattr(self, key) is not None:
                owners = " and ".join(name for name, entry in Policy.builtin().items() if key in entry.options)
                raise ValueError(
                    f"positions.{key}: an option of {owners}, without effect on {policy.name}; leave it out"
                )

    @property
    def needs_teacher(self) -> bool:
        """Whether the metric is computed from the teacher's distribution."""
        return self.metric is not None and Metric.find(self.metric).needs_teacher


class ClassOptions(Part):
    """Which vocabulary classes of the teacher's distribution are compared."""

    sampler: SamplerName = Field(
        "all", description="The class sampler: one of the table below, or your own as module:function."
    )
    draws: int | None = Field(64, ge=1, le=65535, description="Draws at a position; for top_k, classes; null for all.")
    tail: bool = Field(
        False,
        description="For top_k, keep the mass of all other classes as one class, in place of renormalising: a lower "
        "bound of forward KL.",
    )

    @model_validator(mode="after")
    def _complete(self) -> "ClassOptions":
        if self.tail and not Sampler.find(self.sampler).truncates:
            owners = " and ".join(name for name, entry in Sampler.builtin().items() if entry.truncates)
            raise ValueError(f"classes.tail: an option of {owners}; {self.sampler} leaves no mass out. Leave it out")
        if self.sampler == "all":
            if "draws" in self.model_fields_set and self.draws is not None:
                raise ValueError(
                    f"classes.draws: {self.draws} draws have no effect beside sampler: all, which takes every class; "
                    "leave it out, or null (--set classes.draws=null), or name a sampler that draws"
                )
            self._settle(draws=None)
        elif self.draws is None:
            raise ValueError(f"classes.sampler: {self.sampler} draws classes; give classes.draws")
        return self


class SampleOptions(Part):
    """Which samples are trained on: those that the frozen initial student scores highest."""

    renamed: ClassVar[Mapping[str, str]] = {"probed_share": "calibration_fraction"}

    metric: SampleMetric = Field(
        "student_entropy", description="The metric that scores samples, one of the table below; all: keep every sample."
    )
    fraction: Fraction = Field(0.20, description="l: the share of the samples to keep.")
    from_cache: bool = Field(
        False,
        description="Score kl or ce_ratio from a teacher cache of the whole text, which is built first: the teacher "
        "runs once for scoring and training. kl is then estimated from the draws that are trained on; the loss of the "
        "kept samples comes out too high by 0.001 nats or less at 511 positions a sample, 0.02 at 16.",
    )
    path: PathText | None = Field(
        None, description="The file of the scores, written or reused; null: in the run's folder."
    )
    scoring: Literal["exact", "approximate"] = Field(
        "exact", description="exact, or approximate, which estimates student_entropy from a part of the classes."
    )
    frequent_classes: Count | None = Field(
        None, description="For approximate, how many of the most frequent classes are counted; default 4096."
    )
    tail_classes: Count | None = Field(
        None, description="For approximate, about how many other classes stand for all of them; default 1024."
    )
    calibration_fraction: float | None = Field(
        None,
        ge=0,
        le=1,
        description="For approximate, the share of each sample's positions whose exact distributions decide which "
        "classes are frequent; default 1/16. With 0 the training text decides.",
    )

    @model_validator(mode="after")
    def _complete(self) -> "SampleOptions":
        if self.scoring == "approximate" and self.metric != "student_entropy":
            raise ValueError(
                f"samples.scoring: approximate estimates the student's entropy; {self.metric} needs scoring: exact"
            )
        if self.from_cache and self.metric != "all" and not self.needs_teacher:
            raise ValueError(f"samples.from_cache: {self.metric} needs no teacher; leave it out")
        _settle_estimate(self, "samples", "approximate", calibration_fraction=1 / 16)
        return self

    @property
    def needs_teacher(self) -> bool:
        """Whether the scores are computed from the teacher's distribution."""
        return Metric.find(self.metric).needs_teacher


class OnPolicyOptions(Part):
    """How the student's own answers (rollouts) are drawn, and how many completions of the data they replace."""

    fraction: Fraction = Field(
        1.0,
        description="The share of the samples that the student answers; the others use the completion from the data.",
    )
    max_new_tokens: Count = Field(256, description="How many tokens an answer has at most.")
    temperature: float = Field(
        1.0,
        ge=0,
        le=HOTTEST,
        allow_inf_nan=False,
        description="The temperature of the draws; 0: always the most likely token.",
    )
    top_p: Fraction = Field(1.0, description="Draw from the most likely classes that together have this probability.")
    at_once: Count | None = Field(
        None, description="How many prompts a device answers at once; null: all of an optimiser step."
    )
    log_rollouts: int = Field(
        2, ge=0, le=LARGEST_COUNT, description="How many answers go to rollouts.jsonl at each logged step."
    )


def _settle_estimate(part: PositionOptions | SampleOptions, name: str, scoring: str, **defaults: float) -> None:
    """Check the options of a ``scoring`` that estimates, and complete them with their defaults."""
    for key, default in {"frequent_classes": 4096, "tail_classes": 1024, **defaults}.items():
        value = getattr(part, key)
        if part.scoring == scoring and value is None:
            part._settle(**{key: default})
        elif part.scoring != scoring and value is not None:
            raise ValueError(f"{name}.{key}: an option of scoring: {scoring}, without effect on exact; leave it out")
